"""A filled table as Markdown, CSV and LaTeX: ours beside the paper's, and what each row changes against its plain row.

The difference from the paper's number stands there only where both are of the same thing. Where model or measure is
another, only the changes can be set beside each other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.table.spec import COLUMNS, Cell, Column, Row, Table

OF = ("weights", "n", "protocol", "protocol_sha256")

# Of what LaTeX gives a meaning (to some at the beginning of a row), or old versions can't set.
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
class Filled:
    """A row with what is known of it.

    cells:  by column; remark: in words, why some are empty.
    unlike: columns in which ours is of something else than the paper's number.
    of:     what the cells are of: `OF`, as far as there is such.
    model:  that made them, where it is not the paper's.
    """

    row: Row
    cells: Mapping[str, Cell] = field(default_factory=dict)
    remark: str = ""
    unlike: Collection[str] = ()
    of: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""

    @property
    def name(self) -> str:
        """The row's; with the model that made its numbers, where the paper's are of another."""
        if not self.model:
            return self.row.name
        return (
            f"{self.model} (paper: {self.row.group}): {self.row.label}"
            if self.row.group
            else (f"{self.model}: {self.row.label}")
        )

    def value(self, name: str) -> float | None:
        return self.cells[name][0] if name in self.cells else None

    def papers(self, name: str) -> float | None:
        """The paper's number, if ours is of the same thing."""
        return None if name in self.unlike else self.row.paper.get(name)


@dataclass(frozen=True)
class Sheet:
    """A table for one world, ready to be shown.

    columns: those that are shown, of the table's.
    notes:   in words, what the numbers are of.
    heads:   of columns that are another measure here than in the paper.
    """

    table: Table
    world: str
    columns: Sequence[str]
    rows: Sequence[Filled]
    notes: Sequence[str] = ()
    heads: Mapping[str, str] = field(default_factory=dict)

    def head(self, name: str) -> str:
        return self.heads.get(name, COLUMNS[name].head)

    def plain_of(self, filled: Filled) -> Filled | None:
        """The row that this one is compared with: the last plain one above in its group; None for plain rows."""
        above = [other for other in self.rows[: self.rows.index(filled)] if other.row.group == filled.row.group]
        return None if filled.row.plain else next((other for other in reversed(above) if other.row.plain), None)


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
    """By how much a value differs, as a share where the column's are; nothing if one is not known."""
    if value is None or base is None or (column.share and base == 0):
        return ""
    return f"{value / base - 1:+.{digits}%}" if column.share else f"{value - base:+.{column.digits}f}"


def values(sheet: Sheet) -> list[list[str]]:
    """Head and rows: each quantity ours and the paper's, with the difference in the coco world."""
    compared = sheet.world == "coco"
    head = ["row"]
    for name in sheet.columns:
        ours, theirs = sheet.head(name), COLUMNS[name].head
        head += [ours, "paper" if ours == theirs else f"paper ({theirs})", *(["difference"] if compared else [])]
    body = []
    for filled in sheet.rows:
        line = [filled.name]
        for name in sheet.columns:
            column = COLUMNS[name]
            line += [cell(filled.cells.get(name), column), number(filled.row.paper.get(name), column)]
            line += [change(filled.value(name), filled.papers(name), column, 2)] if compared else []
        body.append([*line, filled.remark])
    return [[*head, "remark"], *body]


def changes(sheet: Sheet) -> list[list[str]]:
    """Head and rows: what each accelerated row changes against its plain row, ours and the paper's."""
    head = ["change against the plain row"]
    for name in sheet.columns:
        head += [sheet.head(name), "paper"]
    body = []
    for filled in sheet.rows:
        plain = sheet.plain_of(filled)
        if plain is None:
            continue
        line = [filled.name]
        for name in sheet.columns:
            line += [
                change(filled.value(name), plain.value(name), COLUMNS[name]),
                change(filled.row.paper.get(name), plain.row.paper.get(name), COLUMNS[name]),
            ]
        body.append(line)
    return [head, *body]


def markdown(sheet: Sheet) -> str:
    parts = [f"### {title(sheet)}"]
    for head, *body in (values(sheet), changes(sheet)):
        lines = [head, ["---"] * len(head), *body]
        parts.append("\n".join("| " + " | ".join(map(in_markdown, line)) + " |" for line in lines))
    return "\n\n".join([*parts, *notes(sheet)]) + "\n"


def title(sheet: Sheet) -> str:
    return f"{' '.join(sheet.table.title.split())}, {sheet.world}"


def in_markdown(text: str) -> str:
    """A cell: one line, and no bar that would end it."""
    return " ".join(text.split()).replace("|", r"\|")


def notes(sheet: Sheet) -> list[str]:
    """Each on one line."""
    texts = (f"The paper's numbers: {sheet.table.source.strip()}.", sheet.table.note, *sheet.notes)
    return [line for text in texts if (line := " ".join(text.split()))]


def latex(sheet: Sheet) -> str:
    lines = []
    for head, *body in (values(sheet), changes(sheet)):
        rows = [" & ".join(map(escape, line)) + r" \\" for line in [head, *body]]
        lines += [
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\hline",
            rows[0],
            r"\hline",
            *rows[1:],
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    return "\n".join([f"% {title(sheet)}", *lines, *(f"% {note}" for note in notes(sheet))]) + "\n"


def escape(text: str) -> str:
    return "".join(ESCAPED.get(sign, sign) for sign in " ".join(text.split()))


def csv_text(sheet: Sheet) -> str:
    """One line per row, with the plain row's name and what the numbers are of; numbers in full; for each column its
    value, interval, the paper's and the difference."""
    out = io.StringIO()
    parts = ("", "_low", "_high", "_paper", "_difference")
    heads = [
        "table",
        "world",
        "row",
        "compared_with",
        *OF,
        *(f"{name}{part}" for name in sheet.columns for part in parts),
        "remark",
    ]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for filled in sheet.rows:
        plain, line = sheet.plain_of(filled), []
        for name in sheet.columns:
            value, interval = filled.cells.get(name, (None, None))
            like = filled.papers(name)
            line += [
                value,
                *(interval or (None, None)),
                filled.row.paper.get(name),
                None if None in (value, like) else value - like,
            ]
        writer.writerow(
            [
                sheet.table.name,
                sheet.world,
                filled.name,
                plain.name if plain else "",
                *(filled.of.get(name) for name in OF),
                *line,
                filled.remark,
            ]
        )
    return out.getvalue()
