"""How figures look, and how they are saved: SVG, PNG, and JSON with the numbers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Tick
from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from torch import Tensor

from ldm.io.files import atomic_write, write_file

# Okabe and Ito's colours, which colour-blind readers can tell apart; without colour, markers and lines differ.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vP*X"
DPI = 130
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "grid.alpha": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "figure",
}  # without the salt, two files of the same figure differ
CELL = 0.95  # inches, of a small image


@dataclass(frozen=True)
class Drawing:
    """A finished figure."""

    figure: Figure
    caption: str  # without the end, which names the model, the images and the seed
    values: Mapping[str, Any]  # the numbers that are drawn, as JSON values
    sampled: bool = True  # images were sampled for it
    settings: Mapping[str, Any] = field(default_factory=dict)  # it depends on, beside its experiment, as JSON values
    table: str = ""  # the numbers as a Markdown table, for a figure that has one

    def save(self, out: Path, caption: str, settings: Mapping[str, Any]) -> list[str]:
        """Write out.svg, out.png, out.json and, if there is a table, out.md; returns the files' names.

        `caption`: its end; `settings`: of the experiment, as JSON values. Raises OSError: they can't be written.
        """
        width = int(self.figure.get_size_inches()[0] * 19)  # characters of this size in the figure's width
        caption = f"{self.caption} {caption}"
        self.figure.supxlabel(textwrap.fill(caption, width), fontsize=6.5, color="#333333")
        no_maths(self.figure)
        keep_apart(self.figure.findobj(Annotation))
        record = {"caption": caption, **settings, **self.settings, "values": self.values}
        texts = {"json": json.dumps(record, indent=1, default=_rounded)}
        if self.table:
            texts["md"] = f"{caption}\n\n{self.table}"
        for suffix in ("svg", "png"):
            with matplotlib.rc_context(STYLE), atomic_write(f"{out}.{suffix}") as part:
                self.figure.savefig(part, dpi=DPI, metadata={"Date": None} if suffix == "svg" else None)
        for suffix, text in texts.items():
            write_file(f"{out}.{suffix}", text + "\n")
        return [f"{out}.{suffix}" for suffix in ("svg", "png", *texts)]


def _rounded(values: np.ndarray | Tensor | np.generic) -> Any:
    """Numbers of four digits, more than a figure shows; None for values that are not finite, which JSON lacks."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def image_grid(
    part: Figure | SubFigure, rows: Sequence[Sequence[Tensor]], columns: Sequence[str], labels: Sequence[str] = ()
) -> None:
    """Draw rows of images, (3, H, W) in [-1, 1], with a label above each column and, if given, left of each row."""
    grid = part.subplots(len(rows), len(columns), squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for axes, image in zip(grid.flat, chain.from_iterable(rows), strict=True):
        axes.imshow(((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="none")
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=7)
    for axes, label in zip(grid[:, 0], labels, strict=bool(labels)):
        wrapped = "\n".join(textwrap.fill(line, 17) for line in label.split("\n"))
        axes.set_ylabel(wrapped, rotation=0, ha="right", va="center", fontsize=7)


def note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """Write a text beside a point; `offset` in points."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", **style)


def no_maths(figure: Figure) -> None:
    """Print every text as it is, also prompts with dollar signs; only numbers at an axis may be formulas (powers)."""
    numbers = {text for tick in figure.findobj(Tick) for text in tick.findobj(Text)}
    for text in {*figure.findobj(Text)} - numbers:
        text.set_parse_math(False)


def keep_apart(notes: Sequence[Annotation]) -> None:
    """Move the notes of a finished figure up until none overlaps another; their offsets must be in points."""
    if not notes:
        return
    figure = notes[0].get_figure(root=True)
    figure.draw_without_rendering()  # before this, nothing has a position
    placed: list[Bbox] = []
    boxes = {note: note.get_window_extent() for note in notes if note.get_text()}
    for note, box in sorted(boxes.items(), key=lambda pair: pair[1].y0):
        start = box.y0
        for other in placed:
            if box.overlaps(other):
                box = box.translated(0, other.y1 - box.y0 + 0.1)
        note.xyann = (note.xyann[0], note.xyann[1] + (box.y0 - start) * 72 / figure.dpi)
        placed = sorted([*placed, box], key=lambda other: other.y0)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches. Call it, and what draws on it, in the context of STYLE."""
    return Figure(figsize=(width, height), layout="constrained")


def thin_out(choices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the choices, evenly spaced, with the first and the last."""
    if len(choices) <= most:
        return list(choices)
    return [choices[round(k * (len(choices) - 1) / (most - 1))] for k in range(most)]
