"""evaluation/recognition.py on a tiny model and dataset."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evaluation import recognition
from evaluation.metrics import extractors
from evaluation.metrics.retrieval import SPLITS
from evaluation.recognition import main
from ldm.checkpoint import load_state
from ldm.data import emoji
from tests.helpers.paths import ROOT
from tests.helpers.processes import quick_help
from tests.helpers.tiny_data import SIDE, STYLES, write_data
from tests.helpers.tiny_models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(model, data, lite0, monkeypatch):
    """Run the command line in this process on the tiny model and dataset, four steps, with the network loaded once."""
    monkeypatch.setitem(extractors.EXTRACTORS, "efficientnet-lite0", lambda weights, resize: lite0)

    def run(*arguments: str) -> int:
        return main(
            ["--data", str(data), "--config", str(model[0]), "--ckpt", str(model[1]), "--steps", "4", *arguments]
        )

    return run


def test_run_reports_all_three_and_does_not_depend_on_the_batch(call, tmp_path, capsys):
    sheet = tmp_path / "grid.png"
    assert call("--count", "6", "--out", str(tmp_path / "a.json"), "--images", str(sheet)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["generated", "reconstructed", "real", "score"]
    assert call("--count", "6", "--batch-size", "4", "--out", str(tmp_path / "b.json")) == 0

    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert one["real_set"] == {"pictures": 20, "concepts": 4}
    assert [one["results"][name]["n"] for name in ("generated", "reconstructed", "real")] == [6, 6, 20]
    assert one["results"] == other["results"] and -100 < one["results"]["generated"]["score"]["mean"] < 100
    assert one["settings"]["sampling"]["steps"] == 4 and one["settings"]["sampling"]["scale"] == 3.0
    assert {*one["settings"]["sha256"]} == {"pictures", "captions", "features", "config", "ckpt", "encoder"}
    assert {*one["results"]["real"]["R@5 by category"]} == {"even", "odd"}
    assert len({p["concept"] for p in one["pictures"]}) == 4
    assert all(p["caption"].endswith("style") and len(p["found"]) == 5 for p in one["pictures"])
    assert Image.open(sheet).width == 6 * (SIDE + 2) + 2


def test_a_models_files_are_those_of_a_run_of_main(call, model, tmp_path):
    run = tmp_path / "logs"
    run.mkdir()
    shutil.copy(model[0], run / "config.yaml")
    torch.save({"state_dict": load_state(model[1])}, run / "last.ckpt")
    assert call("--count", "2", "--config", str(run), "--ckpt", str(run), "--out", str(tmp_path / "a.json")) == 0
    assert json.loads((tmp_path / "a.json").read_text())["settings"]["ckpt"] == "logs/last.ckpt"


def test_splits_are_those_of_the_dataset():
    assert recognition.SPLITS == SPLITS and {*SPLITS} == {*emoji.SPLITS}


def test_held_out_split_and_no_model(call, data, tmp_path):
    assert call("--count", "9", "--split", "heldout_pair", "--out", str(tmp_path / "h.json")) == 0
    assert [p["caption"] for p in json.loads((tmp_path / "h.json").read_text())["pictures"]] == [
        "a thing 3, openmoji style"
    ]
    assert main(["--data", str(data), "--count", "0", "--ckpt", "none", "--out", str(tmp_path / "o.json")]) == 0
    alone, beside = (json.loads((tmp_path / name).read_text())["results"] for name in ("o.json", "h.json"))
    assert alone == {"real": beside["real"]}


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--data", "nowhere"], "--data: .*nowhere.* is missing; make the dataset with"),
        (["--split", "heldout_concept"], "--data: .* 0 images in heldout_concept, the real set has 20"),
        (["--max-tier", "3"], "--real-tier: must be at least 3, the tier of the captions.*; got 2"),
        (["--config", "none.yaml"], "--config: none.yaml: no such file"),
        (["--ckpt", "none.safetensors"], "--ckpt: none.safetensors: no such file"),
        (["--sampler", "warp"], "--sampler: there is no solver 'warp'; accepted: ddim"),
        (["--plan", "0,1,90"], "--plan: .*past the last node"),
        (["--steps", "2000"], "--steps: .*1..1000.*; got 2000"),
        (["--count", "-1"], "--count: expected a whole number in 0..1000000; got '-1'"),
        (["--scale", "nan"], "--scale: expected a finite number"),
        (["--count", "0", "--images", "x.png"], "--images: with --count 0 no images are sampled"),
        (["--count", "0", "--pictures", "x.png"], "--images: with --count 0 no images are sampled"),
        (["--out", "."], "--out: can't write"),
        (["--split", "test"], "--split: invalid choice"),
    ],
)
def test_bad_input_is_one_line(call, capsys, arguments, why):
    assert call(*arguments) == 2
    assert_one_line(capsys.readouterr().err, why)


def test_weights_and_images_must_fit_the_config(call, capsys, tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert call("--ckpt", str(tmp_path / "other.safetensors")) == 2
    assert_one_line(capsys.readouterr().err, "--ckpt: .*other.safetensors: keys do not match the config")
    assert call("--data", str(write_data(tmp_path, side=32))) == 2
    assert_one_line(capsys.readouterr().err, "--config: .* have 16 px; the dataset's have 32")


def assert_one_line(err: str, why: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1 and re.search("^recognition.py: error: " + why, lines[0]), err


def test_help_answers_at_once():
    assert "--max-tier" in quick_help(ROOT / "evaluation" / "recognition.py")


def test_common_prompts_are_in_the_five_styles():
    prompts = (ROOT / "models/ldm/emoji64/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 40
    assert Counter(p.split(", ")[1] for p in prompts) == {f"{style} style": 8 for style in STYLES}
