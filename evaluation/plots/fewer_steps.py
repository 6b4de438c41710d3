"""Fewer steps or encoder propagation, with and without prior noise (figures 7, 13, 14 and table 11 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr

METHODS = {  # plan, weight of the prior noise
    "plain": ("off", 0.0),
    "plain, prior noise": ("off", NOISE_WEIGHT),
    "encoder propagation": ("faster-diffusion", 0.0),
    "encoder propagation, prior noise": ("faster-diffusion", NOISE_WEIGHT),
}
SAMPLERS = ("ddim", "dpm-solver++")


def make(experiment: Experiment, *, steps: int, step_counts: Sequence[int]) -> Drawing:
    """Draw the distance of each method and number of steps from the plain run of `steps` steps."""
    counts = sorted(set(step_counts), reverse=True)
    width = CELL * len(counts)
    figure = new_figure(1.2 + 2 * width, 3.3 + CELL * len(METHODS))
    upper, lower = figure.subfigures(2, 1, height_ratios=[CELL * len(METHODS) + 0.5, 2.8])
    parts = upper.subfigures(1, 2, width_ratios=[1.2 + width, width])
    charts = lower.subplots(1, 2, sharey=True)
    values: dict[str, dict[str, list[float | None]]] = {}
    for sampler, part, axes in zip(SAMPLERS, parts, charts, strict=True):
        reference = experiment.images(experiment.engine(sampler, steps))
        rows, values[sampler] = [], {}
        for (method, (plan, noise)), colour, marker in zip(METHODS.items(), COLOURS, MARKERS, strict=False):
            sampled = [experiment.images(experiment.engine(sampler, count, plan, noise)) for count in counts]
            rows.append([images[0] for images in sampled])
            distance = [float(psnr(images, reference).mean()) for images in sampled]
            values[sampler][method] = [d if d < float("inf") else None for d in distance]
            axes.plot(counts, distance, "--" if noise else "-", color=colour, marker=marker, markersize=4, label=method)
        image_grid(part, rows, [f"{count}" for count in counts], [*METHODS] if part is parts[0] else ())
        part.suptitle(f"{sampler}, steps:", fontsize=8)
        axes.set_xlabel(f"{sampler} steps")
        axes.set_xscale("log")
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.invert_xaxis()
    charts[0].set_ylabel(f"PSNR to the plain\n{steps} steps (dB)")
    lower.legend(*charts[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS), fontsize=7)
    return Drawing(
        figure,
        f"Images: “{experiment.labels[0]}”. Key timesteps of the paper, scaled to each number of "
        f"steps; prior noise {NOISE_WEIGHT:g} in every step below t = 500. PSNR to the plain "
        f"run of the same sampler with {steps} steps, mean over the images; the plain run with {steps} steps "
        "is that run itself.",
        {"steps": counts, "psnr": values},
    )
