"""How large each block's output is and how much that varies over a run (the paper's figures 3b and 3c)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from matplotlib.axes import Axes

from evaluation.plots.blocks import evolution, plain_outputs
from evaluation.plots.drawing import COLOURS, Drawing, canvas
from evaluation.plots.scene import Scene
from ldm.io.errors import blame


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps)
    with blame("--steps"):
        norms = evolution(plain_outputs(*engine.plain_run(scene.items))).norm
    found = {name: values.mean(1) for name, values in norms.items()}
    figure = canvas(9, 3.2)
    boxes, deviation, relative = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    colours = [colour_of(name) for name in found]
    drawn = boxes.boxplot(
        [*found.values()],
        tick_labels=[*found],
        patch_artist=True,
        medianprops={"color": "black"},
        flierprops={"markersize": 3},
    )
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set_facecolor(colour)
    boxes.set_yscale("log")
    boxes.set_ylabel("Frobenius norm of the channels' mean")
    boxes.set_title("over the steps of a run")
    points(deviation, {name: values.std() for name, values in found.items()})
    deviation.set_ylabel("its standard deviation over the steps")
    shares = {name: 100 * values.std() / values.mean() for name, values in found.items()}
    relative.bar([*shares], [*shares.values()], color=colours)
    relative.set_ylabel("standard deviation, % of the mean")
    relative.grid(False, axis="x")
    return Drawing(
        figure,
        "Frobenius norm of each block's output averaged over its channels, at the "
        f"{len(found['B'])} steps of a plain DDIM run, mean over the pictures. Boxes: quartiles "
        "over the steps; whiskers: 1.5 times their distance. Blue: encoder; green: middle; orange: "
        "decoder.",
        {name: {"norm": values, "deviation": values.std(), "percent": shares[name]} for name, values in found.items()},
    )


def colour_of(name: str) -> str:
    return {"E": COLOURS[0], "B": COLOURS[2], "D": COLOURS[4]}[name[0]]


def points(axes: Axes, heights: Mapping[str, float]) -> None:
    """On a logarithmic axis, for values of several orders of magnitude; there a bar would have no foot."""
    for name, height in heights.items():
        axes.plot(name, height, "o", color=colour_of(name), markeredgecolor="black", markeredgewidth=0.6)
        axes.annotate(
            f"{height:.2g}", (name, height), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6.5
        )
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.1)
