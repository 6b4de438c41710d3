"""The rows of a comparison of methods, from a YAML file; see evaluation/plots/pareto.yaml."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from evaluation.protocols.yaml_file import reading
from ldm.cli.arguments import MOST_STEPS, PROPAGATE
from ldm.io.kinds import TEXT, Kind, check, choice, is_text, known, number, optional, whole

LISTS = ("sampler", "steps", "plan", "propagate")  # fields that may be lists: one row for each value
FIELDS = {
    "family": TEXT,
    "steps": whole(1, MOST_STEPS),
    "sampler": TEXT,
    "plan": Kind("a text, 'off' in quotes, which YAML takes for no", is_text),
    "propagate": optional(choice(*PROPAGATE)),
    "noise_weight": number("a number >= 0", 0),
    "guidance_reuse": Kind("true or false", lambda value: type(value) is bool),
    "label": Kind("text", lambda value: isinstance(value, str)),
}


@dataclass(frozen=True)
class Row:
    """A method of sampling.

    family: rows of a family are drawn alike.
    label:  text beside the row's marker; may name fields of the row in braces.
    The other fields: see `ldm.sampling.engine.Recipe` and `load_plan`.

    Raises:
        ValueError: a value that is not accepted.
    """

    family: str
    steps: int
    sampler: str = "ddim"
    plan: str = "off"
    propagate: str | None = None
    noise_weight: float = 0.0
    guidance_reuse: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        check("", vars(self), FIELDS)
        try:
            self.label.format(**vars(self))
        except (LookupError, AttributeError, TypeError, ValueError):
            raise ValueError(f"label may have {', '.join(FIELDS)} in braces; got {self.label!r}") from None

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}"] + [self.plan] * (self.plan != "off")
        parts += [self.propagate] * (self.propagate is not None) + ["guidance reused"] * self.guidance_reuse
        return ", ".join(parts + [f"prior noise {self.noise_weight}"] * (self.noise_weight > 0))


def read_rows(path: str, steps: int) -> list[Row]:
    """The rows of a file, with lists expanded.

    Args:
        steps: of rows that do not state their number of steps.

    Raises:
        ValueError: the file can't be read, or has other content.
    """
    with reading("file of rows as in evaluation/plots/pareto.yaml", Path(path)) as content:
        known("it", content, {"rows"}, set())
        if not isinstance(content["rows"], list) or not content["rows"]:
            raise ValueError(f"rows must be a list with a row or more; got {content['rows']!r}")
        rows = [row for k, entry in enumerate(content["rows"], 1) for row in expanded(f"row {k}", entry, steps)]
        if twice := [name for name, number in Counter(map(str, rows)).items() if number > 1]:
            raise ValueError(f"two rows are {twice[0]!r}; expected each method once")
    return rows


def expanded(place: str, entry: Any, steps: int) -> list[Row]:
    """The rows of one entry; `place` names it in messages. See `read_rows`."""
    known(place, entry, {"family"}, {*FIELDS})
    lists = {name: entry[name] if isinstance(entry[name], list) else [entry[name]] for name in LISTS if name in entry}
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"{place}: {empty[0]} is an empty list; expected a value or more")
    return [
        Row(**{"steps": steps} | entry | dict(zip(lists, values, strict=True))) for values in product(*lists.values())
    ]
