"""Fewer steps against encoder propagation, with and without prior noise (figures 7, 13 and 14, table 11)."""

from __future__ import annotations

import argparse

from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr

METHODS = {
    "plain": ("off", 0.0),
    "plain, prior noise": ("off", NOISE_WEIGHT),  # plan, weight of the noise
    "encoder propagation": ("faster-diffusion", 0.0),
    "encoder propagation, prior noise": ("faster-diffusion", NOISE_WEIGHT),
}
SAMPLERS = ("ddim", "dpm-solver++")


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    counts = sorted(set(args.step_counts), reverse=True)
    width = CELL * len(counts)
    figure = canvas(1.2 + 2 * width, 3.3 + CELL * len(METHODS))
    upper, lower = figure.subfigures(2, 1, height_ratios=[CELL * len(METHODS) + 0.5, 2.8])
    parts = upper.subfigures(1, 2, width_ratios=[1.2 + width, width])
    charts = lower.subplots(1, 2, sharey=True)
    values: dict[str, dict[str, list[float | None]]] = {}
    for sampler, part, axes in zip(SAMPLERS, parts, charts, strict=True):
        reference = scene.pictures(scene.engine(sampler, args.steps))
        rows, values[sampler] = [], {}
        for (method, (plan, noise)), colour, marker in zip(METHODS.items(), COLOURS, MARKERS, strict=False):
            made = [scene.pictures(scene.engine(sampler, steps, plan, noise)) for steps in counts]
            rows.append([pictures[0] for pictures in made])
            distance = [float(psnr(pictures, reference).mean()) for pictures in made]
            values[sampler][method] = [d if d < float("inf") else None for d in distance]
            axes.plot(counts, distance, "--" if noise else "-", color=colour, marker=marker, markersize=4, label=method)
        picture_rows(part, rows, [f"{steps}" for steps in counts], [*METHODS] if part is parts[0] else ())
        part.suptitle(f"{sampler}, steps:", fontsize=8)
        axes.set_xlabel(f"{sampler} steps")
        axes.set_xscale("log")
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.invert_xaxis()
    charts[0].set_ylabel(f"PSNR to the plain\n{args.steps} steps (dB)")
    lower.legend(*charts[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS), fontsize=7)
    return Drawing(
        figure,
        f"Pictures: “{scene.names[0]}”. Key steps of the paper, scaled to each number of "
        f"steps; prior noise {NOISE_WEIGHT:g} in every step below t = 500. PSNR to the plain "
        f"run of the same sampler with {args.steps} steps, mean over the pictures; plain with as "
        "many is that run itself.",
        {"steps": counts, "psnr": values},
    )
