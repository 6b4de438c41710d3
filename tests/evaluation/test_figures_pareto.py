"""evaluation/figures.py pareto: with and without a dataset, stopped and continued."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from evaluation.figures import main, parser
from evaluation.plots import pareto
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import EMOJI64
from ldm.cli.parser import settings_from
from ldm.cli.settings import ModelSettings
from ldm.cli.setup import make_setup
from ldm.cli.tasks import prompts_in
from tests.helpers.tiny_data import write_data
from tests.helpers.tiny_models import WORDS, write_model

ROWS = (
    "rows:\n- {family: plain}\n- {family: fewer, steps: 5, label: '{steps} steps'}\n"
    "- {family: calibrated, plan: ['auto:5', 'skip:auto:5']}\n"
)


@pytest.mark.parametrize(
    "text, why",
    [
        ("rows: 3", "rows should be a valid list; got 3"),
        ("other: []", "has 'other'; accepted: rows"),
        ("rows: []", "rows should have at least 1 item"),
        ("a: [", ""),
        ("rows: [3]", "rows.0 should be a mapping; got 3"),
        ("rows: [{steps: 3}]", "row 1.family is missing"),
        ("rows: [{family: a, stepz: 3}]", "row 1 has 'stepz'; accepted: family, steps"),
        ("rows: [{family: a, steps: []}]", "steps is an empty list"),
        ("rows: [{family: a, plan: off}]", "row 1.plan should be a text: in YAML off, on, yes and no need quotes"),
        ("rows: [{family: a, label: '{stepz}'}]", "label may have"),
        ("rows: [{family: a, steps: [5, few]}]", "steps should be"),
        ("rows: [{family: a, steps: true}]", "steps should be"),
        ("rows: [{family: a, steps: 0}]", "steps should be"),
        ("rows: [{family: a, spacing: even}]", "spacing should be"),
        ("{reference: 0, rows: [{family: a}]}", "reference should be"),
        ("rows: [{family: a, propagate: {a: 1}}]", "propagate should be"),
        ("rows: [{family: a, noise_weight: -1}]", "noise_weight should be"),
        ("rows: [{family: a, noise_weight: .nan}]", "noise_weight should be"),
        ("rows: [{family: a, steps: 3}, {family: b, steps: 3}]", "two rows are 'ddim 3'"),
        ("rows: [{family: a, steps: [3, 3]}]", "two rows are 'ddim 3'"),
    ],
)
def test_faulty_rows_say_why(tmp_path, capsys, text, why):
    (tmp_path / "rows.yaml").write_text(text)
    assert main(["pareto", "--rows", str(tmp_path / "rows.yaml"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--rows: " in error and "not a file of rows as in" in error and why in error and error.count("\n") == 1


def test_any_model_has_both_costs_and_the_distances_from_its_plain_run(tmp_path):
    """The plain run has no distance; MACs are in proportion."""
    arguments = [*write_tiny(tmp_path), "--count", "2"]
    assert draw(arguments, tmp_path, f"{ROWS}- {{family: paper, plan: '0,10,30', guidance_reuse: true}}\n") == 0
    plain, few, reused = read(tmp_path)
    assert plain["mse_latents"] == 0 and plain["psnr"] is None and plain["ssim"] == pytest.approx(1)
    assert plain["macs_share"] == plain["critical_share"] == 1
    assert few["macs_share"] == few["critical_share"] == pytest.approx(0.1, rel=0.01)  # keys and values once in each
    assert reused["critical_share"] == pytest.approx(3 / 50, rel=0.02) and 0.3 < reused["macs_share"] < 0.6
    assert 0 < few["mse_latents"] and 0 < reused["mse_latents"]
    lines = (tmp_path / "pareto.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| ddim")][-1].startswith("| ddim 50, 0,10,30, guidance reused |")
    assert "no calibration for auto:5, skip:auto:5, which" in lines[0]
    assert "Fréchet" not in lines[2] and "Fréchet" not in lines[0]


def test_errors_may_be_those_to_a_finer_run(tmp_path):
    """Each row has the distance from the reference, and its cost in plain runs of --steps."""
    arguments = [*write_tiny(tmp_path), "--count", "2", "--steps", "10"]
    rows = (
        "reference: 20\nrows:\n- {family: plain, steps: [10, 20]}\n"
        "- {family: placed, sampler: unipc, spacing: [time, quad]}\n"
    )
    assert draw(arguments, tmp_path, rows) == 0
    plain, fine, *placed = read(tmp_path)
    assert plain["mse_plain"] == 0 and "mse_plain" not in fine, "a run of other steps"
    assert fine["mse_latents"] == 0 < plain["mse_latents"] and fine["macs_share"] == pytest.approx(2, rel=0.01)
    assert placed[0]["mse_latents"] != placed[1]["mse_latents"]
    text = (tmp_path / "pareto.md").read_text()
    assert "to 20 steps of DDIM" in text and "| unipc 10 quad |" in text


def test_fresh_noise_is_compared_with_the_plain_run_that_shares_it(tmp_path):
    arguments = [*write_tiny(tmp_path), "--count", "1", "--steps", "4"]
    rows = "reference: 8\nrows:\n- {family: noise, eta: 1, steps: [4, 2]}\n"
    rows += "- {family: noise, eta: 1, plan: ['0,2', 'skip:2']}\n"
    assert draw(arguments, tmp_path, rows) == 0
    plain, fewer, plan, skip = read(tmp_path)
    assert skip["resolved"]["propagate"] == "linear:timestep:x0", "plans know of the noise"
    assert plain["mse_latents"] == plain["mse_plain"] == 0 < plan["mse_latents"] == plan["mse_plain"]
    assert fewer["mse_latents"] is None and "| ddim 2, eta 1 |" in (tmp_path / "pareto.md").read_text()
    kept = [*(tmp_path / "pareto-rows").glob("*.npz")]
    assert len(kept) == 4, "a batch of each row"
    for file in kept:
        file.write_bytes(b"damaged")
    for file in (tmp_path / "pareto-rows").glob("*.json"):
        file.unlink()
    assert draw(arguments, tmp_path, rows) == 0 and read(tmp_path) == [plain, fewer, plan, skip]


def test_a_stopped_run_keeps_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(pareto, "BATCH", 1)
    arguments, rows = [*write_tiny(tmp_path), "--count", "2", "--steps", "4"], "rows:\n- {family: plan, plan: '0,2'}\n"
    whole = values(arguments, tmp_path, rows)
    for file in (tmp_path / "pareto-rows").glob("*.json"):
        file.unlink()
    first, second = ([*(tmp_path / "pareto-rows").glob(f"*.{k}.npz")] for k in (0, 1))
    assert len(first) == len(second) == 2, "of the row, and of the plain run"
    for file in second:
        file.unlink()
    before = {file: file.stat().st_ino for file in first}
    assert values(arguments, tmp_path, rows) == whole
    assert {file: file.stat().st_ino for file in first} == before and all(file.exists() for file in second)


def write_tiny(folder: Path) -> list[str]:
    """A tiny model in the folder; the arguments that draw rows of it."""
    config, ckpt = write_model(folder)
    (folder / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return ["--config", str(config), "--ckpt", str(ckpt), "--prompts", str(folder / "prompts.txt")]


def draw(arguments: list[str], folder: Path, rows: str) -> int:
    """The exit code of the command with these rows in this folder."""
    (folder / "rows.yaml").write_text(rows)
    return main(["pareto", *arguments, "--rows", str(folder / "rows.yaml"), "--out", str(folder)])


def values(arguments: list[str], folder: Path, rows: str) -> list[dict]:
    """The rows of that command's figure, which is neither laid out nor saved: that takes longer than the rows."""
    (folder / "rows.yaml").write_text(rows)
    args = parser().parse_args(["pareto", *arguments, "--rows", str(folder / "rows.yaml")])
    setup = make_setup(settings_from(args, ModelSettings), EMOJI64)
    experiment = Experiment(setup, prompts_in(args.prompts, "prompts"), args.count, args.seed, args.scale)
    kept = folder / "pareto-rows"
    figure = pareto.draw_pareto(experiment, steps=args.steps, rows=args.rows, data=args.data, cache=kept)
    return [*figure.values["rows"].values()]


