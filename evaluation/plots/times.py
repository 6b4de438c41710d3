"""Sampling time as bars: plain, serial and parallel encoder propagation, measured in the same run (figure 5)."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

import numpy as np
import torch

from evaluation.plots.drawing import COLOURS, Drawing, canvas
from evaluation.plots.scene import Scene
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.sampling.engine import Engine


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    load = os.getloadavg()[0]
    found = {
        f"{sampler}, {steps}": measure(methods(scene, sampler, steps), scene, args.repeats)
        for sampler, steps in args.samplers
    }
    figure = canvas(2.8 + 1.5 * len(found), 3.4)
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
    axes.set_ylabel("seconds per picture, with the first stage")
    figure.legend(loc="outside upper center", ncols=len(names))
    return Drawing(
        figure,
        f"Median of {args.repeats} runs of {scene.count} pictures in one batch, the three methods "
        "in turn, after a run of each that is not timed; lines: fastest and slowest. Device "
        f"{scene.setup.device.type}, threads: {torch.get_num_threads()}; load of the machine "
        f"before: {load:.1f} on {os.cpu_count()} cores (what else runs makes timings worthless).",
        {"seconds": found, "load": load},
    )


def methods(scene: Scene, sampler: str, steps: int) -> dict[str, Engine]:
    fast = scene.plan("faster-diffusion", sampler, steps)
    return {
        "plain": scene.engine(sampler, steps),
        "serial": scene.engine(sampler, steps, replace(fast, parallel=1), NOISE_WEIGHT),
        "parallel": scene.engine(sampler, steps, fast, NOISE_WEIGHT),
    }


def measure(engines: dict[str, Engine], scene: Scene, repeats: int) -> dict[str, list[float]]:
    """Seconds per picture of each method and repetition; the methods take turns, so that all see the same machine.

    Before, each runs once untimed: the first run pays for memory and compiled kernels.
    """
    for engine in engines.values():
        engine(scene.items)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            seconds[name].append(engine(scene.items)[1]["seconds"])
    return seconds
