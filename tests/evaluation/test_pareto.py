"""Quality against both costs: rows, fronts, and the command with and without a dataset, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.figures import ROWS as SHIPPED
from evaluation.figures import main
from evaluation.plots.pareto import front, plot, table
from evaluation.plots.rows import Row, read_rows
from tests.helpers.tiny_data import write_data
from tests.helpers.tiny_models import WORDS, write_model

ROWS = (
    "rows:\n- {family: plain}\n- {family: fewer, steps: 5, label: '{steps} steps'}\n"
    "- {family: calibrated, plan: 'auto:5'}\n"
)


def test_lists_in_a_row_are_rows(tmp_path):
    file = tmp_path / "rows.yaml"
    file.write_text(
        "rows:\n- {family: a, steps: [5, 10], plan: ['off', 'uniform:2']}\n- {family: b, noise_weight: 0.1}\n"
    )
    rows = read_rows(str(file), 40)
    assert [(row.family, row.steps, row.plan) for row in rows] == [
        ("a", 5, "off"),
        ("a", 5, "uniform:2"),
        ("a", 10, "off"),
        ("a", 10, "uniform:2"),
        ("b", 40, "off"),
    ]
    assert len(set(map(str, rows))) == 5 and "prior noise 0.1" in str(rows[-1])
    shipped = read_rows(str(SHIPPED), 50)
    assert len(shipped) == len(set(map(str, shipped))) > 25


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


def test_a_front_is_what_no_cheaper_point_equals():
    assert front([(54, 8.0), (44, 5.0), (32, 28.0), (58, 1.0)]) == [(32, 28.0), (44, 5.0), (58, 1.0)]
    assert front([(78, 3.0), (78, 1.0), (78, 2.0)]) == [(78, 1.0)]
    assert front([]) == []


def test_every_row_with_an_error_is_drawn_at_its_numbers_with_its_label():
    rows = [
        dict(Row(family="a", steps=steps, label="{steps} steps")) | {"macs_share": steps / 50, "mse_latents": error}
        for steps, error in ((10, 0.3), (20, 0.4), (25, 0.1), (50, 0.0))
    ]
    axes = Figure().subplots()
    plot(axes, rows, "macs_share")
    marks, line = axes.lines
    assert [*zip(*marks.get_data(), strict=True)] == [(20, 0.3), (40, 0.4), (50, 0.1)]  # a logarithmic axis has no 0
    assert [*zip(*line.get_data(), strict=True)] == [(20, 0.3), (50, 0.1)]  # 40 % is no gain over 20 %
    assert {note.get_text(): note.xy for note in axes.texts} == {
        "10 steps": (20, 0.3),
        "20 steps": (40, 0.4),
        "25 steps": (50, 0.1),
    }


def test_a_table_has_a_column_for_each_measure_that_there_is():
    values = {"macs_share": 0.5, "mse_latents": 0.1, "psnr": None}
    assert [*table({"a": values})][::2] == ["| method | MACs | latents' MSE | PSNR |", "| a | 50% | 0.10000 |  |"]


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
    assert "no calibration for auto:5" in lines[0]
    assert "Fréchet" not in lines[2] and "Fréchet" not in lines[0]


def write_tiny(folder: Path) -> list[str]:
    """A tiny model in the folder; the arguments that draw rows of it."""
    config, ckpt = write_model(folder)
    (folder / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return ["--config", str(config), "--ckpt", str(ckpt), "--prompts", str(folder / "prompts.txt")]


def draw(arguments: list[str], folder: Path, rows: str) -> int:
    """The exit code of the command with these rows in this folder."""
    (folder / "rows.yaml").write_text(rows)
    return main(["pareto", *arguments, "--rows", str(folder / "rows.yaml"), "--out", str(folder)])


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
    for file in (folder / "pareto-rows").iterdir():
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
    assert draw(arguments, tmp_path, PLANS.format(tmp_path / "plan.yaml")) == 0
    kept, anew = read(tmp_path)
    assert kept["mse_latents"] == 123 != anew["mse_latents"] > 0 and anew["resolved"]["keys"] == [0, 1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"values": 3}'])
def test_a_damaged_row_is_measured_again(finished, tmp_path, content):
    arguments, folder = finished
    marked(folder, tmp_path)
    for file in (tmp_path / "pareto-rows").iterdir():
        file.write_text(content)
    assert draw(arguments, tmp_path, PLANS.format(folder / "plan.yaml")) == 0
    assert read(tmp_path) == read(folder)


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
    assert draw([*arguments, *flags], tmp_path, "rows:\n- {family: fewer, steps: 1}\n") == 0
    assert [row["mse_latents"] for row in read(tmp_path)] != [123.0]
    assert before < {*(tmp_path / "pareto-rows").iterdir()}


def test_a_stopped_run_goes_on(finished, tmp_path, capsys):
    """The rows before the one that fails are kept."""
    arguments, folder = finished
    rows = "rows:\n- {family: fewer, steps: 1}\n- {family: a, plan: 'deepcache:2:99'}\n"
    assert draw(arguments, tmp_path, rows) == 2
    error = capsys.readouterr().err
    assert error.startswith("figures.py: error: --rows: ddim 4, deepcache:2:99: ") and error.count("\n") == 1
    assert len([*(tmp_path / "pareto-rows").iterdir()]) == 1 and not (tmp_path / "pareto.json").exists()


def test_a_dataset_gives_prompts_and_real_images(tmp_path, capsys):
    data = write_data(tmp_path, side=64)
    arguments = ["--data", str(data), "--steps", "2", "--count"]
    rows = "rows:\n- {family: fewer, steps: 1}\n"
    assert draw([*arguments, "3"], tmp_path, rows) == 0
    (few,) = read(tmp_path)
    assert few["fid_real"] > 0 and few["feature_distance"] > 0 and 0 <= few["R@5"] <= 1
    assert "Fréchet distance" in (tmp_path / "pareto.md").read_text()
    np.save(data / "pictures.npy", 255 - np.load(data / "pictures.npy"))
    assert draw([*arguments, "3"], tmp_path, rows) == 0
    (other,) = read(tmp_path)
    assert other["fid_real"] != few["fid_real"] and other["mse_latents"] == few["mse_latents"]
    capsys.readouterr()
    for count, why in (
        ("20", "has 19 captions; got 20"),
        ("1", "a Fréchet distance (--data) needs at least 2 images; got 1"),
    ):
        assert draw([*arguments, count], tmp_path, rows) == 2
        assert (error := capsys.readouterr().err).startswith("figures.py: error: --count: ")
        assert why in error and error.count("\n") == 1
