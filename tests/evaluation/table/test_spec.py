"""Tables as files: what is wrong with one is said with the file, the row and what is accepted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from evaluation import generate, tables
from evaluation.protocols.protocol import load_protocol
from evaluation.runs.generate import plan_of, recipe_of
from evaluation.table.spec import Row, load_table
from tests.helpers.paths import ROOT

GOOD = {
    "title": "t",
    "source": "s",
    "columns": ["fid"],
    "protocol": {"emoji": "emoji64"},
    "rows": [{"label": "a", "steps": 3}],
}


def refused(tmp_path, capfd, change) -> str:
    """What is said of the good table with a change."""
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(GOOD | change))
    assert tables.main([str(file), "--world", "emoji", "--show", "--runs", str(tmp_path / "runs")]) == 2
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    start = f"tables.py: error: TABLE: {file}: not a table: "
    assert output.out == "" and line.startswith(start)
    return line.removeprefix(start)


def test_a_good_table(tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert load_table(str(file)).rows == [Row(label="a", steps=3)]
    row = {
        "label": "a",
        "plan": "0,2",
        "tome": 0,
        "eta": 1,
        "noise_weight": 0.5,
        "noise_below": -3,
        "steps": None,
        "missing": None,
        "group": "g",
        "protocol": {"emoji": None},
        "paper": {"fid": 3},
    }
    file.write_text(yaml.safe_dump(GOOD | {"rows": [row], "note": ""}))
    assert load_table(str(file)).rows == [Row(**row)]


def test_a_rows_steps_may_begin_where_it_says():
    """Its command makes the same method; there are as many steps as timesteps, unless it says otherwise."""
    protocol = load_protocol("emoji64")
    for given, steps in (({"timesteps_at": [900, 500, 100]}, 3), ({"spacing": "karras", "steps": 7}, 7)):
        row = Row(label="a", sampler="unipc", plan="uniform:2", **given)
        _, method = generate.asked(generate.parser().parse_args(["--protocol=emoji64", *row.flags()]))
        assert method == row.method(protocol) and method.steps == steps
        recipe = recipe_of(protocol, method)
        assert recipe.settings().items() >= given.items()
        assert plan_of(recipe, method, Path("model.ckpt")).num_nodes == steps


@pytest.mark.parametrize("model", ["emoji128", "emoji128-class"])
def test_what_a_model_has_to_show_is_a_table(model):
    table = load_table(str(ROOT / "models" / "ldm" / model / f"table-{model}.yaml"))
    for row in table.rows_in("emoji"):
        protocol = load_protocol(table.protocol_of(row, "emoji"))
        method = row.method(protocol)
        assert plan_of(recipe_of(protocol, method), method, Path("model.ckpt")).num_nodes >= row.steps


@pytest.mark.parametrize(
    "change, why",
    [
        ({"rows": []}, "rows should have at least 1 item"),
        ({"rows": 3}, "rows should be a valid list; got 3"),
        ({"rows": ["a"]}, "rows.0 should be a mapping; got 'a'"),
        ({"rows": [{"steps": 3}]}, "rows.0.label is missing"),
        ({"rows": [{"label": "a", "stepz": 3}]}, "rows.0 has 'stepz'; accepted: "),
        ({"rows": [{"label": "a"}, {"label": "a"}]}, "rows has 'a' twice"),
        ({"columns": ["fud"]}, "columns.0 should be 'fid', 'clip_score', "),
        ({"columns": "fid"}, "columns should be a valid list; got 'fid'"),
        ({"columns": ["fid", "fid"]}, "columns has 'fid' twice"),
        ({"columns": [["fid"]]}, "columns.0 should be 'fid', 'clip_score', "),
        ({"columns": []}, "columns should have at least 1 item"),
        ({"protocol": {"moon": "emoji64"}}, "protocol.moon.[key] should be 'coco' or 'emoji'; got 'moon'"),
        ({"protocol": {"emoji": 4}}, "protocol.emoji should be a valid string; got 4"),
        ({"protocol": 3}, "protocol should be a mapping; got 3"),
        ({"note": 4}, "note should be a valid string; got 4"),
        ({"apart": {"recall": "why"}}, "apart has recall, which is not among the columns"),
        ({"apart": {"fid": 3}}, "apart.fid should be a valid string; got 3"),
        ({"title": " "}, "title should have at least 1 character; got ' '"),
        ({"source": None}, "source should be a valid string; got None"),
        ({"rows": [{"label": 4}]}, "rows.0.label should be a valid string; got 4"),
        ({"rows": [{"label": "a", "group": 4}]}, "rows.0.group should be a valid string; got 4"),
    ],
    ids=str,
)
def test_faulty_tables_say_why(tmp_path, capfd, change, why):
    assert refused(tmp_path, capfd, change).startswith(why)


@pytest.mark.parametrize(
    "name, value, accepted",
    [
        *(("steps", value, "be a valid integer") for value in (2.0, True, "3")),
        ("steps", 0, "be greater than or equal to 1"),
        ("steps", 10001, "be less than or equal to 10000"),
        ("parallel", 2**32, "be less than or equal to 1000000"),
        ("tome", "high", "be a valid number"),
        ("tome", 0.8, "be less than or equal to 0.75"),
        ("tome", math.nan, "be a finite number"),
        ("eta", True, "be a valid number"),
        *((name, -0.1, "be greater than or equal to 0") for name in ("eta", "noise_weight")),
        ("noise_weight", math.inf, "be a finite number"),
        ("noise_below", math.nan, "be a finite number"),
        (
            "propagate",
            "linear:sigma",
            "be a forecaster: a forecaster is NAME[:AXIS][:QUANTITY], with the axis one of timestep, logsnr, step and "
            "the quantity one of v, eps, x0",
        ),
        ("propagate", [], "be a valid string"),
        ("noise_order", "soon", "be 'before', 'after' or 'update'"),
        ("spacing", "even", "be 'time', 'logsnr', 'karras' or 'quad'"),
        ("timesteps_at", [], "have at least 1 item after validation, not 0"),
        *(("plain", value, "be a valid boolean") for value in ("no", 1)),
        ("plan", False, "be a text: in YAML off, on, yes and no need quotes"),
        *((name, 4, "be a valid string") for name in ("plan", "missing", "costs_only", "sampler")),
        *((name, [3], "be a mapping") for name in ("paper", "protocol")),
    ],
    ids=str,
)
def test_faulty_fields_of_a_row(tmp_path, capfd, name, value, accepted):
    line = refused(tmp_path, capfd, {"rows": [{"label": "good"}, {"label": "a", name: value}]})
    assert line == f"rows.1.{name} should {accepted}; got {value!r}"


@pytest.mark.parametrize(
    "field, content, why",
    [
        ("paper", {"recall": 3}, "g: a has recall, which is not among the columns"),
        ("paper", {"fud": 3}, "rows.0.paper.fud.[key] should be 'fid', "),
        ("paper", {"fid": "low"}, "rows.0.paper.fid.float should be a valid number; got 'low'"),
        ("paper", {"fid": math.nan}, "rows.0.paper.fid.float should be a finite number; got nan"),
        ("paper", {"fid": True}, "rows.0.paper.fid.float should be a valid number; got True"),
        ("protocol", {"emoji": 4}, "rows.0.protocol.emoji should be a valid string; got 4"),
    ],
    ids=str,
)
def test_faulty_numbers_and_protocols_of_a_row(tmp_path, capfd, field, content, why):
    row = {"group": "g", "label": "a", field: content}
    assert refused(tmp_path, capfd, {"rows": [row]}).startswith(why)
