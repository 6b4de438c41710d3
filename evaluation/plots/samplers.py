"""Plain and accelerated images side by side, for several samplers (figures 18 to 24 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.plots.drawing import CELL, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr


def make(experiment: Experiment, *, samplers: Sequence[tuple[str, int]]) -> Drawing:
    """Draw the images of each sampler and number of steps."""
    width = 2.1 * CELL
    figure = new_figure(1.2 + width * len(samplers), 0.9 + CELL * experiment.count)
    parts = figure.subfigures(
        1, len(samplers), squeeze=False, width_ratios=[1.2 + width, *[width] * (len(samplers) - 1)]
    )[0]
    values = {}
    for k, ((sampler, steps), part) in enumerate(zip(samplers, parts, strict=True)):
        plain = experiment.images(experiment.engine(sampler, steps))
        fast = experiment.images(engine := experiment.engine(sampler, steps, "faster-diffusion", NOISE_WEIGHT))
        distance = psnr(fast, plain).mean()
        values[f"{sampler}:{steps}"] = {"psnr": distance, "keys": engine.plan.keys}
        image_grid(
            part, [*zip(plain, fast, strict=True)], ["plain", "accelerated"], experiment.labels if k == 0 else ()
        )
        part.suptitle(
            f"{sampler}, {steps} steps\n{len(engine.plan.keys)} of {engine.plan.num_nodes} key, {distance:.1f} dB",
            fontsize=8,
        )
    return Drawing(
        figure,
        "Plain sampling, and encoder propagation (the paper's key timesteps, scaled if it lists none for this number "
        f"of steps) with prior noise {NOISE_WEIGHT:g}, from the same noise. Numbers: how many predictions are at key "
        "timesteps, and the mean PSNR between the two.",
        values,
    )
