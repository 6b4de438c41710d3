"""scripts/depth2img.py end to end, on the published architecture at a tiny width."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_model
from ldm.io.images import from_pil
from ldm.sampling.generate import make_items
from ldm.sampling.hybrid import Depth
from tests.helpers.images import add, slope
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_batches, check_resume
from tests.helpers.tiny_models import TINY_DEPTH, tiny_text_model

CONFIG = "configs/stable-diffusion/v2-midas-inference.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_text_model(tmp_path_factory.mktemp("depth"), CONFIG, depth_stage_config__params__settings=TINY_DEPTH)


@pytest.fixture(autouse=True)
def small_depth(monkeypatch):
    """The network that estimates depth is run on a smaller image, for speed."""
    monkeypatch.setattr("ldm.modules.midas.api.SIDE", 96)


@pytest.fixture
def script(files, tmp_path) -> Script:
    slope(tmp_path / "a.png")
    return Script(
        "depth2img",
        tmp_path,
        *files,
        "--steps",
        "4",
        "--n_samples",
        "2",
        "--prompt",
        "a cat",
        "--init-img",
        str(tmp_path / "a.png"),
    )


def test_text_and_image_make_images_each_with_its_own_noise(script, capsys):
    one, two = script()
    assert one.items() >= {"prompt": "a cat", "init_img": "a.png", "strength": 0.9, "scale": 9.0}.items()
    shown = script.pixels(one), script.pixels(two)
    assert shown[0].shape == (64, 64, 3) and (shown[0] != shown[1]).any()
    (other,) = script("--prompt", "a dog", "--n_samples", "1")
    assert np.abs(script.pixels(other) - shown[0]).mean() > 1
    check_resume(script, capsys, "--seed", "3")


def test_a_image_does_not_depend_on_its_batch(script):
    check_batches(script, (), ("--n_samples", "1", "--n_iter", "2"))


def test_at_strength_1_only_the_depth_is_seen(script, files, tmp_path, monkeypatch):
    (first,) = script("--strength", "1", "--n_samples", "1")
    slope(tmp_path / "a.png", turned=True)
    (other,) = script("--strength", "1", "--n_samples", "1")
    assert np.abs(script.pixels(first) - script.pixels(other)).mean() > 0.5
    # With another image of the same depth nothing changes.
    monkeypatch.setattr("ldm.modules.midas.api.MiDaSInference.forward", lambda self, image: torch.eye(32)[None, None])
    (one,) = script("--strength", "1", "--n_samples", "1", "--seed", "5")
    slope(tmp_path / "a.png")
    (two,) = script("--strength", "1", "--n_samples", "1", "--seed", "5")
    assert one["init_img_sha256"] != two["init_img_sha256"] and (script.pixels(one) == script.pixels(two)).all()
    (kept,) = script("--strength", "0.9", "--n_samples", "1", "--seed", "5")
    assert (script.pixels(kept) != script.pixels(two)).any()


@torch.no_grad()
def test_the_network_sees_the_depth_of_the_image_with_and_without_the_text(files, tmp_path):
    model = load_model(files[1], files[3])
    image = from_pil(slope(tmp_path / "a.png"))
    condition = Depth(image, (8, 8))
    assert condition.tokens(model) == 77
    items = make_items([{"prompt": "a cat"}, {"prompt": "a dog"}], 1, seed=0)
    cond = condition.encode(model, items)
    none = condition.unconditional(model, cond)
    depth = torch.nn.functional.interpolate(model.depth_model(image[None]), size=(8, 8), mode="bicubic")
    depth = depth - depth.min()
    assert depth.max() > 0.05
    torch.testing.assert_close(cond.concat, (2 * depth / (depth.max() + 0.001) - 1).expand(2, 1, 8, 8))
    assert torch.equal(none.concat, cond.concat)
    torch.testing.assert_close(none.context, model.get_learned_conditioning(["", ""]))
    torch.testing.assert_close(cond.context, model.get_learned_conditioning(["a cat", "a dog"]))


def test_sizes_are_rounded_down_and_compare_shows_both(script, tmp_path, capsys):
    slope(tmp_path / "a.png", (70, 130))
    plain, fast = script("--compare", "--plan", "0,2", "--n_samples", "1")
    assert (plain["keys"], fast["keys"]) == (None, [0, 2]) and script.pixels(fast).shape == (128, 64, 3)
    assert re.search(r"PSNR to plain: mean, lowest\nplain .*\n0,2 .* [\d.]+ dB, [\d.]+ dB\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--init-img", "nowhere.png"], "--init-img: nowhere.png: no such file; expected an image"),
        (["--strength", "0"], "--strength: expected a number above 0, up to 1; got '0'"),
        (["--strength", "0.1"], "--strength: 0.1 of 4 steps leaves none"),
        (["--H", "96"], "--H: must be a multiple of 64"),
        (["--H", "x"], "--H.*: expected a whole number in 1..16384; got .x."),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a depth-to-image model: it is a LatentDiffusion, expected a LatentDepth2ImageDiffusion",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_a_model_of_depth_is_no_text_to_image_model(files, tmp_path, capsys):
    line = Script("txt2img", tmp_path, *files).refusal(capsys)
    assert line == "--config: not a text-to-image model: its conditioning_key is 'hybrid', expected 'crossattn'"


def test_a_model_of_depth_paints_no_masks(files, tmp_path, capsys):
    add(tmp_path / "in", "a", (64, 64))
    line = Script("inpaint", tmp_path, *files, "--indir", str(tmp_path / "in")).refusal(capsys, "--prompt", "a cat")
    assert line == (
        "--config: not a model for inpainting from text: it is a LatentDepth2ImageDiffusion, "
        "expected a LatentInpaintDiffusion"
    )


def test_the_published_checkpoint_is_asked_for_by_its_place(script, capsys):
    script.common = script.common[4:]
    assert re.match("--ckpt: .*stable-diffusion-v2/512-depth-ema.safetensors: no such file", script.refusal(capsys))
