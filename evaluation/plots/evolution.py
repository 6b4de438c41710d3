"""Feature evolution: the Frobenius norm of each block's output during a run, and its change from step to step (figure 3
and eq. 2 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from evaluation.plots.blocks import evolution, plain_outputs
from evaluation.plots.drawing import COLOURS, MARKERS, Drawing, new_figure
from evaluation.plots.experiment import Experiment
from ldm.io.errors import fault_of

BAND = (10, 90)  # percentiles over images
LINES = ("-", "--", "-.", ":")  # curves that overlap stay visible


def make(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw norms and changes of every block's output over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps)
    with fault_of("steps"):
        found = evolution(plain_outputs(*engine.plain_run(experiment.items)))
    figure = new_figure(8, 7.6)
    grid = figure.subplots(3, 2, sharey="row", sharex=True)
    styles, nodes = line_styles([*found.norm]), engine.plan.num_nodes
    for line, values, label in (
        (grid[0], found.norm, "Frobenius norm of\nthe channels' mean"),
        (grid[1], found.absolute, "mean squared change\nfrom step to step"),
        (grid[2], found.relative, "the same, relative to the\noutput's mean square"),
    ):
        for axes, sides in zip(line, ("EB", "D"), strict=True):
            curves(axes, values, {name: style for name, style in styles.items() if name[0] in sides}, nodes)
        line[0].set_yscale("log")
        line[0].set_ylabel(label)
    for k, title in enumerate(("encoder (E) and middle (B)", "decoder (D)")):
        grid[0][k].set_title(title)
        grid[0][k].legend(ncols=2)
        grid[2][k].set_xlabel(f"DDIM step of 0..{nodes - 1}, noisiest first")
    return Drawing(
        figure,
        f"The UNet's blocks during a plain run of {nodes} DDIM steps, conditional prediction. Top: Frobenius norm of "
        "the output's mean over channels. Middle: mean squared change from step to step (eq. 2). Bottom: the same, "
        "relative. A resolution has the same colour in both columns. Lines: mean over the "
        f"images; bands: {BAND[0]}th to {BAND[1]}th percentile.",
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


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The style of each block's curve, finest resolution first: E8 and D8 share one; the middle block is black."""
    sizes = sorted({int(name[1:]) for name in names if name != "B"}, reverse=True)
    # Networks may have more resolutions than there are colours.
    by_size = {
        size: {"color": COLOURS[k % 6], "marker": MARKERS[k % 6], "linestyle": LINES[k % 4]}
        for k, size in enumerate(sizes)
    }
    middle = {"color": "black", "marker": "X", "linestyle": "-"}
    return {
        name: middle if name == "B" else by_size[int(name[1:])]
        for name in sorted(names, key=lambda name: -int(name[1:] or 0))
    }


def curves(axes: Axes, found: Mapping[str, np.ndarray], styles: Mapping[str, dict[str, Any]], nodes: int) -> None:
    """Draw the mean and the band over the images of each block's (n, B) values, at the last n of the run's nodes."""
    for k, (name, style) in enumerate(styles.items()):
        values = found[name]
        every = max(1, len(values) // 6)  # so that the curves' markers are at different nodes
        shown = np.arange(nodes - len(values), nodes)
        axes.fill_between(shown, *np.percentile(values, BAND, axis=1), color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(shown, values.mean(1), **style, markersize=4, label=name, markevery=(k * every // len(styles), every))
