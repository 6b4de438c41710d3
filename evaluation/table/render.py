"""A finished table as Markdown, CSV and LaTeX: our numbers beside the paper's, and the changes against the plain rows.

A difference from the paper's number is shown only where both are of the same thing. Where model or measure are others,
only the changes can be compared.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.table.spec import COLUMNS, Cell, Column, Row, Table
from ldm.io.files import write_file

ABOUT = ("weights", "n", "protocol", "protocol_sha256")
PARTS = ("", "_low", "_high", "_paper", "_difference")  # of a column, in the CSV

# Signs that LaTeX gives a meaning (some only at the beginning of a row), or that old versions can't set.
ESCAPED = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "×": r"$\times$",
    "−": "$-$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",
    "*": "{*}",
}


@dataclass(frozen=True)
class RenderedRow:
    """A row with its values.

    cells:  values by column; remark: why some are missing.
    unlike: columns in which ours is of something else than the paper's number.
    about:  what the values are of: `ABOUT`, as far as it is known.
    model:  the model that made them, if it is not the paper's.
    """

    spec: Row
    cells: Mapping[str, Cell] = field(default_factory=dict)
    remark: str = ""
    unlike: Collection[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    @property
    def name(self) -> str:
        """The row's name; with its model, if that is not the paper's."""
        group, label = self.spec.group, self.spec.label
        if not self.model:
            return self.spec.name
        return f"{self.model} (paper: {group}): {label}" if group else f"{self.model}: {label}"

    def value(self, column: str) -> float | None:
        return self.cells[column][0] if column in self.cells else None

    def comparable(self, column: str) -> float | None:
        """The paper's number, if ours is of the same thing."""
        return None if column in self.unlike else self.spec.paper.get(column)


@dataclass(frozen=True)
class RenderedTable:
    """A table in one world, ready to be shown.

    columns: those of the table that are shown.
    notes:   what the numbers are of, in words.
    heads:   names of columns that are another measure here than in the paper.
    stem:    of the names of its files.
    """

    table: Table
    world: str
    columns: Sequence[str]
    rows: Sequence[RenderedRow]
    notes: Sequence[str] = ()
    heads: Mapping[str, str] = field(default_factory=dict)
    stem: str = ""

    def head(self, name: str) -> str:
        return self.heads.get(name, COLUMNS[name].head)

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


def write(table: RenderedTable, folder: str | Path) -> list[Path]:
    """Write the table as Markdown, CSV and LaTeX; returns the files. Raises OSError: a file can't be written."""
    files = []
    for suffix, text in ((".md", markdown(table)), (".csv", csv_text(table)), (".tex", latex(table))):
        files.append(Path(folder) / f"{table.stem}{suffix}")
        write_file(files[-1], text)
    return files


# Cells


def one_line(text: str) -> str:
    return " ".join(text.split())


def number(value: float | None, column: Column) -> str:
    """Whole numbers, which only the paper has, as they are."""
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.{column.digits}f}"


def cell(found: Cell | None, column: Column) -> str:
    if found is None:
        return ""
    value, interval = found
    around = f" ({number(interval[0], column)} to {number(interval[1], column)})" if interval else ""
    return number(value, column) + around


def change(value: float | None, base: float | None, column: Column, digits: int = 0) -> str:
    """By how much a value differs, as a share where the column's changes are shares; empty if one is not known."""
    if value is None or base is None or (column.share and base == 0):
        return ""
    return f"{value / base - 1:+.{digits}%}" if column.share else f"{value - base:+.{column.digits}f}"


def values(table: RenderedTable) -> list[list[str]]:
    """Head and rows: ours and the paper's, with the difference in the coco world."""
    compared = table.world == "coco"
    head = ["row"]
    for name in table.columns:
        ours, theirs = table.head(name), COLUMNS[name].head
        head += [ours, "paper" if ours == theirs else f"paper ({theirs})", *(["difference"] if compared else [])]
    body = []
    for row in table.rows:
        line = [row.name]
        for name in table.columns:
            column = COLUMNS[name]
            line += [cell(row.cells.get(name), column), number(row.spec.paper.get(name), column)]
            line += [change(row.value(name), row.comparable(name), column, 2)] if compared else []
        body.append([*line, row.remark])
    return [[*head, "remark"], *body]


def changes(table: RenderedTable) -> list[list[str]]:
    """Head and rows: what each accelerated row changes against its plain row, ours and the paper's."""
    head = ["change against the plain row"]
    for name in table.columns:
        head += [table.head(name), "paper"]
    body = []
    for row in table.rows:
        plain = table.plain_of(row)
        if plain is None:
            continue
        line = [row.name]
        for name in table.columns:
            column = COLUMNS[name]
            line.append(change(row.value(name), plain.value(name), column))
            line.append(change(row.spec.paper.get(name), plain.spec.paper.get(name), column))
        body.append(line)
    return [head, *body]


# Formats


def markdown(table: RenderedTable) -> str:
    parts = [f"### {table.title}"]
    for head, *body in (values(table), changes(table)):
        lines = [head, ["---"] * len(head), *body]
        cells = [[one_line(text).replace("|", r"\|") for text in line] for line in lines]  # no bar ends one
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in cells))
    return "\n\n".join([*parts, *table.all_notes()]) + "\n"


def latex(table: RenderedTable) -> str:
    lines = [f"% {table.title}"]
    for head, *body in (values(table), changes(table)):
        rows = [" & ".join(map(in_latex, line)) + r" \\" for line in [head, *body]]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
        lines += [begin, r"\hline", rows[0], r"\hline", *rows[1:], r"\hline", r"\end{tabular}", ""]
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
        plain = table.plain_of(row)
        head = [table.table.name, table.world, row.name, plain.name if plain else ""]
        line = [value for name in table.columns for value in csv_cells(row, name)]
        writer.writerow([*head, *(row.about.get(name) for name in ABOUT), *line, row.remark])
    return out.getvalue()


def csv_cells(row: RenderedRow, column: str) -> Iterator[float | None]:
    """The values of PARTS."""
    value, interval = row.cells.get(column, (None, None))
    paper = row.comparable(column)
    yield value
    yield from interval or (None, None)
    yield row.spec.paper.get(column)
    yield None if value is None or paper is None else value - paper
