"""scripts/inpaint.py with the inpainting models of Stable Diffusion, on their architectures at a tiny width."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ldm.checkpoint import load_model
from ldm.io.images import from_pil
from ldm.sampling.generate import make_items
from ldm.sampling.hybrid import TextAndMaskedImage
from tests.helpers.images import add, original, scene
from tests.helpers.scripts import Script, check_batches, check_resume
from tests.helpers.tiny_models import tiny_text_model

CONFIGS = {
    "v1": "configs/stable-diffusion/v1-inpainting-inference.yaml",
    "v2": "configs/stable-diffusion/v2-inpainting-inference.yaml",
}


BOTH = pytest.mark.parametrize("files", CONFIGS, indirect=True)  # where what a model reads or shows matters


@pytest.fixture(scope="module")
def files(request, tmp_path_factory) -> list[str]:
    version = getattr(request, "param", "v1")
    return tiny_text_model(tmp_path_factory.mktemp(version), CONFIGS[version])


@pytest.fixture
def script(files, tmp_path) -> Script:
    for number, name in enumerate(("bird", "cat")):
        add(tmp_path / "in", name, (64, 64), number)
    return Script("inpaint", tmp_path, *files, "--steps", "3", "--indir", str(tmp_path / "in"))


@BOTH
def test_the_masked_part_is_painted_from_text_and_all_else_stays_to_the_pixel(script, capsys):
    one, two = script("--prompt", "a cat")
    assert (one["image"], two["image"]) == ("bird.png", "cat.png")
    assert one.items() >= {"prompt": "a cat", "mask": "bird_mask.png", "scale": 7.5}.items()
    for entry in (one, two):
        before, after = original(script, entry), script.pixels(entry)
        assert (after[:, :32] == before[:, :32]).all() and (after[:, 32:] != before[:, 32:]).mean() > 0.5
    other, _ = script("--prompt", "a dog")
    assert (script.pixels(other)[:, 32:] != script.pixels(one)[:, 32:]).any()
    check_resume(script, capsys, "--prompt", "a cat", "--seed", "3")


def test_a_result_does_not_depend_on_its_batch(script):
    check_batches(script, ("--batch_size", "1", "--prompt", "a cat"), ("--batch_size", "2", "--prompt", "a cat"))


@BOTH
@torch.no_grad()
def test_the_network_sees_the_mask_and_the_rest_with_and_without_the_text(files):
    model = load_model(files[1], files[3])
    images = torch.stack([from_pil(scene((64, 64), number)) for number in (0, 1)])
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, :, :, 32:] = 1
    condition = TextAndMaskedImage(images, masks)
    assert condition.tokens(model) == 77
    items = make_items([{"prompt": "a cat"}, {"prompt": "a dog"}], 1, seed=0)
    cond = condition.encode(model, items)
    none = condition.unconditional(model, cond)
    assert cond.concat.shape == (2, 5, 8, 8) and torch.equal(none.concat, cond.concat)
    assert cond.concat[0, 0].unique_consecutive(dim=0).tolist() == [[0.0] * 4 + [1.0] * 4]
    seen = model.encode_first_stage(images * (1 - masks)).mode()
    torch.testing.assert_close(cond.concat[:, 1:], model.scale_factor * seen)
    torch.testing.assert_close(none.context, model.get_learned_conditioning(["", ""]))
    torch.testing.assert_close(cond.context, model.get_learned_conditioning(["a cat", "a dog"]))
    torch.testing.assert_close(condition.encode(model, items[::-1]).concat[0], cond.concat[1])


def test_any_size_comes_out_as_it_went_in_and_compare_shows_both(script):
    mask = add(script.folder / "in2", "odd", (70, 50))
    plain, fast = script("--indir", str(script.folder / "in2"), "--prompt", "", "--compare", "--plan", "0,2")
    assert (plain["keys"], fast["keys"], fast["prompt"]) == (None, [0, 2], "")
    before, after = np.asarray(scene((70, 50))).astype(int), script.pixels(fast)
    assert after.shape == (50, 70, 3) and (after[~mask] == before[~mask]).all() and (after[mask] != before[mask]).any()


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "--prompt: needed, since this model reads text; '' leaves it free"),
        (["--prompt", "a cat", "--indir", "nowhere"], "--indir: nowhere: no such folder"),
        (["--prompt", "a cat", "--C", "9"], "--C: this model's is 4; got 9"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_a_mask_of_another_size(script, capsys):
    add(script.folder / "in", "cat", (64, 32))
    (script.folder / "in" / "bird_mask.png").write_bytes((script.folder / "in" / "cat_mask.png").read_bytes())
    line = script.refusal(capsys, "--prompt", "a cat")
    assert line == "--indir: bird_mask.png has 64 x 32 pixels, its image 64 x 64 pixels"
