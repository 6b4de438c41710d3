"""Timelines of plans: which parts of the UNet run at which step, and which steps run together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from evaluation.plots.drawing import COLOURS, Drawing, canvas
from evaluation.plots.scene import Scene
from ldm.io.errors import blame
from ldm.models.diffusion.propagation.plan import Plan, Work

ENCODER, DECODER, IDLE = COLOURS[0], COLOURS[4], "#ECECEC"
BLOCKS = 12  # on each side, as Stable Diffusion has; a shallow step's bar is as high as its share of them
HEIGHT = 0.4  # of one side's bar; the rows of plans are 1 apart


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    with blame("--plans"):
        plans = {spec: scene.plan(spec, "ddim", args.steps) for spec in args.plans}
        if decided_later := [spec for spec, plan in plans.items() if not isinstance(plan, Plan)]:
            raise ValueError(f"{', '.join(decided_later)} decides during the run; expected plans that are known ahead")
    figure = canvas(9, 0.9 + 0.45 * len(plans))
    draw(figure.subplots(), plans)
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
        f"Which parts of the UNet run at which of {args.steps} DDIM steps; the steps in a frame "
        "wait for nothing but their key step and can run together. Drawn from the plans.",
        {spec: {"keys": plan.keys} for spec, plan in plans.items()},
        pictured=False,
    )


def draw(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """One row for each plan: above the line what runs of the encoder, below it what runs of the decoder.

    A frame is around steps that are computed together, as far as nothing but their key step is waited for.
    """
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
    """What runs of encoder and decoder at each step, 0..1."""
    shallow = plan.branch / BLOCKS
    of = {Work.FULL: (1.0, 1.0), Work.DECODER: (plan.refresh / BLOCKS, 1.0), Work.SHALLOW: (shallow, shallow)}
    return [of[work] for work in plan.works()]


def together(plan: Plan) -> list[tuple[int, int]]:
    """First step and end of each run of steps that wait for nothing but their key step."""
    return [(batch.nodes.start, batch.nodes.stop) for batch in replace(plan, parallel=plan.num_nodes).batches()]
