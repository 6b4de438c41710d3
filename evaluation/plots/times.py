"""Sampling time of plain sampling and of serial and parallel encoder propagation (figure 5 of the paper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from evaluation.plots.drawing import COLOURS, Drawing, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.sampling.engine import Engine
from ldm.sampling.generate import Item, Make


def draw_times(experiment: Experiment, *, samplers: Sequence[tuple[str, int]], repeats: int) -> Drawing:
    """Draw the seconds per image of each sampler and number of steps, median of `repeats` runs."""
    load = os.getloadavg()[0]
    found = {
        f"{sampler}, {steps}": measure(methods(experiment, sampler, steps), experiment.items, repeats)
        for sampler, steps in samplers
    }
    figure = new_figure(2.8 + 1.5 * len(found), 3.4)
    axes = figure.subplots()
    names = list(next(iter(found.values())))
    for k, (name, colour) in enumerate(zip(names, ("#999999", COLOURS[5], COLOURS[0]), strict=True)):
        runs = [found[sampler][name] for sampler in found]
        middle = np.array([np.median(seconds) for seconds in runs])
        spread = [middle - [min(seconds) for seconds in runs], [max(seconds) for seconds in runs] - middle]
        bars = axes.bar(
            np.arange(len(runs)) + 0.27 * (k - 1),
            middle,
            0.25,
            yerr=spread,
            color=colour,
            label=name,
            error_kw={"linewidth": 0.8},
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=6.5, padding=2)
    axes.set_xticks(range(len(found)), [f"{name} steps" for name in found])
    axes.grid(False, axis="x")
    axes.set_ylabel("seconds per image, with the first stage")
    figure.legend(loc="outside upper center", ncols=len(names))
    return Drawing(
        figure,
        f"Median of {repeats} runs of {experiment.count} images in one batch; the three methods take "
        "turns, after one run of each that is not timed. Lines: fastest and slowest. Device "
        f"{experiment.setup.device.type}, threads: {torch.get_num_threads()}; load of the machine "
        f"before: {load:.1f} on {os.cpu_count()} cores (timings on a busy machine are worthless).",
        {"seconds": found, "load": load},
    )


def methods(experiment: Experiment, sampler: str, steps: int) -> dict[str, Engine]:
    """The engines that are compared, by name."""
    fast = experiment.plan("faster-diffusion", sampler, steps)
    return {
        "plain": experiment.engine(sampler, steps),
        "serial": experiment.engine(sampler, steps, replace(fast, parallel=1), NOISE_WEIGHT),
        "parallel": experiment.engine(sampler, steps, fast, NOISE_WEIGHT),
    }


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
