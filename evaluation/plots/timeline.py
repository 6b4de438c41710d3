"""Timelines of plans: which parts of the UNet run at which step, and which steps can run in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from evaluation.plots.drawing import COLOURS, Drawing, new_figure
from evaluation.plots.experiment import Experiment
from ldm.io.errors import fault_of
from ldm.models.diffusion.propagation.plan import Compute, Plan

ENCODER, DECODER, IDLE = COLOURS[0], COLOURS[4], "#ECECEC"
BLOCKS = 12  # of encoder and of decoder in Stable Diffusion; the bar of a shallow step is as high as its share of them
HEIGHT = 0.4  # of a bar; the rows of plans are 1 apart


def draw_timeline(experiment: Experiment, *, steps: int, plans: Sequence[str]) -> Drawing:
    """Draw the plans, see `load_plan`, for `steps` DDIM steps."""
    with fault_of("plans"):
        loaded = {spec: experiment.plan(spec, "ddim", steps) for spec in plans}
        if online := [spec for spec, plan in loaded.items() if not isinstance(plan, Plan)]:
            raise ValueError(f"{', '.join(online)} decides during the run; expected plans that are known before")
    figure = new_figure(9, 0.9 + 0.45 * len(loaded))
    draw(figure.subplots(), loaded)
    figure.legend(
        handles=[
            Patch(color=ENCODER, label="encoder and middle"),
            Patch(color=DECODER, label="decoder"),
            Patch(color=IDLE, label="does not run"),
        ],
        loc="outside upper right",
        ncols=3,
    )
    return Drawing(
        figure,
        f"The parts of the UNet that run at each of {steps} DDIM steps. The steps in a frame depend on "
        "their key timestep only, so they can run in one batch. Drawn from the plans.",
        {spec: {"keys": plan.keys} for spec, plan in loaded.items()},
        sampled=False,
    )


def draw(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """Draw a row per plan: bars of the encoder upwards, of the decoder downwards, and a frame around each batch."""
    for row, (name, plan) in enumerate(plans.items()):
        steps = range(plan.num_nodes)
        for side, colour, share in (
            (1, ENCODER, [up for up, _ in shares(plan)]),
            (-1, DECODER, [down for _, down in shares(plan)]),
        ):
            axes.bar(steps, side * HEIGHT, bottom=-row, width=0.9, color=IDLE)
            axes.bar(
                [i for i in steps if share[i]],
                [side * HEIGHT * s for s in share if s],
                bottom=-row,
                width=0.9,
                color=colour,
            )
        for first, stop in together(plan):
            axes.plot(
                [first - 0.5, stop - 0.5, stop - 0.5, first - 0.5, first - 0.5],
                [y - row for y in (0.46, 0.46, -0.46, -0.46, 0.46)],
                color="black",
                linewidth=0.6,
            )
        axes.text(-1, -row, name, ha="right", va="center")
    axes.set_xlim(-0.7, max(plan.num_nodes for plan in plans.values()) - 0.3)
    axes.set_ylim(-len(plans) + 0.4, 0.6)
    axes.grid(False)
    axes.set_yticks([])
    axes.set_xlabel("step, noisiest first")
    axes.spines["left"].set_visible(False)


def shares(plan: Plan) -> list[tuple[float, float]]:
    """The share of the encoder and of the decoder that runs at each step, 0..1."""
    shallow = plan.branch / BLOCKS
    of = {
        Compute.FULL: (1.0, 1.0),
        Compute.DECODER: (plan.refresh / BLOCKS, 1.0),
        Compute.SHALLOW: (shallow, shallow),
        Compute.SKIPPED: (0.0, 0.0),
    }
    return [of[work] for work in plan.computes()]


def together(plan: Plan) -> list[tuple[int, int]]:
    """First step and end of each group of steps that depend on their key timestep only."""
    return [(batch.nodes.start, batch.nodes.stop) for batch in replace(plan, parallel=plan.num_nodes).batches()]
