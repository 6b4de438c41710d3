"""Timelines of plans: which parts of the UNet run at which step, and which steps run together.

    python evaluation/timeline.py --plans off faster-diffusion deepcache:3 --out docs/figures/timeline

Drawn from the plans themselves, for a run of --steps network evaluations; writes .svg and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.arguments import EMOJI64, count
from ldm.cli import Parser, blame, command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ldm.models.diffusion.plan import Plan

# Okabe and Ito's colours, told apart by the colour-blind and, by lightness, in grey.
ENCODER, DECODER, IDLE = "#0072B2", "#E69F00", "#ECECEC"
BLOCKS = 12     # on each side, as Stable Diffusion has; a shallow step's bar is as high as its share of them
HEIGHT = 0.4    # of one side's bar; the rows of plans are 1 apart


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="timeline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plans", nargs="+", required=True, metavar="PLAN", help="as --plan of the sampling scripts")
    p.add_argument("--steps", type=count, default=50, help="network evaluations of the run (default: %(default)s)")
    p.add_argument("--out", required=True, metavar="PATH", help="where to write PATH.svg and PATH.png")
    return p


def draw(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """One row for each plan: above the line what runs of the encoder, below it what runs of the decoder.

    A frame is around steps that are computed together, as far as nothing but their key step is waited for.
    """
    for row, (name, plan) in enumerate(plans.items()):
        for i, (up, down) in enumerate(shares(plan)):
            for share, colour, side in ((up, ENCODER, 1), (down, DECODER, -1)):
                axes.bar(i, side * HEIGHT, bottom=-row, width=0.9, color=IDLE)
                axes.bar(i, side * HEIGHT * share, bottom=-row, width=0.9, color=colour)
        for first, stop in together(plan):
            axes.plot([first - 0.5, stop - 0.5, stop - 0.5, first - 0.5, first - 0.5],
                      [y - row for y in (0.46, 0.46, -0.46, -0.46, 0.46)], color="black", linewidth=0.6)
        axes.text(-1, -row, name, ha="right", va="center")
    axes.set_xlim(-0.7, max(plan.num_nodes for plan in plans.values()) - 0.3)
    axes.set_ylim(-len(plans) + 0.4, 0.6)
    axes.set_yticks([])
    axes.set_xlabel("step, noisiest first")
    for spine in ("left", "right", "top"):
        axes.spines[spine].set_visible(False)


def shares(plan: Plan) -> list[tuple[float, float]]:
    """What runs of encoder and decoder at each step, 0..1."""
    from ldm.models.diffusion.plan import Work

    shallow = plan.branch / BLOCKS
    of = {Work.FULL: (1.0, 1.0), Work.DECODER: (plan.refresh / BLOCKS, 1.0), Work.SHALLOW: (shallow, shallow)}
    return [of[work] for work in plan.works()]


def together(plan: Plan) -> list[tuple[int, int]]:
    """First step and end of each run of steps that wait for nothing but their key step."""
    from dataclasses import replace

    return [(batch.nodes.start, batch.nodes.stop) for batch in replace(plan, parallel=plan.num_nodes).batches()]


def run(args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    from ldm.checkpoint import fingerprint
    from ldm.models.diffusion.plan import Plan
    from ldm.models.diffusion.plans import RunFacts, load_plan

    shipped = RunFacts({"sampler": "ddim", "weights": fingerprint(EMOJI64[1])[:16]}, EMOJI64[1].parent / "calibration")
    with blame("--plans"):
        plans = {spec: load_plan(spec, args.steps, run=shipped) for spec in args.plans}
        if decided_later := [spec for spec, plan in plans.items() if not isinstance(plan, Plan)]:
            raise ValueError(f"{', '.join(decided_later)} decides during the run; expected plans that are known ahead")
    figure, axes = pyplot.subplots(figsize=(9, 0.5 + 0.45 * len(plans)), layout="constrained")
    draw(axes, plans)
    figure.legend(handles=[Patch(color=ENCODER, label="encoder and middle"), Patch(color=DECODER, label="decoder"),
                           Patch(color=IDLE, label="does not run")], loc="outside upper right", ncols=3, frameon=False)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with blame("--out", (OSError,)):
        for suffix in ("svg", "png"):
            figure.savefig(f"{args.out}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)
    print(f"{args.out}.svg, {args.out}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("timeline.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
