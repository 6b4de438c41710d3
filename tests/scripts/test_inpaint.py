"""scripts/inpaint.py end to end: a text model by masking its latents, a model trained for it at a tiny width."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import load_config, load_model
from ldm.cli.tasks import masked_images
from ldm.io.images import from_pil, open_image
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes
from ldm.sampling.generate import make_items
from ldm.sampling.task import KeepOutsideMask, LatentInpaint, MaskedImage, Text, mean_latents
from tests.helpers.images import add, original, scene
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_batches, check_resume, load_script
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_model(tmp_path_factory.mktemp("big"), "models/ldm/inpainting_big/config.yaml")


@pytest.fixture
def script(files, tmp_path) -> Script:
    """The trained kind, on two images of 32 x 32."""
    for number, name in enumerate(("bird", "cat")):
        add(tmp_path / "in", name, (32, 32), number)
    return Script("inpaint", tmp_path, *files, "--steps", "5", "--indir", str(tmp_path / "in"))


# A model that was trained for it


def test_what_is_masked_is_painted_and_all_else_stays_to_the_pixel(script, capsys):
    entries = script("--n_samples", "2")
    assert [(e["image"], e["mask"], e["sample"]) for e in entries] == [
        (f"{name}.png", f"{name}_mask.png", k) for name in ("bird", "cat") for k in (0, 1)
    ]
    painted = []
    for entry in entries:
        before, after = original(script, entry), script.pixels(entry)
        assert (after[:, :16] == before[:, :16]).all()
        assert (after[:, 16:] != before[:, 16:]).mean() > 0.5
        painted.append(after[:, 16:])
    assert all((a != b).any() for k, a in enumerate(painted) for b in painted[:k])
    assert entries[0]["scale"] == 1.0 and "prompt" not in entries[0]
    check_resume(script, capsys, "--seed", "3")


def test_a_result_does_not_depend_on_its_batch(script):
    check_batches(script, ("--batch_size", "1"), ("--batch_size", "2"))


def test_the_network_sees_the_image_without_its_masked_part_and_the_mask(files, script):
    model = load_model(files[1], files[3])
    image = from_pil(open_image(script.folder / "in" / "cat.png"))
    mask = torch.zeros(1, 32, 32)
    mask[:, :, 16:] = 1
    seen = image.clone()
    seen[:, :, 16:] = -1  # black
    condition = MaskedImage(torch.stack([image, -image]), torch.stack([mask, 1 - mask]))
    items = make_items([{}, {}], 1, seed=0)
    beside = condition.encode(model, items)
    assert beside.shape == (2, 4, 8, 8)
    torch.testing.assert_close(beside[:1, :3], model.first_stage_model.encode(seen[None]))
    assert beside[0, 3].unique_consecutive(dim=0).tolist() == [[-1.0] * 4 + [1.0] * 4]
    assert torch.equal(condition.encode(model, items[::-1])[0], beside[1])


def test_any_size_comes_out_as_it_went_in(script):
    mask = add(script.folder / "in2", "odd", (37, 45))
    (entry,) = script("--indir", str(script.folder / "in2"))
    before = np.asarray(scene((37, 45))).astype(int)
    after = script.pixels(entry)
    assert after.shape == (45, 37, 3) and (after[~mask] == before[~mask]).all() and (after[mask] != before[mask]).any()


def test_compare_and_plans(script, capsys):
    entries = script("--compare", "--plan", "0,3")
    assert [e["keys"] for e in entries] == [None, None, [0, 3], [0, 3]]
    assert re.search(r"PSNR to plain: mean, lowest\nplain .*\n0,3 .* [\d.]+ dB, [\d.]+ dB\n", capsys.readouterr().out)


# The text model that ships


@pytest.fixture(scope="module")
def emoji64():
    return load_model(EMOJI64 / "config.yaml", EMOJI64 / "model.safetensors")


def test_a_text_model_paints_what_the_prompt_says(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "in" / "a.png")
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 64, 8))
    mask.save(tmp_path / "in" / "a_mask.png")
    script = Script("inpaint", tmp_path, "--indir", str(tmp_path / "in"), "--steps", "15", "--skip_grid")
    red, green = (script("--prompt", f"a {colour} heart, noto style")[0] for colour in ("red", "green"))
    assert red["prompt"] == "a red heart, noto style" and red["scale"] == 2.0
    for entry, channel in ((red, 0), (green, 1)):
        shown = script.pixels(entry)
        assert (shown[:8] == 255).all()
        middle = shown[24:40, 24:40].mean((0, 1))
        assert middle.argmax() == channel and middle[channel] > middle[1 - channel] + 40


@pytest.mark.parametrize("sampler", sorted(SOLVERS.keys() - {"ddpm-learned"}))  # for other networks
def test_the_latents_of_what_stays_are_kept_on_the_way(emoji64, sampler):
    """So that the painted part fits; with only the pixels put back they end elsewhere."""
    sizes = Sizes.of(load_config(EMOJI64 / "config.yaml").model)
    image, mask = from_pil(scene((64, 64)))[None], torch.zeros(1, 1, 64, 64)
    mask[..., 33:] = 1  # one latent is cut by the edge: it is painted, too
    recipe = Recipe(64, 64, sampler, steps=6, scale=1.0)
    plan = load_plan("off", num_nodes(recipe))
    items = make_items([{"prompt": "a dog face, noto style"}], 1, seed=0)
    clean = mean_latents(emoji64, image)

    def distance(start) -> tuple[float, float]:
        error = (Engine(emoji64, sizes, recipe, plan, Task(Text(), start)).latents(items) - clean).abs()
        return error[..., :4].mean().item(), error[..., 4:].mean().item()

    kept, painted = distance(LatentInpaint(image, mask))
    assert kept < 0.5 * painted and kept < 0.7 * distance(KeepOutsideMask(image, mask))[0]


# Bad input


def broken(folder, fault: str) -> None:
    add(folder, "a", (32, 32))
    if fault == "mask size":
        Image.new("L", (32, 16), 255).save(folder / "a_mask.png")
    elif fault == "two sizes":
        add(folder, "b", (64, 32))
    elif fault == "no picture":
        (folder / "a.png").unlink()
    elif fault == "no masks":
        (folder / "a_mask.png").unlink()
    elif fault == "nothing to paint":
        Image.new("L", (32, 32), 1).save(folder / "a_mask.png")
    elif fault == "transparent":
        Image.new("LA", (32, 32), (255, 0)).save(folder / "a_mask.png")
    elif fault == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif fault == "damaged":
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:60])


@pytest.mark.parametrize(
    "fault, why",
    [
        ("mask size", "--indir: a_mask.png has 32 x 16 pixels, its image 32 x 32 pixels"),
        ("two sizes", "--indir: b.png has 64 x 32 pixels, a.png 32 x 32 pixels; expected one size"),
        ("no picture", "--indir: .*a.png: no such file; expected an image"),
        ("no masks", "--indir: .* has no masks; expected images NAME.png with masks NAME_mask.png"),
        ("empty", "--indir: .* has no masks; expected"),
        ("nothing to paint", "--indir: .*a_mask.png: a mask that paints nothing: its brightest level is 1 of 255"),
        ("transparent", "--indir: .*a_mask.png: a mask with transparent parts; expected white where to paint"),
        ("damaged", "--indir: .*a.png: a damaged image"),
    ],
)
def test_bad_folders(files, tmp_path, capsys, fault, why):
    broken(tmp_path / "in", fault)
    script = Script("inpaint", tmp_path, *files, "--indir", str(tmp_path / "in"))
    assert re.match(why, script.refusal(capsys))


def test_files_that_are_no_pair_are_named(files, tmp_path, capsys):
    add(tmp_path, "a", (32, 32))
    for name in ("lonely.png", "notes.txt"):
        Image.new("RGB", (32, 32)).save(tmp_path / name, format="PNG")
    assert sorted(masked_images(tmp_path).left_out) == ["lonely.png", "notes.txt"]
    assert load_script("inpaint").main([*files, "--indir", str(tmp_path), "--sampler", "magic"]) == 2
    warning, *_ = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: --indir: 2 files are left out, .* \(lonely.png, notes.txt\)$", warning)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--indir", "nowhere"], "--indir: nowhere: no such folder"),
        (["--scale", "3"], "--scale: there is guidance only with --prompt"),
        (["--prompt", "a dog"], "--config: not a text-to-image model: its conditioning_key is 'concat'"),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not an inpainting model: its conditioning_key is 'crossattn', expected 'concat'",
        ),
        (["--n_samples", "0"], "--n_samples: expected"),
        (["--sampler", "magic"], "--sampler: .*'magic'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_masks_of_another_mode_mean_the_same(script):
    (first, _) = script()
    mask = Image.open(script.folder / "in" / "bird_mask.png")
    for mode in ("1", "P", "RGB", "RGBA"):
        mask.convert(mode).save(script.folder / "in" / "bird_mask.png")
        again = [entry for entry in script() if entry["image"] == "bird.png"]
        assert len(again) == 1 and (script.pixels(again[0]) == script.pixels(first)).all()


def test_the_published_checkpoint_is_asked_for_by_its_place(script, tmp_path, capsys):
    script.common = [flag for flag in script.common if flag not in ("--config", "--ckpt")][2:]
    assert re.match("--ckpt: .*models/ldm/inpainting_big/last.ckpt: no such file", script.refusal(capsys))
