"""The paper's tables: as files (the rows, how each is run, the paper's numbers), and finished, as Markdown, CSV, LaTeX.

A difference from the paper's number is shown only where both are of the same thing. Where model or measure are others,
only the changes against the plain rows can be compared.

evaluation/table/NAME.yaml has the fields of `Table`, and each of its rows those of `Row`. World coco runs published
models: Stable Diffusion, cin256-v2. World emoji runs the model that ships.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from evaluation.protocols.protocol import Method, Protocol, find_file, names_in, reading
from ldm.cli.arguments import NOISE_ORDERS, SPACINGS
from ldm.cli.parser import MOST, MOST_STEPS
from ldm.io.files import NotNegative, Number, Schema, Share, Text, parse, write_file
from ldm.models.diffusion.propagation.plan import ForecastName

TABLE_DIR = Path(__file__).parent
WORLDS = ("coco", "emoji")
SHORT = 8  # digits of a hash that are shown
Cell = tuple[float, list[float] | None]  # a value, and its 95 % interval or None
HOW = tuple("sampler steps plan propagate tome eta noise_weight noise_below noise_order spacing timesteps_at".split())


@dataclass(frozen=True)
class Column:
    """One quantity."""

    head: str  # its name in the paper, with the unit
    digits: int  # after the point
    kind: str  # `quality` is measured on a row's images, `cost` is timed, `count` is counted, `derived` from the others
    share: bool = False  # changes are shown as shares of the plain row's value


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
    """One row, and how it is run: the fields of `HOW`, see `Method`; None = as the protocol says."""

    label: Text  # name of the row
    group: str = ""  # what several rows have in common, with the label their names
    plain: bool = False  # the rows below, up to the next such row, are compared with this one
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
    parallel: Annotated[int, Field(ge=1, le=MOST)] | None = None  # decoder steps in one batch; for time and memory only
    protocol: dict[World, Text | None] = {}  # others than the table's; null = the row is not in that world
    paper: dict[ColumnName, Number | int] = {}  # the paper's numbers
    missing: Text | None = None  # why it can't be run: the paper's numbers stand alone; with steps, beside the GFLOPs
    costs_only: Text | None = None  # why only its cost can be measured

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
        how = self.how()
        if at := how.get("timesteps_at"):
            how["timesteps_at"] = ",".join(map(str, at))
        return [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]  # a value may be -1e-07


class Table(Schema):
    """The content of a table file."""

    name: str
    title: Text
    source: Text  # where its numbers were published, and what they are of
    columns: Annotated[list[ColumnName], Field(min_length=1)]  # in order
    protocol: dict[World, Text]  # in each world in which there is such a table
    rows: Annotated[list[Row], Field(min_length=1)]
    note: str = ""  # what to bear in mind
    apart: dict[ColumnName, Text] = {}  # why the published numbers of a column are of something else than ours can be

    @model_validator(mode="after")
    def _is_consistent(self) -> Table:
        for place, names in {"columns": self.columns, "rows": [row.name for row in self.rows]}.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{place} has {twice[0]!r} twice")
        for place, names in {"apart": self.apart, **{row.name: row.paper for row in self.rows}}.items():
            if unshown := names.keys() - {*self.columns}:
                raise ValueError(f"{place} has {', '.join(sorted(unshown))}, which is not among the columns")
        return self

    def protocol_of(self, row: Row, world: str) -> str | None:
        """The name of the protocol that the row is run under; None = the row is not in this world."""
        return {**self.protocol, **row.protocol}.get(world)

    def rows_in(self, world: str) -> list[Row]:
        return [row for row in self.rows if self.protocol_of(row, world) is not None]


def table_names() -> tuple[str, ...]:
    return tuple(sorted(names_in(TABLE_DIR), key=lambda name: (len(name), name)))


def load_table(name: str) -> Table:
    """The table of a name in evaluation/table, or of a .yaml file.
    Raises ValueError: there is none, or it is not a table."""
    path = find_file("table", name, TABLE_DIR, table_names())
    with reading("table", path) as content:
        return parse(Table, {**content, "name": path.stem})


# A finished table

ABOUT = ("weights", "n", "protocol", "protocol_sha256")
PARTS = ("", "_low", "_high", "_paper", "_difference")  # of a column, in the CSV
# Signs that LaTeX gives a meaning (some only at the beginning of a row), or that old versions can't set.
NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "|": "bar", "<": "less", ">": "greater"}
ESCAPED = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{sign: rf"\text{name}{{}}" for sign, name in NAMED.items()},
    **{"×": r"$\times$", "−": "$-$", "[": "{[}", "*": "{*}"},
}


@dataclass(frozen=True)
class RenderedRow:
    """A row with its values."""

    spec: Row
    cells: Mapping[str, Cell] = field(default_factory=dict)  # values by column
    remark: str = ""  # why some are missing
    # Columns in which ours is of something else than the paper's number, with the reason.
    unlike: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)  # what the values are of: `ABOUT`, as far as it is known
    model: str = ""  # the model that made them, if it is not the paper's

    @property
    def name(self) -> str:
        """The row's name; with its model, if that is not the paper's."""
        group, label = self.spec.group, self.spec.label
        if not self.model:
            return self.spec.name
        return f"{self.model} (paper: {group}): {label}" if group else f"{self.model}: {label}"

    def value(self, column: str) -> float | None:
        return self.cells[column][0] if column in self.cells else None

    def difference(self, name: str) -> tuple[float | None, float | None]:
        """Our number and, if ours is of the same thing, the paper's."""
        return self.value(name), None if name in self.unlike else self.spec.paper.get(name)


