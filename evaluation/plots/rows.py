"""The rows of a comparison of methods, from a YAML file; see evaluation/plots/pareto.yaml."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from evaluation.protocols.protocol import reading
from ldm.cli.arguments import MOST_STEPS
from ldm.io.schema import NotNegative, Schema, Text, parse
from ldm.models.diffusion.propagation.forecast import POLYNOMIALS, ForecastName

LISTS = ("sampler", "steps", "plan", "propagate")  # fields that may be lists: one row for each value


class Row(Schema):
    """A method of sampling.

    family: rows of a family are drawn alike.
    label:  text beside the row's marker; may name fields of the row in braces.
    The other fields: see `ldm.sampling.engine.Recipe` and `load_plan`.
    """

    family: Text
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    sampler: Text = "ddim"
    plan: Text = "off"
    propagate: ForecastName | None = None
    noise_weight: NotNegative = 0.0
    guidance_reuse: bool | Literal[POLYNOMIALS] = False
    label: str = ""

    @model_validator(mode="after")
    def _has_a_label_of_its_fields(self) -> Row:
        try:
            self.label.format(**dict(self))
        except (LookupError, AttributeError, TypeError, ValueError):
            raise ValueError(f"label may have {', '.join(Row.model_fields)} in braces; got {self.label!r}") from None
        return self

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}"] + [self.plan] * (self.plan != "off")
        parts += [self.propagate] * (self.propagate is not None) + ["guidance reused"] * (self.guidance_reuse is True)
        parts += [f"guidance {self.guidance_reuse}"] * isinstance(self.guidance_reuse, str)
        return ", ".join(parts + [f"prior noise {self.noise_weight}"] * (self.noise_weight > 0))


class _File(Schema):
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)]


def read_rows(path: str, steps: int) -> list[Row]:
    """The rows of a file, with lists expanded. `steps`: of rows that do not state their number of steps. Raises
    ValueError: the file can't be read, or has other content."""
    with reading("file of rows as in evaluation/plots/pareto.yaml", Path(path)) as content:
        entries = parse(_File, content).rows
        rows = [row for k, entry in enumerate(entries, 1) for row in expanded(f"row {k}", entry, steps)]
        if twice := [name for name, number in Counter(map(str, rows)).items() if number > 1]:
            raise ValueError(f"two rows are {twice[0]!r}; expected each method once")
    return rows


def expanded(place: str, entry: dict[str, Any], steps: int) -> list[Row]:
    """The rows of one entry; `place` names it in messages. See `read_rows`."""
    lists = {name: entry[name] if isinstance(entry[name], list) else [entry[name]] for name in LISTS if name in entry}
    if empty := [name for name, values in lists.items() if not values]:
        raise ValueError(f"{place}: {empty[0]} is an empty list; expected a value or more")
    return [
        parse(Row, {"steps": steps} | entry | dict(zip(lists, values, strict=True)), place)
        for values in product(*lists.values())
    ]
