"""scripts/layout2img.py end to end, on the published architecture at a tiny width."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.modules.encoders.boxes import Box, box_tokens
from ldm.sampling.generate import make_items
from ldm.sampling.task import Layout
from tests.helpers.paths import EMOJI64, ROOT
from tests.helpers.scripts import Script, check_batches, check_resume
from tests.helpers.tiny_models import tiny_model

CAT, DOG = {"class": 17, "box": [0.1, 0.2, 0.5, 0.6]}, {"class": 3, "box": [0, 0, 1, 1]}
NAMES = "lynx, bobcat\ndog, hound\ncat\nbat\nbat\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_model(
        tmp_path_factory.mktemp("layout"),
        "models/ldm/layout2img-openimages256/config.yaml",
        unet_config__params__context_dim=32,
        unet_config__params__transformer_depth=1,
        cond_stage_config__params__n_embed=32,
        cond_stage_config__params__n_layer=2,
    )


@pytest.fixture
def script(files, tmp_path) -> Script:
    write(tmp_path, [[CAT, DOG], [DOG]])
    return Script("layout2img", tmp_path, *files, "--steps", "4", "--boxes", str(tmp_path / "boxes.json"))


def write(folder, layouts) -> None:
    text = layouts if isinstance(layouts, str) else json.dumps(layouts)
    (folder / "boxes.json").write_text(text, encoding="utf-8")


def test_boxes_decide_what_is_imaged_one_list_for_each_image(script, tmp_path, capsys):
    entries = script("--n_samples", "2")
    assert [(e["boxes"], e["sample"]) for e in entries] == [
        (boxes, k) for boxes in ([[17, 0.1, 0.2, 0.5, 0.6], [3, 0, 0, 1, 1]], [[3, 0, 0, 1, 1]]) for k in (0, 1)
    ]
    shown = [script.pixels(e) for e in entries]
    assert shown[0].shape == (32, 32, 3) and all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])
    write(tmp_path, [[CAT | {"box": [0.4, 0.2, 0.5, 0.6]}, DOG]])
    (moved,) = script()
    assert (script.pixels(moved) != shown[0]).any()
    check_resume(script, capsys, "--seed", "3", "--n_samples", "2")


def test_a_image_does_not_depend_on_its_batch(script):
    check_batches(script, ("--batch_size", "1"), ("--batch_size", "2"))


def test_names_mean_numbers(script, tmp_path):
    (tmp_path / "names.txt").write_text(NAMES)
    write(tmp_path, [[DOG | {"class": "Hound"}, DOG | {"class": "2"}, DOG | {"class": 17}]])
    (entry,) = script("--class-names", str(tmp_path / "names.txt"))
    assert [box[0] for box in entry["boxes"]] == [1, 2, 17]


@torch.no_grad()
def test_the_network_sees_the_tokens_of_the_boxes(files):
    model = load_model(files[1], files[3])
    ids = torch.stack([box_tokens([Box(17, 0.1, 0.2, 0.5, 0.6)]), box_tokens([Box(3, 0, 0, 1, 1)])])
    condition = Layout(ids)
    assert condition.tokens(model) == 92
    cond = condition.encode(model, make_items([{}, {}], 1, seed=0)[::-1])
    torch.testing.assert_close(cond, model.cond_stage_model(ids.flip(0)))
    with pytest.raises(ValueError, match="guidance scale must be 1 for a layout-to-image model"):
        condition.unconditional(model, cond)


def test_sizes_compare_and_the_example(script, capsys):
    plain, fast = script(
        "--H", "64", "--n_samples", "1", "--compare", "--plan", "0,3", "--boxes", str(ROOT / "docs/examples/boxes.json")
    )[::2]
    assert (plain["keys"], fast["keys"]) == (None, [0, 3]) and script.pixels(fast).shape == (64, 32, 3)
    assert re.search(r"PSNR to plain: mean, lowest", capsys.readouterr().out)


@pytest.mark.parametrize(
    "layouts, why",
    [
        ("[[", "--boxes: .*boxes.json: line 1, column 3: not JSON: Expecting value"),
        ({"boxes": []}, "--boxes: .*expected a list of images; got {'boxes': "),
        ([], r"--boxes: .*expected a list of images; got \[\]"),
        ("[" * 100_000, "--boxes: .*boxes.json: line 1: not JSON of at most 64 levels"),
        ([[CAT], []], r"--boxes: image 2: expected a list of boxes; got \[\]"),
        ([CAT], "--boxes: image 1: expected a list of boxes; got {'box': "),
        ([[CAT, 5]], r'--boxes: image 1, box 2: expected {"class": CLASS, "box": \[X, Y, WIDTH, HEIGHT\]}; got 5'),
        ([[CAT | {"colour": 1}]], "--boxes: image 1, box 1: expected {"),
        ([[{"box": CAT["box"]}]], "--boxes: image 1, box 1: expected {"),
        ([[CAT | {"class": 1.5}]], "--boxes: image 1, box 1: class: expected a number or a name; got 1.5"),
        ([[CAT | {"class": True}]], "--boxes: image 1, box 1: class: expected a number or a name; got True"),
        ([[CAT | {"class": "cat"}]], "--boxes: image 1, box 1: 'cat' is no number, and this model's classes"),
        ([[CAT | {"class": -1}]], "--boxes: image 1, box 1: expected 0..8190, the classes of this model; got -1"),
        ([[CAT | {"class": 8191}]], "--boxes: image 1, box 1: expected 0..8190, the classes of this model; got 8191"),
        ([[CAT | {"box": [0, 0, 1]}]], r"--boxes: image 1, box 1: box: expected four numbers.*; got \[0, 0, 1\]"),
        ([[CAT | {"box": [0, 0, 1, "1"]}]], "--boxes: image 1, box 1: box: expected four numbers"),
        ([[CAT | {"box": [0, 0, 1, True]}]], "--boxes: image 1, box 1: box: expected four numbers"),
        ([[CAT | {"box": [0.6, 0, 0.5, 1]}]], "--boxes: image 1, box 1: box: must lie in the image, 0..1"),
        (
            [[DOG], [DOG, CAT | {"box": [0, 0, 0, 1]}]],
            "--boxes: image 2, box 2: box: width and height must be positive",
        ),
        ("[[" + json.dumps(CAT).replace("0.2", "NaN") + "]]", "--boxes: image 1, box 1: box: must lie in the image"),
        ([[DOG] * 31], "--boxes: image 1: boxes: the model takes at most 30; got 31"),
    ],
    ids=lambda value: "" if isinstance(value, str) and value.startswith("--") else str(value)[:40],
)
def test_malformed_boxes(script, tmp_path, capsys, layouts, why):
    write(tmp_path, layouts)
    assert re.match(why, script.refusal(capsys))


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--boxes", "nowhere.json"], "--boxes: .*nowhere.json"),
        (["--scale", "2"], "unrecognized arguments: --scale 2"),
        (["--H", "40"], "--H: must be a multiple of 32"),
        (["--class-names", "nowhere"], "--class-names: .*nowhere"),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a layout-to-image model: its cond_stage_key is 'caption', expected 'coordinates_bbox'",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_a_layout_model_reads_no_text(files, tmp_path, capsys):
    line = Script("txt2img", tmp_path, *files).refusal(capsys)
    assert line.startswith("--config: text needs a tokenizer, which this model was built without")
