"""When what runs: timelines of plans, and the sampling time of plain, serial and parallel runs (figure 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from evaluation.plots.drawing import COLOURS, Drawing, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.errors import fault_of
from ldm.models.diffusion.propagation.plan import Compute, Plan
from ldm.sampling.generate import Item, Make

ENCODER, DECODER, IDLE = COLOURS[0], COLOURS[4], "#ECECEC"
BLOCKS = 12  # of encoder and of decoder in Stable Diffusion; the bar of a shallow step is as high as its share of them
HEIGHT = 0.4  # of a bar; the rows of plans are 1 apart


def draw_timeline(experiment: Experiment, *, steps: int, plans: Sequence[str]) -> Drawing:
    """Draw the plans, see `load_plan`, for `steps` DDIM steps: which parts of the UNet run at which step, and which
    steps can run in one batch."""
    with fault_of("plans"):
        loaded = {spec: experiment.plan(spec, "ddim", steps) for spec in plans}
        if online := [spec for spec, plan in loaded.items() if not isinstance(plan, Plan)]:
            raise ValueError(f"{', '.join(online)} decides during the run; expected plans that are known before")
    figure = new_figure(9, 0.9 + 0.45 * len(loaded))
    bars(figure.subplots(), loaded)
    parts = {"encoder and middle": ENCODER, "decoder": DECODER, "does not run": IDLE}
    patches = [Patch(color=colour, label=label) for label, colour in parts.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=3)
    return Drawing(
        figure,
        f"The parts of the UNet that run at each of {steps} DDIM steps. The steps in a frame depend on "
        "their key timestep only, so they can run in one batch. Drawn from the plans.",
        {spec: {"keys": plan.keys} for spec, plan in loaded.items()},
        sampled=False,
    )


def bars(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """Draw a row per plan: bars of the encoder upwards, of the decoder downwards, and a frame around each batch."""
    for row, (name, plan) in enumerate(plans.items()):
        for side, colour, share in zip((1, -1), (ENCODER, DECODER), zip(*shares(plan), strict=True), strict=True):
            axes.bar(range(plan.num_nodes), side * HEIGHT, bottom=-row, width=0.9, color=IDLE)
            running = {i: side * HEIGHT * part for i, part in enumerate(share) if part}
            axes.bar([*running], [*running.values()], bottom=-row, width=0.9, color=colour)
        for first, stop in together(plan):
            left, right, low, high = first - 0.5, stop - 0.5, -0.46 - row, 0.46 - row
            frame = [left, right, right, left, left], [high, high, low, low, high]
            axes.plot(*frame, color="black", linewidth=0.6)
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
    of = {Compute.FULL: (1.0, 1.0), Compute.GATED: (1.0, 1.0), Compute.DECODER: (plan.refresh / BLOCKS, 1.0)}
    of |= {Compute.SHALLOW: (shallow, shallow), Compute.SKIPPED: (0.0, 0.0)}
    return [of[work] for work in plan.computes()]


def together(plan: Plan) -> list[tuple[int, int]]:
    """First step and end of each group of steps that depend on their key timestep only."""
    return [(batch.nodes.start, batch.nodes.stop) for batch in replace(plan, parallel=plan.num_nodes).batches()]


# Sampling time


def draw_times(experiment: Experiment, *, samplers: Sequence[tuple[str, int]], repeats: int) -> Drawing:
    """Draw the seconds per image of each sampler and number of steps, median of `repeats` runs."""
    load = os.getloadavg()[0]
    found: dict[str, dict[str, list[float]]] = {}
    for sampler, steps in samplers:
        fast = experiment.plan("faster-diffusion", sampler, steps)
        engines = {
            "plain": experiment.engine(sampler, steps),
            "serial": experiment.engine(sampler, steps, replace(fast, parallel=1), NOISE_WEIGHT),
            "parallel": experiment.engine(sampler, steps, fast, NOISE_WEIGHT),
        }
        found[f"{sampler}, {steps}"] = measure(engines, experiment.items, repeats)
    figure = new_figure(2.8 + 1.5 * len(found), 3.4)
    axes = figure.subplots()
    colours = {"plain": "#999999", "serial": COLOURS[5], "parallel": COLOURS[0]}
    for k, (name, colour) in enumerate(colours.items()):
        runs = [methods[name] for methods in found.values()]
        middle = np.array([np.median(seconds) for seconds in runs])
        spread = [middle - [min(seconds) for seconds in runs], [max(seconds) for seconds in runs] - middle]
        style = {"color": colour, "label": name, "error_kw": {"linewidth": 0.8}}
        drawn = axes.bar(np.arange(len(runs)) + 0.27 * (k - 1), middle, 0.25, yerr=spread, **style)
        axes.bar_label(drawn, fmt="%.2f", fontsize=6.5, padding=2)
    axes.set_xticks(range(len(found)), [f"{name} steps" for name in found])
    axes.grid(False, axis="x")
    axes.set_ylabel("seconds per image, with the first stage")
    figure.legend(loc="outside upper center", ncols=len(colours))
    return Drawing(
        figure,
        f"Median of {repeats} runs of {experiment.count} images in one batch; the three methods take "
        "turns, after one run of each that is not timed. Lines: fastest and slowest. Device "
        f"{experiment.setup.device.type}, threads: {torch.get_num_threads()}; load of the machine "
        f"before: {load:.1f} on {os.cpu_count()} cores (timings on a busy machine are worthless).",
        {"seconds": found, "load": load},
    )


def measure(engines: Mapping[str, Make], items: Sequence[Item], repeats: int) -> dict[str, list[float]]:
    """Seconds per image of each method and repetition; the methods take turns, so that they share the machine's state.

    Before that each method runs once untimed, since the first run also allocates memory and compiles kernels.
    """
    for engine in engines.values():
        engine(items)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            seconds[name].append(engine(items)[1]["seconds"])
    return seconds