def read(folder: Path) -> list[dict]:
    """The rows of the figure in the folder."""
    return [*json.loads((folder / "pareto.json").read_text(encoding="utf-8"))["values"]["rows"].values()]


PLANS = "rows:\n- {{family: fewer, steps: 1}}\n- {{family: plan, plan: '{}'}}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[list[str], Path]:
    """A run of a tiny model: its arguments but --rows and --out; its folder, which has the rows' plan.yaml."""
    arguments = [*write_tiny(folder := tmp_path_factory.mktemp("tiny")), "--steps", "4", "--count", "1"]
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("scale: 3.0", "scale: 3"))
    (folder / "plan.yaml").write_text("source: a test\nsteps: {4: [0, 2]}\n")
    assert draw(arguments, folder, PLANS.format(folder / "plan.yaml")) == 0
    return arguments, folder


def marked(folder: Path, to: Path) -> None:
    """Copy the rows that a run has measured, each with an error of 123 instead of its own."""
    for file in (folder / "pareto-rows").glob("*.json"):
        content = json.loads(file.read_text())
        (to / "pareto-rows").mkdir(exist_ok=True)
        (to / "pareto-rows" / file.name).write_text(
            json.dumps(content | {"values": content["values"] | {"mse_latents": 123.0}})
        )


