"""Tables as files: what is wrong with one is said with the file, the row and what is accepted."""

from __future__ import annotations

import math

import pytest
import yaml

from evaluation import tables
from evaluation.table.spec import Row, load_table

GOOD = {
    "title": "t",
    "source": "s",
    "columns": ["fid"],
    "protocol": {"emoji": "emoji64"},
    "rows": [{"label": "a", "steps": 3}],
}
STEPS, PARALLEL = "a whole number in 1..10000", "a whole number in 1..1000000"
A_PROPAGATION = "one of hold, linear, quadratic, zeros"


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
    assert load_table(str(file)).rows == [Row("a", steps=3)]
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


@pytest.mark.parametrize(
    "change, why",
    [
        ({"rows": []}, "rows must be a list with a row or more; got []"),
        ({"rows": 3}, "rows must be a list with a row"),
        ({"rows": ["a"]}, "row 1 must be a mapping; got 'a'"),
        ({"rows": [{"steps": 3}]}, "row 1 has no label"),
        ({"rows": [{"label": "a", "stepz": 3}]}, "row 1 has stepz; accepted: "),
        ({"rows": [{"label": "a"}, {"label": "a"}]}, "two rows are called 'a'"),
        ({"columns": ["fud"]}, "there is no column 'fud'; accepted: fid, clip_score"),
        ({"columns": "fid"}, "columns must be a list of columns, each once; got 'fid'"),
        ({"columns": ["fid", "fid"]}, "columns must be a list of columns, each once; got ['fid', 'fid']"),
        ({"columns": [["fid"]]}, "columns must be a list of columns"),
        ({"columns": []}, "columns must be a list"),
        ({"protocol": {"moon": "emoji64"}}, "protocol has moon; accepted: coco, emoji"),
        ({"protocol": {"emoji": 4}}, "protocol.emoji must be a text; got 4"),
        ({"protocol": 3}, "protocol must be a mapping; got 3"),
        ({"note": 4}, "note must be a text; got 4"),
        ({"apart": {"recall": "why"}}, "apart has recall; accepted: fid"),
        ({"apart": {"fid": 3}}, "apart.fid must be a text; got 3"),
        ({"title": " "}, "title must be a text; got ' '"),
        ({"source": None}, "source must be a text; got None"),
        ({"rows": [{"label": 4}]}, "4: label must be a text; got 4"),
        ({"rows": [{"label": "a", "group": 4}]}, "4: a: group must be a text; got 4"),
    ],
    ids=str,
)
def test_faulty_tables_say_why(tmp_path, capfd, change, why):
    assert refused(tmp_path, capfd, change).startswith(why)


@pytest.mark.parametrize(
    "name, value, accepted",
    [
        *(("steps", value, STEPS) for value in (0, 2.0, True, "3", 10001)),
        ("parallel", 2**32, PARALLEL),
        *(("tome", value, "a number in 0..0.75") for value in ("high", 0.8, math.nan)),
        *(("eta", value, "a number in 0..1") for value in (True, -0.1)),
        *(("noise_weight", value, "a number >= 0") for value in (-1, math.inf)),
        ("noise_below", math.nan, "a finite number"),
        *(("propagate", value, A_PROPAGATION) for value in ("cubic", [])),
        ("noise_order", "soon", "one of before, after, update"),
        ("plain", "no", "true or false"),
        ("plain", 1, "true or false"),
        *(("plan", value, "a text, 'off' in quotes, which YAML takes for no") for value in (False, 4)),
        *((name, 4, "a text") for name in ("missing", "costs_only", "sampler")),
        ("paper", [3], "a mapping"),
        ("protocol", 3, "a mapping"),
    ],
    ids=str,
)
def test_faulty_fields_of_a_row(tmp_path, capfd, name, value, accepted):
    line = refused(tmp_path, capfd, {"rows": [{"label": "good"}, {"label": "a", name: value}]})
    assert line == f"a: {name} must be {accepted}; got {value!r}"


@pytest.mark.parametrize(
    "field, content, why",
    [
        ("paper", {"recall": 3}, "paper has recall, which is not among the columns"),
        ("paper", {"fud": 3}, "paper has fud; accepted: "),
        *(
            ("paper", {"fid": value}, f"paper.fid must be a finite number; got {value!r}")
            for value in ("low", math.nan, True)
        ),
        ("protocol", {"emoji": 4}, "protocol.emoji must be a text or null; got 4"),
    ],
    ids=str,
)
def test_faulty_numbers_and_protocols_of_a_row(tmp_path, capfd, field, content, why):
    row = {"group": "g", "label": "a", field: content}
    assert refused(tmp_path, capfd, {"rows": [row]}).startswith(f"g: a: {why}")
