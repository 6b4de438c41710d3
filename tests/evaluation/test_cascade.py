"""A cascade in the evaluation: tiny stages of DeepFloyd-IF, from captions to the row of a table."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from evaluation import generate, tables
from evaluation.protocols.protocol import load_protocol
from evaluation.runs.generate import prepare
from evaluation.runs.models import files_of
from evaluation.table.cost import gflops
from evaluation.table.spec import Row
from ldm.cli.cascade import load_cascade
from ldm.sampling.generate import Item, read_manifest
from tests.helpers.clip_folder import write_clip
from tests.helpers.coco import write_coco, write_protocol
from tests.helpers.deepfloyd import tiny_stages
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

CASCADE = {"steps": {8: [3, 3, 2]}, "plans": ["0,2", "0,2", "0"], "scales": [4.0, 9.0], "noise_levels": [250, 20]}
PAPER = {"gflops": 100, "seconds": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return tiny_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture
def folder(files, tmp_path) -> Path:
    """A protocol of the tiny stages, and a table with a plain row and one with the plans of the cascade."""
    write_of(tmp_path, files)
    row = {"sampler": "ddpm-learned", "steps": 8, "paper": PAPER}
    content = {
        "title": "A cascade",
        "source": "nowhere",
        "columns": ["clip_score", "gflops", "seconds"],
        "protocol": {"coco": str(tmp_path / "if.yaml")},
        "rows": [{"label": "plain", "plain": True, **row}, {"label": "ours", "plan": "faster-diffusion", **row}],
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def write_of(folder: Path, files: dict[str, str], **changes: object) -> None:
    data = folder / "coco"
    defaults = {"config": str(ROOT / "configs/deepfloyd/if-i-xl.yaml"), "ckpt": files["stage1"], "data": str(data)}
    defaults |= {name: [files[name]] for name in ("stage2", "stage3")}
    if not data.is_dir():
        write_coco(data, 4)
    sampling = {"sampler": "ddpm-learned", "steps": 8}
    more = {"size": 64, "guidance": 7.0, "sampling": sampling, "select__count": 2, "cascade": CASCADE}
    metrics = {"clip_score": ["hessel"]}
    write_protocol(folder / "if.yaml", **more | {"defaults": defaults, "metrics": metrics} | changes)


def table(folder: Path, *more: str) -> int:
    given = [str(folder / "table.yaml"), "--world", "coco", "--device", "cpu", "--runs", str(folder / "runs")]
    return tables.main([*given, *more])


def cells(printed: str, row: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_from_captions_to_the_rows_of_a_table(folder, capsys):
    """Images are generated, measured, counted and timed; the same command again finds all of it."""
    how = ["--timed", "1", "--clip", str(write_clip(folder / "clip"))]
    assert table(folder, *how) == 0
    captured = capsys.readouterr()
    plain, ours = (cells(captured.out, name) for name in ("plain", "ours"))
    assert all(re.match(r"-?\d", cell) for row in (plain, ours) for cell in (row[0], row[3], row[6]))
    assert plain[-1] == ours[-1] == ""  # nothing is left to remark
    cards = [json.loads(path.read_text()) for path in sorted((folder / "runs" / "if").glob("*/run.json"))]
    assert len(cards) == 2 and {card["pictures"] for card in cards} == {2}
    stages = [[card["method"][f"stage{number}"] for number in (1, 2, 3)] for card in cards]
    assert [[stage["steps"] for stage in of] for of in stages] == [[3, 3, 2]] * 2
    assert [[stage["scale"] for stage in of] for of in stages] == [[7.0, 4.0, 9.0]] * 2
    keys = [[stage["keys"] for stage in of] for of in stages]
    assert [None] * 3 in keys and [[0, 2], [0, 2], [0]] in keys
    images = sorted((folder / "runs").rglob("*.png"))
    assert len(images) == 4 and {Image.open(path).size for path in images} == {(64, 64)}
    before = {path: path.read_bytes() for path in images}
    assert table(folder, *how) == 0
    assert cells(capsys.readouterr().out, "ours") == ours
    assert {path: path.read_bytes() for path in images} == before


def test_the_images_are_those_of_the_script(files, folder, tmp_path):
    """if2img.py stage by stage, with files in between, and the cascade in memory: one code, the same images."""
    main, out = load_script("if2img").main, tmp_path / "if"
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    short = ["--steps", "3", "3", "2", "--plans", *CASCADE["plans"], "--prompt", "a red heart", "--outdir", str(out)]
    assert main([*given, *short, "--seed", "5"]) == 0
    (first,), (last,) = (read_manifest(out / f"stage{number}" / "manifest.jsonl") for number in (1, 3))
    protocol = load_protocol(str(folder / "if.yaml"))
    request = prepare(protocol, protocol.method(plan="faster-diffusion"), files_of(protocol, *protocol.model()), [])
    cascade = load_cascade(replace(request.way.stages, seed=5, device="cpu"), torch.device("cpu"), 1)
    seed, start = (tuple(first[name]) for name in ("seed", "start"))
    (image,), cost = cascade([Item(0, 0, {"prompt": "a red heart"}, seed, start)])
    theirs = np.asarray(Image.open(out / "stage3" / last["file"])).astype(int)
    assert np.abs(np.asarray(image).astype(int) - theirs).max() <= 1
    made = [read_manifest(out / f"stage{number}" / "manifest.jsonl")[0]["unet_macs"] for number in (1, 2, 3)]
    assert cost["unet_macs"] == sum(made)


def test_two_stages_without_the_third(files, tmp_path):
    cascade = CASCADE | {"steps": {6: [3, 3]}, "plans": ["0,2", "0,2"], "scales": [4.0], "noise_levels": [250]}
    sampling = {"sampler": "ddpm-learned", "steps": 6}
    write_of(tmp_path, files, size=16, cascade=cascade, sampling=sampling)
    out = tmp_path / "out"
    given = ["--protocol", str(tmp_path / "if.yaml"), "--plan", "faster-diffusion", "--count", "1", "--device", "cpu"]
    assert generate.main([*given, "--out", str(out)]) == 0
    (image,) = (out / "samples").iterdir()
    assert Image.open(image).size == (16, 16)
    assert generate.main([*given, "--out", str(out), "--verify"]) == 0


def test_rows_without_weights_have_the_count_of_the_stages_that_are_described(files, folder, capsys):
    """Stage 2 is described by its folder alone, whose weights need not be there."""
    protocol = load_protocol(str(folder / "if.yaml"))
    row, model = Row(label="x", sampler="ddpm-learned", steps=8), files_of(protocol, *protocol.model())
    whole, none = gflops(protocol, row, model)
    described = folder / "described"
    shutil.copytree(files["stage2"], described, ignore=shutil.ignore_patterns("*.bin"))
    without = replace(model, added={**model.added, "stage2": (described,)})
    assert gflops(protocol, row, without) == (whole, "") and none == ""
    away = replace(model, added={**model.added, "stage2": (folder / "away",)})
    less, missing = gflops(protocol, row, away)
    assert 0 < less < whole and missing == "GFLOPs without stage 2, which is not here"
    write_of(folder, files | {"stage2": str(folder / "away")})
    assert table(folder, "--gflops-only") == 0
    assert cells(capsys.readouterr().out, "plain")[-1] == f"not run: needs away; {missing}"


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--steps", "9"], "--steps: expected the steps of all stages together, one of 8 (3+3+2); got 9"),
        (["--tome", "0.5"], "--tome: the stages of DeepFloyd-IF do not take it; got 0.5"),
        (["--plan", "auto:2"], "--plan: stage 1: auto plans need a calibration, which no stage has"),
        (["--plan", "0,9"], "--plan: stage 1: "),
        (["--sampler", "dim"], "--sampler: stage 1: there is no solver 'dim'"),
        (
            ["--ckpt", "none"],
            "--ckpt: none: no such folder; expected a stage of DeepFloyd-IF, see docs/deepfloyd-if.md",
        ),
    ],
)
def test_bad_input(folder, capsys, arguments, why):
    out = folder / "out"
    assert generate.main(["--protocol", str(folder / "if.yaml"), "--out", str(out), "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("generate.py: error: " + why), line
    assert not out.exists()


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"plans": ["off"]}, "cascade.plans: expected one for each of 2 or 3 stages; got 1"),
        ({"scales": [4.0]}, "cascade.scales: expected 2, from stage 2 on; got [4.0]"),
        ({"steps": {9: [3, 3, 2]}}, "cascade.steps: expected 3 numbers whose sum is 9; got [3, 3, 2]"),
    ],
)
def test_a_protocol_whose_stages_do_not_go_together(files, tmp_path, changes, why):
    write_of(tmp_path, files, cascade=CASCADE | changes)
    with pytest.raises(ValueError) as error:
        load_protocol(str(tmp_path / "if.yaml"))
    assert why in str(error.value)
