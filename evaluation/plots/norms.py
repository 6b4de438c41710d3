"""How large each block's output is and how much that varies over a run (the paper's figures 3b and 3c)."""

from __future__ import annotations

import argparse

from matplotlib.axes import Axes

from evaluation.plots.blocks import norms, plain_outputs
from evaluation.plots.drawing import COLOURS, Drawing, canvas
from evaluation.plots.scene import Scene


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    engine = scene.engine("ddim", args.steps)
    found = {name: values.mean(1) for name, values in norms(plain_outputs(*engine.plain_run(scene.items))).items()}
    figure = canvas(9, 3.2)
    boxes, deviation, relative = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    colours = [colour_of(name) for name in found]
    drawn = boxes.boxplot([*found.values()], tick_labels=[*found], patch_artist=True, medianprops={"color": "black"},
                          flierprops={"markersize": 3})
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set_facecolor(colour)
    boxes.set_yscale("log")
    boxes.set_ylabel("Frobenius norm of the channels' mean")
    boxes.set_title("over the steps of a run")
    bars(deviation, {name: values.std() for name, values in found.items()}, "standard deviation over the steps")
    bars(relative, {name: 100 * values.std() / values.mean() for name, values in found.items()},
         "standard deviation, % of the mean")
    return Drawing(figure, f"Frobenius norm of each block's output averaged over its channels, at the {args.steps} "
                           "steps of a plain DDIM run, mean over the pictures. Boxes: quartiles over the steps; "
                           "whiskers: 1.5 times their distance. Blue: encoder; green: middle; orange: decoder.",
                   {name: {"norm": values, "deviation": values.std()} for name, values in found.items()})


def colour_of(name: str) -> str:
    return {"E": COLOURS[0], "B": COLOURS[2], "D": COLOURS[4]}[name[0]]


def bars(axes: Axes, heights: dict[str, float], title: str) -> None:
    axes.bar([*heights], [*heights.values()], color=[colour_of(name) for name in heights])
    axes.set_ylabel(title)
    axes.grid(False, axis="x")
