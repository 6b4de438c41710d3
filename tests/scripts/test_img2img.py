"""scripts/img2img.py end to end, on the model that ships and on a tiny one."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ldm.checkpoint import load_model
from ldm.io.images import from_pil, psnr, read_png
from ldm.models.diffusion.denoiser import Prediction
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import diffuse
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.modules.diffusionmodules.util import Features
from ldm.sampling.engine import Recipe
from ldm.sampling.task import ImageStart, mean_latents
from tests.helpers.scripts import Script, check_resume
from tests.helpers.tiny_models import write_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def script(files, tmp_path):
    return Script(
        "img2img", tmp_path, "--config", str(files[0]), "--ckpt", str(files[1]), "--steps", "10", "--n_samples", "2"
    )


def drawing(side: int = 64) -> Image.Image:
    """A red disc on white."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 8, side // 8, side * 7 // 8, side * 7 // 8), fill="red")
    return image


def test_strength_leads_from_the_image_to_the_text_on_the_model_that_ships(tmp_path):
    drawing().save(tmp_path / "red.png")
    script = Script(
        "img2img",
        tmp_path,
        "--init-img",
        str(tmp_path / "red.png"),
        "--n_samples",
        "1",
        "--steps",
        "20",
        "--skip_grid",
        "--prompt",
        "a blue circle, noto style",
    )
    entries = [script("--strength", str(strength))[0] for strength in (0.05, 0.4, 0.9)]
    shown = [script.pixels(entry) for entry in entries]
    original = np.asarray(drawing()).astype(int)
    distances = [np.abs(image - original).mean() for image in shown]
    assert distances[0] < 12 and distances[0] < distances[1] < distances[2]
    red, blue = (shown[2][24:40, 24:40, channel].mean() for channel in (0, 2))
    assert blue > red + 40
    assert [entry["strength"] for entry in entries] == [0.05, 0.4, 0.9]
    assert entries[0]["init_img"] == "red.png" and len(entries[0]["init_img_sha256"]) == 16


class Oracle:
    """A denoiser that knows the noise."""

    network = torch.nn.Identity()

    def __init__(self, noise: torch.Tensor):
        self.noise = noise

    def encode(self, x, t):
        return Features(x, ())

    def decode(self, features, ts, last):
        return [Prediction(self.noise)] * len(ts)

    def to_eps(self, prediction, x, node):
        return prediction.out


@pytest.mark.parametrize(
    "sampler", sorted(SOLVERS.keys() - {"ddpm", "ddpm-learned", "euler-a"})
)  # they add fresh noise
@pytest.mark.parametrize("strength", [0.1, 0.7])
def test_every_solver_begins_at_the_noise_level_of_its_first_step(files, sampler, strength):
    """Then the true noise leads straight back to the image."""
    model, start = load_model(*files), ImageStart(from_pil(drawing(16)), strength)
    x_T = torch.randn(2, 4, 8, 8)
    rule = Recipe(16, 16, sampler, steps=20).rule(model.alphas_cumprod, None, strength)
    x = start.latents(model, [], x_T, rule.nodes[0])
    *_, state = denoise(Oracle(x_T), rule, load_plan("off", len(rule.nodes)), x)
    expected = diffuse(mean_latents(model, start.image[None]), x_T, rule.nodes[-1].abar_next)
    torch.testing.assert_close(state.x, expected.expand_as(state.x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "euler-a"])
def test_solvers_with_fresh_noise_make_images_from_images(script, tmp_path, sampler):
    drawing(16).save(tmp_path / "a.png")
    near, far = (
        script(
            "--init-img",
            str(tmp_path / "a.png"),
            "--sampler",
            sampler,
            "--steps",
            "100",
            "--strength",
            str(strength),
            "--n_samples",
            "1",
        )[0]
        for strength in (0.01, 0.9)
    )
    assert np.abs(script.pixels(near) - script.pixels(far)).mean() > 5


@pytest.mark.parametrize(
    "options, nodes",
    [([], 7), (["--strength", "0.5"], 5), (["--strength", "1"], 10), (["--plms"], 8), (["--sampler", "heun"], 13)],
    ids=str,
)
def test_a_plan_counts_the_steps_that_are_run(script, tmp_path, options, nodes):
    drawing(16).save(tmp_path / "a.png")
    (entry,) = script("--init-img", str(tmp_path / "a.png"), "--plan", f"0,{nodes - 1}", "--n_samples", "1", *options)
    assert entry["keys"] == [0, nodes - 1]
    assert script.main([*script.common, "--init-img", str(tmp_path / "a.png"), "--plan", f"0,{nodes}", *options]) == 2


