"""Plain and accelerated pictures side by side, for several samplers (the paper's galleries)."""

from __future__ import annotations

import argparse

from evaluation.plots.drawing import CELL, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    width = 2.1 * CELL
    figure = canvas(1.2 + width * len(args.samplers), 0.9 + CELL * scene.count)
    parts = figure.subfigures(
        1, len(args.samplers), squeeze=False, width_ratios=[1.2 + width, *[width] * (len(args.samplers) - 1)]
    )[0]
    values = {}
    for k, ((sampler, steps), part) in enumerate(zip(args.samplers, parts, strict=True)):
        plain = scene.pictures(scene.engine(sampler, steps))
        fast = scene.pictures(engine := scene.engine(sampler, steps, "faster-diffusion", NOISE_WEIGHT))
        distance = psnr(fast, plain).mean()
        values[f"{sampler}:{steps}"] = {"psnr": distance, "keys": engine.plan.keys}
        picture_rows(part, [*zip(plain, fast, strict=True)], ["plain", "accelerated"], scene.names if k == 0 else ())
        part.suptitle(
            f"{sampler}, {steps} steps\n{len(engine.plan.keys)} of {engine.plan.num_nodes} key, {distance:.1f} dB",
            fontsize=8,
        )
    return Drawing(
        figure,
        "Plain and with encoder propagation (the paper's key steps, scaled where it lists none for "
        f"so many) and prior noise {NOISE_WEIGHT:g}, from the same noise. Numbers: key steps of the "
        "predictions, and mean PSNR between the two.",
        values,
    )
