"""Quality against both costs: on the shipped model with a small dataset of its size."""

from __future__ import annotations

import json

import pytest
from tiny_data import write_data

from evaluation import pareto


def test_lists_in_a_row_are_rows(tmp_path):
    file = tmp_path / "rows.yaml"
    file.write_text("rows:\n- {family: a, steps: [5, 10], plan: ['off', 'uniform:2']}\n"
                    "- {family: b, noise_weight: 0.1}\n")
    rows = pareto.read_rows(str(file))
    assert [(row.family, row.steps, row.plan) for row in rows] == [
        ("a", 5, "off"), ("a", 5, "uniform:2"), ("a", 10, "off"), ("a", 10, "uniform:2"), ("b", 50, "off")]
    assert len(set(map(str, rows))) == 5 and "prior noise 0.1" in str(rows[-1])
    shipped = pareto.read_rows(pareto.parser().parse_args([]).rows)
    assert len(shipped) == len(set(map(str, shipped))) > 25


@pytest.mark.parametrize("text", ["rows: 3", "other: []", "rows: [{family: a, stepz: 3}]", "rows: [{steps: 3}]", "a: [",
                                  "rows: [{family: a, plan: off}]"])
def test_faulty_rows_say_why(tmp_path, capsys, text):
    (tmp_path / "rows.yaml").write_text(text)
    assert pareto.main(["--rows", str(tmp_path / "rows.yaml")]) == 2
    error = capsys.readouterr().err
    assert "--rows: " in error and "expected rows as in" in error and error.count("\n") == 1


def test_a_table_and_a_plot_with_both_costs(tmp_path, capsys):
    """The plain run has no distance; an equal share of MACs; and a run that was stopped goes on."""
    rows, out = tmp_path / "rows.yaml", str(tmp_path / "out")
    rows.write_text("rows:\n- {family: plain}\n- {family: fewer, steps: 5}\n")
    arguments = ["--rows", str(rows), "--data", str(write_data(tmp_path, side=64)), "--count", "2", "--out", out]
    assert pareto.main(arguments) == 0
    first = json.loads((tmp_path / "out.json").read_text())["rows"]
    rows.write_text(rows.read_text() + "- {family: paper, plan: '0,10,30', guidance_reuse: true}\n")
    assert pareto.main(arguments) == 0
    measured = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {name: measured[name] for name in first} == first
    plain, few, reused = measured.values()
    assert plain["mse_latents"] == 0 and plain["psnr"] is None and plain["ssim"] == pytest.approx(1)
    assert few["macs"] == few["critical"] and plain["macs"] == plain["critical"]
    assert few["macs"] * 10 == pytest.approx(plain["macs"], rel=0.01)   # keys and values once in each
    assert reused["critical"] * 50 == pytest.approx(3 * plain["critical"], rel=0.02)
    assert 0.3 < reused["macs"] / plain["macs"] < 0.6
    assert 0 < few["mse_latents"] and 0 < reused["mse_latents"] and few["fid_real"] > 0
    table = (tmp_path / "out.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| ddim")]) == 3 and "100%" in table[-3]
    assert (tmp_path / "out.png").stat().st_size > 5000 and (tmp_path / "out.svg").read_text().startswith("<?xml")
    capsys.readouterr()
    assert pareto.main([*arguments, "--seed", "1"]) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "is of another run" in error
