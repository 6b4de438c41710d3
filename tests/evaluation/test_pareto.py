"""Quality against both costs: rows, fronts, and the command with and without a dataset, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.figures import main, parser
from evaluation.plots.pareto import Row, front, plot, read_rows, table
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
    shipped = read_rows(parser().parse_args(["pareto"]).rows, 50)
    assert len(shipped) == len(set(map(str, shipped))) > 25


@pytest.mark.parametrize(
    "text, why",
    [
        ("rows: 3", "rows must be a list with a row or more"),
        ("other: []", "has no rows"),
        ("rows: []", "rows must be"),
        ("a: [", ""),
        ("rows: [3]", "row 1 must be a mapping"),
        ("rows: [{steps: 3}]", "row 1 has no family"),
        ("rows: [{family: a, stepz: 3}]", "row 1 has stepz"),
        ("rows: [{family: a, steps: []}]", "steps is an empty list"),
        ("rows: [{family: a, plan: off}]", "plan must be a text, 'off' in quotes"),
        ("rows: [{family: a, label: '{stepz}'}]", "label may have"),
        ("rows: [{family: a, steps: [5, few]}]", "steps must be"),
        ("rows: [{family: a, steps: true}]", "steps must be"),
        ("rows: [{family: a, steps: 0}]", "steps must be"),
        ("rows: [{family: a, propagate: {a: 1}}]", "propagate must be"),
        ("rows: [{family: a, noise_weight: -1}]", "noise_weight must be a number >= 0"),
        ("rows: [{family: a, noise_weight: .nan}]", "noise_weight must be a number >= 0"),
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
        vars(Row("a", steps, label="{steps} steps")) | {"macs_share": steps / 50, "mse_latents": error}
        for steps, error in ((10, 0.3), (20, 0.4), (25, 0.1), (50, 0.0))
    ]
    axes = Figure().subplots()
    plot(axes, rows, "macs_share")
    marks, line = axes.lines
    assert [*zip(*marks.get_data(), strict=True)] == [(20, 0.3), (40, 0.4), (50, 0.1)]  # no place for 0
    assert [*zip(*line.get_data(), strict=True)] == [(20, 0.3), (50, 0.1)]  # 40 % is no gain over 20 %
    assert {note.get_text(): note.xy for note in axes.texts} == {
        "10 steps": (20, 0.3),
        "20 steps": (40, 0.4),
        "25 steps": (50, 0.1),
    }


def test_a_table_has_a_column_for_each_measure_that_there_is():
    values = {"macs_share": 0.5, "mse_latents": 0.1, "psnr": None}
    assert [*table({"a": values})][::2] == ["| how | MACs | latents' MSE | PSNR |", "| a | 50% | 0.10000 |  |"]


def test_any_model_has_both_costs_and_the_distances_from_its_plain_run(tmp_path, capsys):
    """The plain run has no distance; MACs are in proportion; a run that was stopped goes on."""
    config, ckpt = write_model(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    (rows := tmp_path / "rows.yaml").write_text(ROWS)
    arguments = [
        "pareto",
        "--config",
        str(config),
        "--ckpt",
        str(ckpt),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--rows",
        str(rows),
        "--count",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    first = read(tmp_path / "pareto.json")
    assert [*first] == ["ddim 50", "ddim 5"]
    assert "no calibration for auto:5" in (tmp_path / "pareto.md").read_text()
    rows.write_text("rows:\n- {family: paper, plan: '0,10,30', guidance_reuse: true}\n")
    assert main(arguments) == 0
    assert {name: values for name, values in read(tmp_path / "pareto.json").items() if name in first} == first
    plain, few, reused = read(tmp_path / "pareto.json").values()
    assert plain["mse_latents"] == 0 and plain["psnr"] is None and plain["ssim"] == pytest.approx(1)
    assert plain["macs_share"] == plain["critical_share"] == 1
    assert few["macs_share"] == few["critical_share"] == pytest.approx(0.1, rel=0.01)  # keys and values once in each
    assert reused["critical_share"] == pytest.approx(3 / 50, rel=0.02) and 0.3 < reused["macs_share"] < 0.6
    assert 0 < few["mse_latents"] and 0 < reused["mse_latents"]
    lines = (tmp_path / "pareto.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| ddim")][0].startswith("| ddim 50, 0,10,30, guidance reused |")
    assert "Fréchet" not in lines[2] and "Fréchet" not in lines[0]
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "is of another run" in error


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[list[str], dict, str]:
    """A run of a tiny model: its arguments but --rows and --out; what it wrote; its rows."""
    config, ckpt = write_model(folder := tmp_path_factory.mktemp("tiny"))
    config.write_text(config.read_text().replace("scale: 3.0", "scale: 3"))
    (folder / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    (folder / "plan.yaml").write_text("source: a test\nsteps: {4: [0, 2]}\n")
    rows = f"rows:\n- {{family: fewer, steps: 1}}\n- {{family: plan, plan: '{folder / 'plan.yaml'}'}}\n"
    arguments = [
        "pareto",
        "--config",
        str(config),
        "--ckpt",
        str(ckpt),
        "--prompts",
        str(folder / "prompts.txt"),
        "--steps",
        "4",
        "--count",
        "1",
    ]
    assert go_on(arguments, folder, rows) == 0
    return arguments, json.loads((folder / "pareto.json").read_text()), rows


def go_on(arguments: list[str], folder: Path, rows: str, record: dict | None = None) -> int:
    """The exit code of the command with these rows in this folder, where the record was left by a run."""
    (folder / "rows.yaml").write_text(rows)
    if record is not None:
        (folder / "pareto.json").write_text(json.dumps(record))
    return main([*arguments, "--rows", str(folder / "rows.yaml"), "--out", str(folder)])


def marked(record: dict, **values) -> dict:
    """The record with other values in all of its rows."""
    return record | {"values": {"rows": {name: row | values for name, row in record["values"]["rows"].items()}}}


def test_rows_that_are_kept_are_drawn_without_a_run(finished, tmp_path):
    arguments, record, _ = finished
    rows = "rows:\n- {family: other, steps: 1, label: '{family}'}\n"
    said = [*arguments, "--scale", "3"]  # which the config says, too, but for the type of the number
    assert go_on(said, tmp_path, rows, marked(record, mse_latents=123.0)) == 0
    assert "123.00000" in (tmp_path / "pareto.md").read_text()
    assert read(tmp_path / "pareto.json")["ddim 1"]["family"] == "other"


def test_a_row_whose_plan_is_another_one_is_measured_again(finished, tmp_path):
    arguments, record, rows = finished
    assert [row["resolved"]["keys"] for row in record["values"]["rows"].values()] == [None, [0, 2]]
    stale = marked(record, mse_latents=123.0)
    stale["values"]["rows"][[*stale["values"]["rows"]][1]]["resolved"] = {"keys": [0, 1], "propagate": "hold"}
    assert go_on(arguments, tmp_path, rows, stale) == 0
    kept, anew = read(tmp_path / "pareto.json").values()
    assert kept["mse_latents"] == 123 and anew == [*record["values"]["rows"].values()][1]


@pytest.mark.parametrize(
    "flag, value, differs",
    [
        ("--precision", "autocast", "precision"),
        ("--steps", "5", "steps"),
        ("--weights", "raw", "averaged"),
        ("--config", "other", "config"),
    ],
)
def test_rows_of_another_run_are_not_gone_on_with(finished, tmp_path, capsys, flag, value, differs):
    arguments, record, rows = finished
    if flag == "--config":
        config = Path(arguments[arguments.index(flag) + 1]).read_text()
        value = str(tmp_path / "config.yaml")
        Path(value).write_text(config.replace("linear_end: 0.012", "linear_end: 0.02"))
    assert go_on([*arguments, flag, value], tmp_path, rows, record) == 2
    error = capsys.readouterr().err
    assert f"is of another run; different: {differs} (" in error and error.count("\n") == 1
    assert json.loads((tmp_path / "pareto.json").read_text()) == record


@pytest.mark.parametrize(
    "kept, why",
    [
        ([], "rows must be a mapping"),
        (None, "rows must be a mapping"),
        ({"a": None}, "row a must be a mapping"),
        ({"a": {}}, "row a: resolved must be"),
        ({"a": {"resolved": {"keys": None}}}, "row a: macs_share must be"),
    ],
)
def test_kept_rows_that_are_not_whole_say_why(finished, tmp_path, capsys, kept, why):
    arguments, record, rows = finished
    assert go_on(arguments, tmp_path, rows, record | {"values": {"rows": kept}}) == 2
    assert (error := capsys.readouterr().err).startswith("figures.py: error: --out: ") and why in error
    assert error.count("\n") == 1


def test_a_dataset_gives_its_captions_and_what_needs_its_pictures(tmp_path, capsys):
    (rows := tmp_path / "rows.yaml").write_text("rows:\n- {family: fewer, steps: 1}\n")
    arguments = [
        "pareto",
        "--rows",
        str(rows),
        "--data",
        str(write_data(tmp_path, side=64)),
        "--steps",
        "2",
        "--out",
        str(tmp_path),
        "--count",
    ]
    assert main([*arguments, "3"]) == 0
    (few,) = read(tmp_path / "pareto.json").values()
    assert few["fid_real"] > 0 and few["feature_distance"] > 0 and 0 <= few["R@5"] <= 1
    assert "Fréchet distance" in (tmp_path / "pareto.md").read_text()
    capsys.readouterr()
    np.save(tmp_path / "pictures.npy", 255 - np.load(tmp_path / "pictures.npy"))
    for count, why in (
        ("20", "--count: "),
        ("1", "--count: a Fréchet distance (--data) needs at least 2"),
        ("2", "different: pictures (3 there, 2 given)"),
        ("3", "different: data"),
    ):
        assert main([*arguments, count]) == 2
        assert why in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_a_row_that_the_network_refuses_is_named(tmp_path, capsys):
    (rows := tmp_path / "rows.yaml").write_text("rows:\n- {family: a, plan: 'deepcache:2:99'}\n")
    assert main(["pareto", "--rows", str(rows), "--steps", "2", "--count", "1", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("figures.py: error: --rows: ddim 2, deepcache:2:99: ") and error.count("\n") == 1


def test_another_figures_file_is_not_written_over(tmp_path, capsys):
    (tmp_path / "pareto.json").write_text('{"values": {}}')
    assert main(["pareto", "--out", str(tmp_path)]) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "no rows of this figure" in error
    assert (tmp_path / "pareto.json").read_text() == '{"values": {}}'


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))["values"]["rows"]