def test_each_image_has_its_own_noise_whatever_the_batch(script, tmp_path, capsys):
    drawing(16).save(tmp_path / "a.png")
    one, two = map(script.pixels, script("--init-img", str(tmp_path / "a.png")))
    assert (one != two).any()
    for path in (script.out / "samples").iterdir():
        path.unlink()
    again = script("--init-img", str(tmp_path / "a.png"), "--n_samples", "1", "--n_iter", "2", "--skip_grid")
    assert again == []  # the manifest has their lines already
    for entry, before in zip(script.entries(), (one, two), strict=True):
        assert np.abs(script.pixels(entry) - before).max() <= 1
    check_resume(script, capsys, "--init-img", str(tmp_path / "a.png"), "--seed", "9")


def test_another_image_of_the_same_name_is_another_result(script, tmp_path):
    drawing(16).save(tmp_path / "a.png")
    first = script("--init-img", str(tmp_path / "a.png"), "--n_samples", "1")
    Image.new("RGB", (16, 16), "green").save(tmp_path / "a.png")
    second = script("--init-img", str(tmp_path / "a.png"), "--n_samples", "1")
    assert first[0]["file"] != second[0]["file"]
    assert (script.pixels(first[0]) != script.pixels(second[0])).any()


@pytest.mark.parametrize("size, made", [((19, 26), (16, 24)), ((2, 40), (4, 40)), ((16, 16), (16, 16))], ids=str)
def test_sizes_are_rounded_down_to_what_the_model_can_make(script, tmp_path, size, made):
    drawing().resize(size).save(tmp_path / "a.png")
    (entry,) = script("--init-img", str(tmp_path / "a.png"), "--n_samples", "1")
    image, settings, _ = read_png(script.out / entry["file"])
    assert image.size == made and (settings["width"], settings["height"]) == made
    (entry,) = script("--init-img", str(tmp_path / "a.png"), "--n_samples", "1", "--H", "8", "--W", "12")
    assert read_png(script.out / entry["file"])[0].size == (12, 8)


def test_compare_shows_both(script, tmp_path, capsys):
    drawing(16).save(tmp_path / "a.png")
    entries = script("--init-img", str(tmp_path / "a.png"), "--compare", "--plan", "0,3")
    plain, fast = (
        torch.stack([from_pil(Image.open(script.out / e["file"])) for e in part]) for part in (entries[:2], entries[2:])
    )
    assert f"  {psnr(plain, fast).mean():.1f} dB, " in capsys.readouterr().out
    assert len(list(script.out.glob("compare-*.png"))) == 1


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "the following arguments are required: --init-img"),
        (["--init-img", "nowhere.png"], "--init-img: nowhere.png: no such file; expected an image"),
        (["--init-img", "TEXT"], "--init-img: .*not an image"),
        (["--init-img", "CUT"], "--init-img: .*damaged"),
        (["--init-img", "FLOAT"], "--init-img: .*expected 8 or 16 bits"),
        (["--init-img", "GOOD", "--strength", "0"], "--strength: expected a number above 0, up to 1; got '0'"),
        (["--init-img", "GOOD", "--strength", "1.01"], "--strength: expected"),
        (["--init-img", "GOOD", "--strength", "nan"], "--strength: expected"),
        (["--init-img", "GOOD", "--strength", "0.09"], "--strength: 0.09 of 10 steps leaves none"),
        (["--init-img", "GOOD", "--steps", "2000"], "--steps: .*1..1000.*2000"),
        (["--init-img", "GOOD", "--plms", "--ddim_eta", "0.5"], "--ddim_eta: plms has no choice"),
        (["--init-img", "GOOD", "--H", "18"], "--H: must be a multiple of 4"),
        (["--init-img", "GOOD", "--plan", "0,7"], "--plan: key 7 is past the last node 6"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(script, tmp_path, capsys, arguments, why):
    drawing().save(tmp_path / "GOOD.png")
    (tmp_path / "TEXT.png").write_text("no picture")
    (tmp_path / "CUT.png").write_bytes((tmp_path / "GOOD.png").read_bytes()[:150])
    Image.new("F", (8, 8)).save(tmp_path / "FLOAT.png", format="TIFF")
    arguments = [str(tmp_path / f"{a}.png") if a.isupper() and a.isalpha() else a for a in arguments]
    assert re.match(why, script.refusal(capsys, *arguments))
