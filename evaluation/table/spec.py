"""The paper's tables as files: the rows, how each is run, and the paper's numbers.

evaluation/table/NAME.yaml:

    title:    title of the table
    source:   where its numbers were published, and what they are of
    note:     what to bear in mind (optional)
    apart:    {column: why}, where the published numbers are of something else than ours can be (optional)
    columns:  names of `COLUMNS`, in order
    protocol: {coco: NAME, emoji: NAME}, the protocol in each world in which there is such a table
    rows:     a list, in order:
        label:      name of the row; with `group`, what several rows have in common (optional)
        plain:      true: the rows below, up to the next such row, are compared with this one
        sampler, steps, plan, propagate, tome, eta, noise_weight, noise_below, noise_order, spacing, timesteps_at (a
                    list): see `Method`; default: the protocol's
        parallel:   decoder steps in one batch; changes time and memory only (default: auto)
        protocol:   other protocols than the table's, by world; null = the row is not in that world
        paper:      {column: number}, the paper's numbers
        missing:    why the row can't be run: the paper's numbers stand alone, beside the GFLOPs where it has steps
        costs_only: why only its cost can be measured
        frames:     of the GFLOPs: how many frames a model of videos makes (default: 1)

The `coco` world runs published models: Stable Diffusion, cin256-v2. The `emoji` world runs the model that ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from evaluation.protocols.protocol import Method, Protocol, find_file, names_in, reading
from ldm.cli.arguments import NOISE_ORDERS, SPACINGS
from ldm.cli.parser import MOST, MOST_STEPS
from ldm.io.files import NotNegative, Number, Schema, Share, Text, parse
from ldm.models.diffusion.propagation.plan import ForecastName

TABLE_DIR = Path(__file__).parent
WORLDS = ("coco", "emoji")
SHORT = 8  # digits of a hash that are shown
Cell = tuple[float, list[float] | None]  # a value, and its 95 % interval or None
HOW = tuple("sampler steps plan propagate tome eta noise_weight noise_below noise_order spacing timesteps_at".split())


@dataclass(frozen=True)
class Column:
    """One quantity.

    head:   its name in the paper, with the unit.
    digits: after the point.
    kind:   `quality` is measured on a row's images, `cost` is timed, `count` is counted, `derived` from the others.
    share:  changes are shown as shares of the plain row's value.
    """

    head: str
    digits: int
    kind: str
    share: bool = False


COLUMNS = {
    "fid": Column("FID", 2, "quality"),
    "clip_score": Column("CLIP-score", 3, "quality"),
    "image_reward": Column("ImageReward", 3, "quality"),
    "pick_score": Column("PickScore", 3, "quality"),
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
FTC = ("fid", "clip_score", "seconds")  # the columns that it is computed from

World, ColumnName = Literal[WORLDS], Literal[tuple(COLUMNS)]


class Row(Schema):
    """One row; see above."""

    label: Text
    group: str = ""
    plain: bool = False
    sampler: Text | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    plan: Text = "off"
    propagate: ForecastName | None = None
    tome: Annotated[Number, Field(ge=0, le=0.75)] | None = None
    eta: Share | None = None
    noise_weight: NotNegative | None = None
    noise_below: Number | None = None
    noise_order: Literal[NOISE_ORDERS] | None = None
    spacing: Literal[SPACINGS] | None = None
    timesteps_at: Annotated[list[Annotated[int, Field(ge=0, le=MOST_STEPS)]], Field(min_length=1)] | None = None
    parallel: Annotated[int, Field(ge=1, le=MOST)] | None = None
    protocol: dict[World, Text | None] = {}
    paper: dict[ColumnName, Number | int] = {}
    missing: Text | None = None
    costs_only: Text | None = None
    frames: Annotated[int, Field(ge=1, le=MOST)] = 1

    @property
    def name(self) -> str:
        return f"{self.group}: {self.label}" if self.group else self.label

    def how(self) -> dict[str, Any]:
        """How it is run: the fields of `HOW` that are given."""
        given = {name: value for name in HOW if (value := getattr(self, name)) is not None}
        return given | ({"timesteps_at": tuple(self.timesteps_at)} if self.timesteps_at else {})

    def method(self, protocol: Protocol) -> Method:
        """The method under a protocol, which says what the row leaves open."""
        return protocol.method(**self.how(), parallel=self.parallel)

    def flags(self) -> list[str]:
        """The same as flags of evaluation/generate.py, without the protocol."""
        texts = {
            name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in self.how().items()
        }
        return [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]  # a value may be -1e-07


class Table(Schema):
    """The content of a table file; see above."""

    name: str
    title: Text
    source: Text
    columns: Annotated[list[ColumnName], Field(min_length=1)]
    protocol: dict[World, Text]
    rows: Annotated[list[Row], Field(min_length=1)]
    note: str = ""
    apart: dict[ColumnName, Text] = {}

    @model_validator(mode="after")
    def _is_consistent(self) -> Table:
        check_once("columns", self.columns)
        check_once("rows", [row.name for row in self.rows])
        for place, names in {"apart": self.apart, **{row.name: row.paper for row in self.rows}}.items():
            if unshown := names.keys() - {*self.columns}:
                raise ValueError(f"{place} has {', '.join(sorted(unshown))}, which is not among the columns")
        return self

    def protocol_of(self, row: Row, world: str) -> str | None:
        """The name of the protocol that the row is run under; None = the row is not in this world."""
        return {**self.protocol, **row.protocol}.get(world)

    def rows_in(self, world: str) -> list[Row]:
        return [row for row in self.rows if self.protocol_of(row, world) is not None]


def check_once(what: str, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{what} has {twice[0]!r} twice")


def table_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(TABLE_DIR), key=lambda name: (len(name), name)))


def load_table(name: str) -> Table:
    """The table of a name in evaluation/table, or of a .yaml file.
    Raises ValueError: there is none, or it is not a table."""
    path = find_file("table", name, TABLE_DIR, table_names())
    with reading("table", path) as content:
        return parse(Table, {**content, "name": path.stem})
