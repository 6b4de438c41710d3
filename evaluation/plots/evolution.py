"""Feature evolution: how much each block's output changes from one step to the next (the paper's figure 3a, eq. 2)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from evaluation.plots.blocks import changes, plain_outputs
from evaluation.plots.drawing import COLOURS, MARKERS, Drawing, canvas
from evaluation.plots.scene import Scene
from ldm.cli import blame

BAND = (10, 90)     # percentiles over pictures


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps)
    with blame("--steps"):
        found = changes(plain_outputs(*engine.plain_run(scene.items)))
    figure = canvas(8, 5.6)
    grid = figure.subplots(2, 2, sharey="row", sharex=True)
    encoder, decoder = ([name for name in found.absolute if name.startswith("D") == wanted] for wanted in (False, True))
    for line, values, label in ((grid[0], found.absolute, "mean squared change\nsince the step before"),
                                (grid[1], found.relative, "the same, share of the output's\nmean square")):
        for axes, names in zip(line, (encoder, decoder), strict=True):
            curves(axes, {name: values[name] for name in names})
        line[0].set_yscale("log")
        line[0].set_ylabel(label)
    for k, title in enumerate(("encoder (E) and middle (B)", "decoder (D)")):
        grid[0][k].set_title(title)
        grid[1][k].set_xlabel(f"DDIM step of 0..{args.steps - 1}, noisiest first")
    grid[0][0].legend(ncols=2)
    grid[0][1].legend(ncols=2)
    return Drawing(figure, "Change of each block's output from one DDIM step to the next (above: eq. 2), plain run of "
                           f"{args.steps} steps, conditional prediction. Line: mean over the pictures; band: "
                           f"{BAND[0]}th to {BAND[1]}th percentile.",
                   {name: {"mean": values.mean(1), "max": values.mean(1).max(), "variance": values.mean(1).var(),
                           "relative": found.relative[name].mean(1)} for name, values in found.absolute.items()})


def curves(axes: Axes, found: Mapping[str, np.ndarray]) -> None:
    """Mean and band over the pictures of (nodes - 1, B) from node 1 on."""
    # Networks may have more blocks than there are colours.
    for (name, values), colour, marker in zip(found.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
        nodes = np.arange(1, len(values) + 1)
        axes.fill_between(nodes, *np.percentile(values, BAND, axis=1), color=colour, alpha=0.15, linewidth=0)
        axes.plot(nodes, values.mean(1), color=colour, marker=marker, markevery=max(1, len(nodes) // 8), markersize=4,
                  label=name)
