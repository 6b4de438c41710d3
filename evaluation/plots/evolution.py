"""Feature evolution: each block's Frobenius norm along a run, and how much its output changes from one step to the next
(the paper's figure 3, eq. 2)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from evaluation.plots.blocks import evolution, plain_outputs
from evaluation.plots.drawing import COLOURS, MARKERS, Drawing, canvas
from evaluation.plots.scene import Scene
from ldm.io.errors import blame

BAND = (10, 90)  # percentiles over pictures
LINES = ("-", "--", "-.", ":")  # curves that lie on each other stay visible


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps)
    with blame("--steps"):
        found = evolution(plain_outputs(*engine.plain_run(scene.items)))
    figure = canvas(8, 7.6)
    grid = figure.subplots(3, 2, sharey="row", sharex=True)
    looks, nodes = looks_of([*found.norm]), engine.plan.num_nodes
    for line, values, label in (
        (grid[0], found.norm, "Frobenius norm of\nthe channels' mean"),
        (grid[1], found.absolute, "mean squared change\nsince the step before"),
        (grid[2], found.relative, "the same, share of the\noutput's mean square"),
    ):
        for axes, sides in zip(line, ("EB", "D"), strict=True):
            curves(axes, values, {name: look for name, look in looks.items() if name[0] in sides}, nodes)
        line[0].set_yscale("log")
        line[0].set_ylabel(label)
    for k, title in enumerate(("encoder (E) and middle (B)", "decoder (D)")):
        grid[0][k].set_title(title)
        grid[0][k].legend(ncols=2)
        grid[2][k].set_xlabel(f"DDIM step of 0..{nodes - 1}, noisiest first")
    return Drawing(
        figure,
        "Blocks along a plain run of "
        f"{nodes} DDIM steps, conditional prediction: Frobenius norm of the output averaged "
        "over its channels (top), its change from one step to the next (middle: eq. 2; bottom: "
        "relative). A resolution looks the same in both columns. Line: mean over the "
        f"pictures; band: {BAND[0]}th to {BAND[1]}th percentile.",
        {
            name: {
                "mean": values.mean(1),
                "max": values.mean(1).max(),
                "variance": values.mean(1).var(),
                "relative": found.relative[name].mean(1),
                "norm": found.norm[name].mean(1),
            }
            for name, values in found.absolute.items()
        },
    )


def looks_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each block's curve looks: as its resolution does, so E8 as D8, finest first; the middle in black."""
    sizes = sorted({int(name[1:]) for name in names if name != "B"}, reverse=True)
    # Networks may have more resolutions than there are colours.
    looks = {
        size: {"color": COLOURS[k % 6], "marker": MARKERS[k % 6], "linestyle": LINES[k % 4]}
        for k, size in enumerate(sizes)
    }
    middle = {"color": "black", "marker": "X", "linestyle": "-"}
    return {
        name: middle if name == "B" else looks[int(name[1:])]
        for name in sorted(names, key=lambda name: -int(name[1:] or 0))
    }


def curves(axes: Axes, found: Mapping[str, np.ndarray], looks: Mapping[str, dict[str, Any]], nodes: int) -> None:
    """Mean and band over the pictures of (n, B), the last n of the run's nodes."""
    for k, (name, look) in enumerate(looks.items()):
        values = found[name]
        every = max(1, len(values) // 6)  # marks of different curves are at different nodes
        shown = np.arange(nodes - len(values), nodes)
        axes.fill_between(shown, *np.percentile(values, BAND, axis=1), color=look["color"], alpha=0.12, linewidth=0)
        axes.plot(shown, values.mean(1), **look, markersize=4, label=name, markevery=(k * every // len(looks), every))