@dataclass(frozen=True)
class RenderedTable:
    """A table in one world, ready to be shown."""

    table: Table
    world: str
    columns: Sequence[str]  # those of the table that are shown
    rows: Sequence[RenderedRow]
    notes: Sequence[str] = ()  # what the numbers are of, in words
    heads: Mapping[str, str] = field(default_factory=dict)  # of columns that are another measure here than in the paper
    stem: str = ""  # of the names of its files

    @property
    def title(self) -> str:
        return f"{one_line(self.table.title)}, {self.world}"

    def all_notes(self) -> list[str]:
        """The notes of the table and of its numbers, each on one line."""
        texts = (f"The paper's numbers: {self.table.source.strip()}.", self.table.note, *self.notes)
        return [line for text in texts if (line := one_line(text))]

    def plain_of(self, row: RenderedRow) -> RenderedRow | None:
        """The row that this one is compared with: the last plain one above in its group; None for plain rows."""
        above = [other for other in self.rows[: self.rows.index(row)] if other.spec.group == row.spec.group]
        return None if row.spec.plain else next((other for other in reversed(above) if other.spec.plain), None)

    def parts(self) -> tuple[list[list[str]], list[list[str]]]:
        """Head and rows of both parts: ours and the paper's numbers, with the difference in the coco world; and what
        each accelerated row changes against its plain row."""
        columns = {name: COLUMNS[name] for name in self.columns}
        heads = {name: self.heads.get(name, column.head) for name, column in columns.items()}
        compared = ["difference"] * (self.world == "coco")
        values, changes = [["row"]], [["change against the plain row"]]
        for name, column in columns.items():
            paper = "paper" if heads[name] == column.head else f"paper ({column.head})"
            values[0] += [heads[name], paper, *compared]
            changes[0] += [heads[name], "paper"]
        values[0].append("remark")
        for row in self.rows:
            values.append([row.name])
            for name, column in columns.items():
                values[-1] += [cell(row.cells.get(name), column), number(row.spec.paper.get(name), column)]
                values[-1] += [change(*row.difference(name), column, 2) for _ in compared]
            values[-1].append(row.remark)
            if plain := self.plain_of(row):
                changes.append([row.name])
                for name, column in columns.items():
                    ours, theirs = row.value(name), row.spec.paper.get(name)
                    changes[-1].append(change(ours, plain.value(name), column))
                    changes[-1].append(change(theirs, plain.spec.paper.get(name), column))
        return values, changes


def write(table: RenderedTable, folder: str | Path) -> list[Path]:
    """Write the table as Markdown, CSV and LaTeX; returns the files. Raises OSError: a file can't be written."""
    texts = {".md": markdown(table), ".csv": csv_text(table), ".tex": latex(table)}
    files = {Path(folder) / f"{table.stem}{suffix}": text for suffix, text in texts.items()}
    for file, text in files.items():
        write_file(file, text)
    return [*files]


def one_line(text: str) -> str:
    return " ".join(text.split())


def number(value: float | None, column: Column) -> str:
    """Whole numbers, which only the paper has, as they are."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.{column.digits}f}"


def cell(found: Cell | None, column: Column) -> str:
    value, interval = found or (None, None)
    around = f" ({number(interval[0], column)} to {number(interval[1], column)})" if interval else ""
    return number(value, column) + around


def change(value: float | None, base: float | None, column: Column, digits: int = 0) -> str:
    """By how much a value differs, as a share where the column's changes are shares; empty if one is not known."""
    if value is None or base is None or (column.share and base == 0):
        return ""
    return f"{value / base - 1:+.{digits}%}" if column.share else f"{value - base:+.{column.digits}f}"


def markdown(table: RenderedTable) -> str:
    parts = [f"### {table.title}"]
    for head, *body in table.parts():
        lines = [head, ["---"] * len(head), *body]
        cells = [[one_line(text).replace("|", r"\|") for text in line] for line in lines]  # no bar ends one
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join([*parts, *table.all_notes()]) + "\n"


def latex(table: RenderedTable) -> str:
    lines = [f"% {table.title}"]
    for part in table.parts():
        head, *body = (" & ".join(map(in_latex, line)) + r" \\" for line in part)
        begin = rf"\begin{{tabular}}{{l{'r' * (len(part[0]) - 1)}}}"
        lines += [begin, r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}", ""]
    return "\n".join([*lines, *(f"% {note}" for note in table.all_notes())]) + "\n"


def in_latex(text: str) -> str:
    return "".join(ESCAPED.get(sign, sign) for sign in one_line(text))


def csv_text(table: RenderedTable) -> str:
    """A line per row, with numbers in full: its plain row, what the numbers are of, and for each column its value,
    interval, the paper's number and the difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = (f"{name}{part}" for name in table.columns for part in PARTS)
    writer.writerow(["table", "world", "row", "compared_with", *ABOUT, *columns, "remark"])
    for row in table.rows:
        plain, line = table.plain_of(row), []
        for name in table.columns:
            value, interval = row.cells.get(name, (None, None))
            difference = None if None in row.difference(name) else value - row.spec.paper[name]
            line += [value, *(interval or (None, None)), row.spec.paper.get(name), difference]
        head = [table.table.name, table.world, row.name, plain.name if plain else ""]
        writer.writerow([*head, *(row.about.get(name) for name in ABOUT), *line, row.remark])
    return out.getvalue()
