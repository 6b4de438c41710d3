"""The size of each block's output, and how much it varies during a run (figures 3b and 3c of the paper)."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from evaluation.plots.blocks import evolution, plain_outputs
from evaluation.plots.drawing import COLOURS, Drawing, new_figure
from evaluation.plots.experiment import Experiment
from ldm.io.errors import fault_of


def make(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the norms of every block's output over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps)
    with fault_of("steps"):
        norms = evolution(plain_outputs(*engine.plain_run(experiment.items))).norm
    found = {name: values.mean(1) for name, values in norms.items()}
    figure = new_figure(9, 3.2)
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
        "Frobenius norm of the mean over channels of each block's output, mean over the images, at the "
        f"{len(found['B'])} steps of a plain DDIM run. Boxes: quartiles "
        "over the steps; whiskers: 1.5 times the interquartile range. Blue: encoder; green: middle; orange: "
        "decoder.",
        {name: {"norm": values, "deviation": values.std(), "percent": shares[name]} for name, values in found.items()},
    )


def colour_of(name: str) -> str:
    """The colour of a block: by its part of the UNet (E, B or D)."""
    return {"E": COLOURS[0], "B": COLOURS[2], "D": COLOURS[4]}[name[0]]


def points(axes: Axes, heights: Mapping[str, float]) -> None:
    """Draw the heights as points on a logarithmic axis, on which a bar would have no lower end."""
    for name, height in heights.items():
        axes.plot(name, height, "o", color=colour_of(name), markeredgecolor="black", markeredgewidth=0.6)
        axes.annotate(
            f"{height:.2g}", (name, height), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6.5
        )
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.1)
