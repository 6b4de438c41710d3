"""scripts/superresolution.py with the x4 upscaler of Stable Diffusion, on its architecture at a tiny width."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_model
from ldm.io.images import from_pil
from ldm.models.diffusion.schedule import ImageNoise
from ldm.sampling.generate import make_items
from ldm.sampling.hybrid import LowResolution
from tests.helpers.images import small
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_batches, check_resume
from tests.helpers.tiny_models import tiny_text_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_text_model(tmp_path_factory.mktemp("x4"), "configs/stable-diffusion/x4-upscaling.yaml")


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script(
        "superresolution",
        tmp_path,
        *files,
        "--steps",
        "3",
        "--images",
        small(tmp_path / "a.png"),
        small(tmp_path / "b.png", seed=1),
    )


def test_images_come_out_four_times_as_large_as_the_text_says(script, capsys):
    one, two = script("--prompt", "a cat")
    assert [e["image"] for e in (one, two)] == ["a.png", "b.png"]
    assert one.items() >= {"prompt": "a cat", "noise_level": 20, "scale": 9.0, "eta": 0.0, "steps": 3}.items()
    shown = [script.pixels(e) for e in (one, two)]
    assert shown[0].shape == (32, 32, 3) and (shown[0] != shown[1]).any()
    other, _ = script("--prompt", "a dog")
    more, _ = script("--prompt", "a cat", "--noise_level", "300")
    assert (script.pixels(other) != shown[0]).any() and (script.pixels(more) != shown[0]).any()
    check_resume(script, capsys, "--seed", "3")


def test_published_defaults_of_steps_and_eta(script):
    script.common.remove("--steps"), script.common.remove("3")
    entry, _ = script("--plan", "0")
    assert entry.items() >= {"steps": 75, "eta": 0.0, "prompt": "", "keys": [0]}.items()


def test_a_result_does_not_depend_on_its_batch(script):
    one = check_batches(script, ("--n_samples", "2"), ("--n_samples", "2", "--batch_size", "4"))
    assert (one[0] != one[1]).any()


@torch.no_grad()
def test_the_network_sees_the_small_image_under_noise_of_the_item(files, tmp_path):
    model = load_model(files[1], files[3])
    images = torch.stack([from_pil(Image.open(small(tmp_path / f"{k}.png", seed=k))) for k in range(2)])
    condition = LowResolution(images, 200)
    assert condition.tokens(model) == 77 and condition.settings() == {"noise_level": 200}
    items = make_items([{"prompt": "a cat"}, {"prompt": "a dog"}], 2, seed=0)
    cond = condition.encode(model, items)
    none = condition.unconditional(model, cond)
    assert cond.y.tolist() == [200] * 4 and torch.equal(none.y, cond.y) and torch.equal(none.concat, cond.concat)
    torch.testing.assert_close(none.context, model.get_learned_conditioning([""] * 4))
    abar = torch.cumprod(1 - torch.linspace(0.0001**0.5, 0.02**0.5, 1000, dtype=torch.float64) ** 2, 0)[200].item()
    noise = (cond.concat - abar**0.5 * images.repeat_interleave(2, 0)) / (1 - abar) ** 0.5
    assert 0.8 < noise.std() < 1.2 and all((a - b).abs().max() > 1 for k, a in enumerate(noise) for b in noise[:k])
    # It is the item's own, whatever its neighbours, and not what sampling begins from.
    torch.testing.assert_close(condition.encode(model, items[3:]).concat[0], cond.concat[3], rtol=0, atol=0)
    assert (noise[3] - ImageNoise([items[3].start]).start(noise[3].shape)[0]).abs().max() > 1


def test_sizes_that_the_network_can_not_halve_and_compare(script, tmp_path, capsys):
    plain, fast = script("--images", small(tmp_path / "odd.png", (9, 5)), "--compare", "--plan", "0,2")
    assert (plain["keys"], fast["keys"]) == (None, [0, 2]) and script.pixels(fast).shape == (20, 36, 3)
    assert re.search(r"PSNR to plain: mean, lowest\nplain .*\n0,2 .* [\d.]+ dB, [\d.]+ dB\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--noise_level", "350"], "--noise_level: expected 0..349 for this model; got 350"),
        (["--noise_level", "-1"], "--noise_level: expected a whole number >= 0; got '-1'"),
        (["--noise_level", "2.5"], "--noise_level: expected a whole number"),
        (["--images", "nowhere.png"], "--images: nowhere.png: no such file"),
        (
            [
                "--config",
                str(EMOJI64 / "config.yaml"),
                "--ckpt",
                str(EMOJI64 / "model.safetensors"),
                "--prompt",
                "a cat",
            ],
            "--config: not a super-resolution model: its conditioning_key is 'crossattn', expected 'concat'",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_an_upscaler_is_no_text_to_image_model(files, tmp_path, capsys):
    line = Script("txt2img", tmp_path, *files).refusal(capsys)
    assert line == "--config: not a text-to-image model: its conditioning_key is 'hybrid-adm', expected 'crossattn'"