def test_rows_that_are_measured_are_drawn_without_a_run(finished, tmp_path):
    arguments, folder = finished
    marked(folder, tmp_path)
    same = [*arguments, "--scale", "3"]  # the config's scale, but for the type of the number
    assert draw(same, tmp_path, "rows:\n- {family: other, steps: 1, label: '{family}'}\n") == 0
    assert "123.00000" in (tmp_path / "pareto.md").read_text()
    assert [row["family"] for row in read(tmp_path)] == ["other"]


def test_a_row_whose_plan_has_changed_is_measured_again(finished, tmp_path):
    arguments, folder = finished
    marked(folder, tmp_path)
    (tmp_path / "plan.yaml").write_text("source: a test\nsteps: {4: [0, 1]}\n")
    kept, anew = values(arguments, tmp_path, PLANS.format(tmp_path / "plan.yaml"))
    assert kept["mse_latents"] == 123 != anew["mse_latents"] > 0 and anew["resolved"]["keys"] == [0, 1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"values": 3}'])
def test_a_damaged_row_is_measured_again(finished, tmp_path, content):
    arguments, folder = finished
    marked(folder, tmp_path)
    for file in (tmp_path / "pareto-rows").iterdir():
        file.write_text(content)
    assert values(arguments, tmp_path, PLANS.format(folder / "plan.yaml")) == read(folder)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "autocast"],
        ["--steps", "5"],
        ["--weights", "raw"],
        ["--seed", "1"],
        ["--scale", "2"],
        ["--count", "2"],
        ["--config"],
    ],
)
def test_another_run_measures_its_own_rows(finished, tmp_path, flags):
    """The rows of both runs are kept."""
    arguments, folder = finished
    marked(folder, tmp_path)
    if flags == ["--config"]:
        (tmp_path / "config.yaml").write_text(
            (folder / "config.yaml").read_text().replace("linear_end: 0.012", "linear_end: 0.02")
        )
        flags = ["--config", str(tmp_path / "config.yaml")]
    before = {*(tmp_path / "pareto-rows").iterdir()}
    (row,) = values([*arguments, *flags], tmp_path, "rows:\n- {family: fewer, steps: 1}\n")
    assert row["mse_latents"] != 123
    assert before < {*(tmp_path / "pareto-rows").iterdir()}


def test_a_stopped_run_goes_on(finished, tmp_path, capsys):
    """The rows before the one that fails are kept."""
    arguments, folder = finished
    rows = "rows:\n- {family: fewer, steps: 1}\n- {family: a, plan: 'deepcache:2:99'}\n"
    assert draw(arguments, tmp_path, rows) == 2
    error = capsys.readouterr().err
    assert error.startswith("figures.py: error: --rows: ddim 4, deepcache:2:99: ") and error.count("\n") == 1
    assert len([*(tmp_path / "pareto-rows").glob("*.json")]) == 1 and not (tmp_path / "pareto.json").exists()


def test_a_dataset_gives_prompts_and_real_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pareto, "MANY", 3)
    monkeypatch.setattr(pareto, "RESAMPLES", 2)
    data = write_data(tmp_path, side=64)
    arguments = ["--data", str(data), "--steps", "2", "--count"]
    rows = "rows:\n- {family: fewer, steps: 1}\n"
    assert draw([*arguments, "3"], tmp_path, rows) == 0
    (few,) = read(tmp_path)
    low, high = few["fid_real_interval"]
    assert 0 < low < few["fid_real"] < high and few["feature_distance"] > 0
    assert 0 <= few["R@5_interval"][0] <= few["R@5"] <= few["R@5_interval"][1] <= 1
    assert re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \| \d", (tmp_path / "pareto.md").read_text())
    np.save(data / "pictures.npy", 255 - np.load(data / "pictures.npy"))
    assert draw([*arguments, "3"], tmp_path, rows) == 0
    (other,) = read(tmp_path)
    assert other["fid_real"] != few["fid_real"] and other["mse_latents"] == few["mse_latents"]
    capsys.readouterr()
    assert draw([*arguments, "20"], tmp_path, rows) == 2
    assert (error := capsys.readouterr().err).startswith("figures.py: error: --count: ")
    assert "has 19 captions; got 20" in error and error.count("\n") == 1
    assert draw([*arguments, "1"], tmp_path, rows) == 0
    text = (tmp_path / "pareto.md").read_text()
    assert "retrieval are left out: they need 3 images" in text and "R@5" not in text
