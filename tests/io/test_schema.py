"""What a file holds is taken as it stands, or refused in one line that names the value."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from ldm.io.files import AboveZero, Count, NotNegative, Number, Schema, Seed, Share, Text, check_names, parse


class Part(Schema):
    name: Text = "a"
    kind: Literal["one", "two"] = "one"
    share: Share | None = None


class Whole(Schema):
    count: Count
    part: Part = Part()
    parts: list[Part] = []
    more: dict[str, Any] = {}


def test_a_file_becomes_a_schema():
    whole = parse(
        Whole, {"count": 3, "part": {"name": " b ", "share": 1}, "parts": [{"kind": "two"}], "more": {"x": 1}}
    )
    assert (whole.count, whole.part.name, whole.part.share, whole.parts[0].kind) == (3, "b", 1.0, "two")
    with pytest.raises(ValidationError, match="frozen"):
        whole.count = 4


@pytest.mark.parametrize(
    "change, why",
    [
        ({"count": "3"}, "f.count should be a valid integer; got '3'"),
        ({"count": True}, "f.count should be a valid integer; got True"),
        ({"count": 0}, "f.count should be greater than or equal to 1; got 0"),
        ({"count": 2**40}, f"f.count should be less than 4294967296; got {2**40}"),
        ({"part": 3}, "f.part should be a mapping; got 3"),
        ({"part": {"name": " "}}, "f.part.name should have at least 1 character; got ' '"),
        ({"part": {"name": False}}, "f.part.name should be a text: in YAML off, on, yes and no need quotes; got False"),
        ({"part": {"kind": "three"}}, "f.part.kind should be 'one' or 'two'; got 'three'"),
        ({"part": {"share": 1.5}}, "f.part.share should be less than or equal to 1; got 1.5"),
        ({"part": {"nane": "b"}}, "f.part has 'nane'; accepted: name, kind, share; did you mean name?"),
        ({"parts": [{}, {"kind": None}]}, "f.parts.1.kind should be 'one' or 'two'; got None"),
        ({"more": []}, "f.more should be a mapping; got []"),
        ({"x" * 5000: 1}, "f has 'xxx"),
        ({"count": "9" * 5000}, "f.count should be a valid integer; got '999"),
    ],
)
def test_the_first_fault_is_named_in_one_short_line(change, why):
    with pytest.raises(ValueError) as error:
        parse(Whole, {"count": 1} | change, "f")
    assert str(error.value).startswith(why) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="^count is missing$"):
        parse(Whole, {})
    with pytest.raises(ValueError, match=r"^it should be a mapping; got \[1\]$"):
        parse(Whole, [1])


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (Number, [0, -1.5, 1e300], [float("nan"), float("-inf"), True, "1", None]),
        (NotNegative, [0, 0.5], [-1e-9]),
        (AboveZero, [1e-9], [0]),
        (Share, [0, 1], [-0.1, 1.1]),
        (Seed, [0, 2**32 - 1], [-1, 2**32, 1.0]),
        (list[int], [[], [1]], [[True], [1.0], ["1"], (1,), "1"]),
    ],
)
def test_the_bounds_of_each_type(kind, good, bad):
    assert [parse(kind, value) for value in good] == good
    for value in bad:
        with pytest.raises(ValueError):
            parse(kind, value)


def test_names_may_be_checked_by_themselves():
    check_names(["a", "b"], ["b", "a", "c"])
    with pytest.raises(ValueError, match="^has '3', 'stepz'; accepted: steps, size$"):
        check_names(["stepz", 3, "size"], ["steps", "size"])
