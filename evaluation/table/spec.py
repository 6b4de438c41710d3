"""The paper's tables as files: which rows there are, how each is run, and what the paper says of it.

evaluation/table/NAME.yaml:

    title:    the table's head
    source:   where its numbers were published, and of what
    note:     what to bear in mind when it is read (optional)
    apart:    {column: why}, where the published numbers are of something else than ours can be (optional)
    columns:  names of `COLUMNS`, in order
    protocol: {coco: NAME, emoji: NAME}   of each world in which there is such a table
    rows:     a list, in order:
        label:      of the row; with `group`, what several rows have in common (optional)
        plain:      true: the rows below, up to the next such row, are compared with this one
        sampler, steps, plan, propagate, tome, eta, noise_weight, noise_below, noise_order: as evaluation/generate.py
                    takes them; default: the protocol's
        parallel:   decoder steps in one batch; moves time and memory only (default: auto)
        protocol:   other protocols than the table's, by world; null = the row is not in that world
        paper:      {column: number}, what the paper says
        missing:    why the row can't be run: the paper's numbers stand alone
        costs_only: why only its cost can be had

A row that is run in the `coco` world is run with published models: Stable Diffusion, cin256-v2. The `emoji` world is
the model that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from evaluation.protocols.yaml_file import find_file, names_in, reading
from ldm.cli.arguments import MOST, MOST_STEPS, NOISE_ORDERS, PROPAGATE
from ldm.io.kinds import MAPPING, NUMBER, SHARE, TEXT, Kind, check, choice, is_text, known, number, optional, whole

TABLE_DIR = Path(__file__).parent
WORLDS = ("coco", "emoji")
SHORT = 8  # digits of a hash that are shown
Cell = tuple[float, list[float] | None]  # a value, and its 95 % interval if there is one
HOW = ("sampler", "steps", "plan", "propagate", "tome", "eta", "noise_weight", "noise_below", "noise_order")


@dataclass(frozen=True)
class Column:
    """One quantity.

    head:   what it is in the paper, with the unit.
    digits: after the point.
    kind:   `quality` is measured of a row's pictures, `cost` is timed, `count` is counted, `derived` from the others.
    share:  changes are shares of the plain row's value.
    """

    head: str
    digits: int
    kind: str
    share: bool = False


COLUMNS = {
    "fid": Column("FID", 2, "quality"),
    "clip_score": Column("CLIP-score", 3, "quality"),
    "sfid": Column("sFID", 2, "quality"),
    "inception_score": Column("IS", 2, "quality"),
    "precision": Column("precision", 3, "quality"),
    "recall": Column("recall", 3, "quality"),
    "gflops": Column("GFLOPs/image", 1, "count", share=True),
    "seconds_unet": Column("s/image UNet", 2, "cost", share=True),
    "seconds": Column("s/image whole", 2, "cost", share=True),
    "memory": Column("peak GB", 2, "cost", share=True),
    "ftc": Column("FTC = FID × s / CLIP", 1, "derived", share=True),
}
FTC = ("fid", "clip_score", "seconds")  # what that is made of


# What fields may be

ROW = {
    "label": TEXT,
    "group": TEXT,
    "plain": Kind("true or false", lambda value: type(value) is bool),
    "sampler": TEXT,
    "steps": whole(1, MOST_STEPS),
    "plan": Kind("a text, 'off' in quotes, which YAML takes for no", is_text),
    "propagate": choice(*PROPAGATE),
    "tome": number("a number in 0..0.75", 0, 0.75),
    "eta": SHARE,
    "noise_weight": number("a number >= 0", 0),
    "noise_below": NUMBER,
    "noise_order": choice(*NOISE_ORDERS),
    "parallel": whole(1, MOST),
    "protocol": MAPPING,
    "paper": MAPPING,
    "missing": TEXT,
    "costs_only": TEXT,
}
TABLE = {
    "title": TEXT,
    "source": TEXT,
    "note": TEXT,
    "apart": MAPPING,
    "protocol": MAPPING,
    "columns": Kind(
        "a list of columns, each once",
        lambda value: (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(name, str) and value.count(name) == 1 for name in value)
        ),
    ),
    "rows": Kind("a list with a row or more", lambda value: isinstance(value, list) and bool(value)),
}


def given(content: Any) -> dict[str, Any]:
    """The fields that are not left at their defaults."""
    return {f.name: value for f in fields(content) if (value := getattr(content, f.name)) is not f.default}


@dataclass(frozen=True)
class Row:
    """One row; see above.

    Raises:
        ValueError: a value that is not what it should be.
    """

    label: str
    group: str = ""
    plain: bool = False
    sampler: str | None = None
    steps: int | None = None
    plan: str = "off"
    propagate: str | None = None
    tome: float | None = None
    eta: float | None = None
    noise_weight: float | None = None
    noise_below: float | None = None
    noise_order: str | None = None
    parallel: int | None = None
    protocol: Mapping[str, str | None] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    missing: str | None = None
    costs_only: str | None = None

    def __post_init__(self) -> None:
        check(f"{self.name}: ", given(self), ROW)
        known(f"{self.name}: protocol", self.protocol, set(), set(WORLDS))
        check(f"{self.name}: protocol.", self.protocol, dict.fromkeys(WORLDS, optional(TEXT)))
        known(f"{self.name}: paper", self.paper, set(), set(COLUMNS))
        check(f"{self.name}: paper.", self.paper, dict.fromkeys(COLUMNS, NUMBER))

    @property
    def name(self) -> str:
        return f"{self.group}: {self.label}" if self.group else self.label

    def how(self) -> dict[str, str]:
        """How it is run, as texts: those of `HOW` that are given."""
        return {name: str(value) for name in HOW if (value := getattr(self, name)) is not None}

    def flags(self) -> list[str]:
        """What evaluation/generate.py is told of it, without the protocol."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in self.how().items()]  # a value may be -1e-07


