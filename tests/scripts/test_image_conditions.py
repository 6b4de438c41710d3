"""scripts/superresolution.py and scripts/semantic2img.py end to end, on published architectures at a tiny width."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_model
from ldm.io.images import from_pil
from ldm.sampling.generate import make_items
from ldm.sampling.task import ImageConcat, SemanticMap
from tests.helpers.images import labelled, small
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_resume
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def bsr_sr(tmp_path_factory) -> list[str]:
    return tiny_model(tmp_path_factory.mktemp("sr"), "models/ldm/bsr_sr/config.yaml")


@pytest.fixture(scope="module")
def synthesis(tmp_path_factory) -> list[str]:
    return tiny_model(tmp_path_factory.mktemp("semantic"), "models/ldm/semantic_synthesis256/config.yaml")


@pytest.fixture
def upscale(bsr_sr, tmp_path) -> Script:
    return Script("superresolution", tmp_path, *bsr_sr, "--steps", "5")


@pytest.fixture
def paint(synthesis, tmp_path) -> Script:
    return Script("semantic2img", tmp_path, *synthesis, "--steps", "5")


# Super-resolution


def test_images_come_out_four_times_as_large(upscale, tmp_path, capsys):
    paths = [small(tmp_path / "a.png"), small(tmp_path / "b.png", seed=1)]
    entries = upscale("--images", *paths, "--n_samples", "2", "--batch_size", "3")
    assert [(e["image"], e["sample"], e["batch"]) for e in entries] == [
        ("a.png", 0, 3),
        ("a.png", 1, 3),
        ("b.png", 0, 3),
        ("b.png", 1, 1),
    ]
    shown = [upscale.pixels(e) for e in entries]
    assert all(image.shape == (32, 32, 3) for image in shown)
    assert all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])
    assert entries[0].items() >= {"eta": 1.0, "scale": 1.0}.items()
    check_resume(upscale, capsys, "--images", *paths, "--seed", "2")


def test_the_network_sees_the_small_image_as_it_is(bsr_sr, tmp_path):
    model = load_model(bsr_sr[1], bsr_sr[3])
    images = torch.stack([from_pil(Image.open(small(tmp_path / f"{k}.png", seed=k))) for k in range(3)])
    items = make_items([{}, {}, {}], 1, seed=0)[::-1]
    condition = ImageConcat(images)
    assert condition.tokens(model) is None and torch.equal(condition.encode(model, items), images.flip(0))


def test_small_sizes_that_the_network_can_not_halve(upscale, tmp_path):
    (entry,) = upscale("--images", small(tmp_path / "a.png", (9, 5)))
    assert upscale.pixels(entry).shape == (20, 36, 3)
    (plain, fast) = upscale("--images", small(tmp_path / "a.png"), "--compare", "--plan", "0,3")
    assert (plain["keys"], fast["keys"]) == (None, [0, 3])


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "the following arguments are required: --images"),
        (["--images", "nowhere.png"], "--images: nowhere.png: no such file"),
        (["--images", "A", "B"], "--images: .*B has 8 x 4 pixels, .*A 8 x 8 pixels; expected one size"),
        (["--images", "A", "--f", "8"], "--f: this model's is 4; got 8"),
        (["--images", "A", "--scale", "2"], "--scale: only for an upscaler that reads text, such as x4-upscaling"),
        (["--images", "A", "--prompt", "a cat"], "--prompt: only for an upscaler that reads text"),
        (["--images", "A", "--noise_level", "5"], "--noise_level: only for an upscaler that reads text"),
        (
            ["--images", "A", "--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a super-resolution model: its conditioning_key is 'crossattn', expected 'concat'",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments_of_superresolution(upscale, tmp_path, capsys, arguments, why):
    small(tmp_path / "a.png", (8, 8)), small(tmp_path / "b.png", (8, 4))
    (tmp_path / "a.png").rename(tmp_path / "A"), (tmp_path / "b.png").rename(tmp_path / "B")
    arguments = [str(tmp_path / a) if a in ("A", "B") else a for a in arguments]
    assert re.match(why, upscale.refusal(capsys, *arguments))


def test_a_model_with_other_channels_beside_the_latents(upscale, tmp_path, capsys):
    big = tiny_model(tmp_path / "big", "models/ldm/inpainting_big/config.yaml")
    line = upscale.refusal(capsys, *big, "--images", small(tmp_path / "a.png"))
    assert line == "--config: not a super-resolution model: its UNet takes 7 channels, expected 3 of the latents and 3"


# Semantic synthesis


def test_maps_decide_what_is_painted(paint, tmp_path, capsys):
    paths = [labelled(tmp_path / "a.png"), labelled(tmp_path / "b.png", seed=1)]
    one, two = paint("--maps", *paths, "--seed-by-position")  # files of other content have other noise
    assert (one["map"], two["map"]) == ("a.png", "b.png")
    assert paint.pixels(one).shape == (32, 32, 3) and (paint.pixels(one) != paint.pixels(two)).any()
    (same,) = paint("--maps", labelled(tmp_path / "palette.png", mode="P"), "--seed-by-position")
    assert np.abs(paint.pixels(same) - paint.pixels(one)).max() <= 1
    check_resume(paint, capsys, "--maps", *paths, "--seed", "2")


def test_the_network_sees_one_mixed_channel_sum_per_latent(synthesis):
    model = load_model(synthesis[1], synthesis[3])
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[1, :, 16:] = 181
    condition = SemanticMap(labels)
    assert condition.tokens(model) is None
    beside = condition.encode(model, make_items([{}, {}], 1, seed=0))
    weights = model.cond_stage_model.channel_mapper.weight[:, :, 0, 0]  # (3, 182)
    assert beside.shape == (2, 3, 8, 8)
    torch.testing.assert_close(beside[0], weights[:, 0, None, None].expand(3, 8, 8))
    torch.testing.assert_close(beside[1, :, :, 5:], weights[:, 181, None, None].expand(3, 8, 3))


@pytest.mark.parametrize("name", ["upscale", "paint"])
def test_a_file_that_is_given_twice_makes_two_images(request, tmp_path, name):
    flag, path = {
        "upscale": ("--images", small(tmp_path / "a.png")),
        "paint": ("--maps", labelled(tmp_path / "b.png")),
    }[name]
    script = request.getfixturevalue(name)
    one, two = script(flag, path, path)
    assert one["seed"][1:3] == two["seed"][1:3] and (script.pixels(one) != script.pixels(two)).any()


def test_maps_of_any_size_and_compare(paint, tmp_path):
    (entry,) = paint("--maps", labelled(tmp_path / "a.png", (35, 30)))
    assert paint.pixels(entry).shape == (30, 35, 3)
    plain, fast = paint("--maps", labelled(tmp_path / "a.png"), "--compare", "--plan", "0,3")
    assert (plain["keys"], fast["keys"]) == (None, [0, 3]) and list(paint.out.glob("compare-*.png"))


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "the following arguments are required: --maps"),
        (["--maps", "nowhere.png"], "--maps: nowhere.png: no such"),
        (["--maps", "HIGH"], "--maps: .*HIGH has a label 182; this model's are 0..181"),
        (["--maps", "NEGATIVE"], "--maps: .*NEGATIVE has a label -1; this model's are 0..181"),
        (["--maps", "COLOUR"], "--maps: .*an image of mode RGB; expected one number per pixel"),
        (["--maps", "GOOD", "SMALL"], "--maps: .*SMALL has 16 x 32 pixels, .*GOOD 32 x 32 pixels; expected one size"),
        (
            ["--maps", "GOOD", "--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a semantic synthesis model: its conditioner is BERTEmbedder",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments_of_semantic2img(paint, tmp_path, capsys, arguments, why):
    for name, path in {
        "GOOD": labelled(tmp_path / "g.png"),
        "HIGH": labelled(tmp_path / "h.png", top=182),
        "SMALL": labelled(tmp_path / "s.png", (16, 32)),
        "COLOUR": small(tmp_path / "c.png"),
    }.items():
        (tmp_path / name).write_bytes(open(path, "rb").read())
    Image.fromarray(np.full((32, 32), -1, np.int32)).save(tmp_path / "NEGATIVE", format="TIFF")
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    assert re.match(why, paint.refusal(capsys, *arguments))