@dataclass(frozen=True)
class Table:
    """One file's content; see above.

    Raises:
        ValueError: a value that is not what it should be.
    """

    name: str
    title: str
    source: str
    columns: list[str]
    protocol: Mapping[str, str]
    rows: list[Row]
    note: str = ""
    apart: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check("", given(self), TABLE)
        if strange := [name for name in self.columns if name not in COLUMNS]:
            raise ValueError(f"there is no column {strange[0]!r}; accepted: {', '.join(COLUMNS)}")
        known("protocol", self.protocol, set(), set(WORLDS))
        check("protocol.", self.protocol, dict.fromkeys(WORLDS, TEXT))
        known("apart", self.apart, set(), set(self.columns))
        check("apart.", self.apart, dict.fromkeys(COLUMNS, TEXT))
        names = [row.name for row in self.rows]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two rows are called {twice[0]!r}")
        for row in self.rows:
            if unshown := row.paper.keys() - {*self.columns}:
                raise ValueError(f"{row.name}: paper has {', '.join(sorted(unshown))}, which is not among the columns")

    def protocol_of(self, row: Row, world: str) -> str | None:
        """The name of the protocol that the row is run under; None = the row is not in this world."""
        return {**self.protocol, **row.protocol}.get(world)

    def rows_in(self, world: str) -> list[Row]:
        return [row for row in self.rows if self.protocol_of(row, world) is not None]


def table_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(TABLE_DIR), key=lambda name: (len(name), name)))


def load_table(name: str) -> Table:
    """The table of a name in evaluation/tables, or of a .yaml file.

    Raises:
        ValueError: there is none, or it is not a table.
    """
    path = find_file("table", name, TABLE_DIR, table_names())
    with reading("table", path) as content:
        known("the file", content, {"title", "source", "columns", "protocol", "rows"}, {"note", "apart"})
        check("", content, {"rows": TABLE["rows"]})
        for place, entry in enumerate(content["rows"], 1):
            known(f"row {place}", entry, {"label"}, {*ROW})
        rows = [Row(**entry) for entry in content["rows"]]
        return Table(**{**content, "rows": rows}, name=path.stem)
