"""Figures of images side by side: samplers, variants of propagation, fewer steps, prior noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan

# Plain and accelerated images of several samplers (figures 18 to 24 of the paper)


def draw_samplers(experiment: Experiment, *, samplers: Sequence[tuple[str, int]]) -> Drawing:
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


# Propagation of the encoder's features, the decoder's, both or neither (figure 16, table 14)
# The paper does not say how the variants are computed; `VARIANTS` says how they are computed here.


# Plan and propagation. Decoder: all but its outermost block is reused, as in DeepCache; both: the prediction is reused;
# neither: the decoder gets zeros.
VARIANTS = {
    "encoder (the paper)": ("faster-diffusion", "hold"),
    "decoder": ("deepcache:faster-diffusion", "hold"),
    "both": ("deepcache:faster-diffusion:0", "hold"),
    "neither (zeros)": ("faster-diffusion", "zeros"),
}


def draw_variants(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the images of every variant over `steps` DDIM steps."""
    engine = experiment.engine("ddim", steps, "faster-diffusion")
    nodes, keys = engine.plan.num_nodes, engine.plan.keys
    runs = {"plain": load_plan("off", nodes)} | {
        name: load_plan(plan, nodes, nodes, propagate) for name, (plan, propagate) in VARIANTS.items()
    }
    model, rule, x = engine.plain_run(experiment.items)
    images = {}
    for name, plan in runs.items():
        *_, state = denoise(model, rule, plan, x)
        images[name] = experiment.decode(engine, state.x)
    distance = {name: psnr(of, images["plain"]).mean() for name, of in images.items() if name != "plain"}
    figure = new_figure(1.5 + CELL * len(images), 0.5 + CELL * experiment.count)
    columns = [name + (f"\n{distance[name]:.1f} dB" if name in distance else "\n") for name in images]
    image_grid(figure, [*zip(*images.values(), strict=True)], columns, experiment.labels)
    return Drawing(
        figure,
        f"Propagation from the key timesteps {', '.join(map(str, keys))} of {steps} "
        "DDIM steps, without prior noise. Numbers: PSNR to the plain run, mean over the images. "
        "Decoder: only its outermost block runs at the other timesteps; both: the key timestep's "
        "prediction is reused; neither: the decoder gets zeros.",
        {"psnr": distance},
    )


# What is decided when: the image that is expected on the way. A model that knows its images by heart expects the
# finished one from pure noise; then neither steps nor key timesteps can matter.

SHOWN = 8  # rows of images


def draw_expected(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the images expected at the first step, after one and two thirds of a plain run, and the finished ones."""
    engine = experiment.engine("ddim", steps)
    model, rule, x = engine.plain_run(experiment.items)
    nodes = len(rule.nodes)
    thirds = sorted({0, nodes // 3, 2 * nodes // 3})
    states = [*denoise(model, rule, load_plan("off", nodes), x)]
    finished = experiment.decode(engine, states[-1].x)
    expected = {i: experiment.decode(engine, states[i].x0) for i in thirds}
    distance = {i: psnr(images, finished) for i, images in expected.items()}
    columns = [f"step {i}\n{distance[i].mean():.1f} dB" for i in thirds]
    rows = [*zip(*expected.values(), finished, strict=True)][:SHOWN]
    figure = new_figure(1.5 + CELL * (len(thirds) + 1), 0.7 + CELL * len(rows))
    image_grid(figure, rows, [*columns, "finished\n"], experiment.labels[:SHOWN])
    return Drawing(
        figure,
        f"The image that is expected on the way of a plain run of {steps} DDIM steps, and the finished one. Numbers: "
        "PSNR between the two, mean over all images. Rows of one prompt differ in their noise.",
        {"psnr": {f"step {i}": {"mean": of.mean(), "images": of} for i, of in distance.items()}},
    )


# Fewer steps or encoder propagation, with and without prior noise (figures 7, 13, 14, table 11)

METHODS = {  # plan, weight of the prior noise
    "plain": ("off", 0.0),
    "plain, prior noise": ("off", NOISE_WEIGHT),
    "encoder propagation": ("faster-diffusion", 0.0),
    "encoder propagation, prior noise": ("faster-diffusion", NOISE_WEIGHT),
}
SAMPLERS = ("ddim", "dpm-solver++")


def draw_fewer_steps(experiment: Experiment, *, steps: int, step_counts: Sequence[int]) -> Drawing:
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


# Prior noise injection: images, their low and high frequencies, and amplitude spectra (figure 6)

CUT = 0.125  # cycles per pixel between low and high frequencies; 0.5 is the highest frequency of an image
CONTRAST = 2.0  # the high frequencies are faint


def draw_prior_noise(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw images and spectra of `steps` DDIM steps: plain, with encoder propagation, and with prior noise as well."""
    shown = {name: how for name, how in METHODS.items() if how != ("off", NOISE_WEIGHT)}
    sampled = {name: experiment.images(experiment.engine("ddim", steps, *how)) for name, how in shown.items()}
    rows = []
    for images in sampled.values():
        low = low_pass(images[:2], CUT)
        high = CONTRAST * (images[:2] - low)
        rows.append([part[k] for k in range(len(low)) for part in (images, low, high)])
    columns = ["image", "low frequencies", "high frequencies"] * min(2, experiment.count)
    figure = new_figure(1.5 + CELL * len(columns), 3.2 + CELL * len(rows))
    upper, lower = figure.subfigures(2, 1, height_ratios=[CELL * len(rows) + 0.3, 2.6])
    image_grid(upper, rows, columns, [*sampled])
    absolute, ratio = lower.subplots(1, 2)
    spectra = {name: spectrum(images) for name, images in sampled.items()}
    for (name, (frequencies, amplitudes)), colour, line in zip(
        spectra.items(), COLOURS, ("-", "--", "-."), strict=False
    ):
        absolute.plot(frequencies, amplitudes, line, color=colour, label=name)
        ratio.plot(frequencies, 20 * torch.log10(amplitudes / spectra["plain"][1]), line, color=colour)
    absolute.set_yscale("log")
    absolute.set_ylabel("amplitude (grey levels −1 to 1)")
    absolute.legend(fontsize=7)
    ratio.set_ylabel("amplitude relative to the plain run (dB)")
    for axes in (absolute, ratio):
        axes.set_xlabel("frequency (cycles per pixel)")
        axes.axvline(CUT, color="#999999", linewidth=0.8, linestyle=":")
    return Drawing(
        figure,
        f"{steps} DDIM steps, the paper's key timesteps, prior noise {NOISE_WEIGHT:g} in every "
        "step below t = 500. Low and high frequencies: below and above "
        f"{CUT:g} cycles per pixel (dotted); the contrast of the high ones is multiplied by {CONTRAST:g}. "
        "Spectra: amplitude of the grey images, mean over directions and images.",
        {"frequencies": spectra["plain"][0], "amplitudes": {name: s[1] for name, s in spectra.items()}},
    )


def radii(height: int, width: int) -> Tensor:
    """Frequency of each coefficient of `fft2` in cycles per pixel, (H, W)."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])


def low_pass(images: Tensor, cut: float) -> Tensor:
    """Images (B, C, H, W) without the frequencies of `cut` cycles per pixel and more."""
    keep = radii(*images.shape[-2:]) < cut
    return torch.fft.ifft2(torch.fft.fft2(images) * keep).real


def spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies in cycles per pixel, and the mean amplitude of (B, 3, H, W) in rings of one period per image.

    The amplitudes are those of waves in the grey image: cos(2 pi f x) has 1/2 at f and at -f.
    """
    grey = images.double().mean(1)
    height, width = grey.shape[-2:]
    amplitude = torch.fft.fft2(grey).abs().mean(0) / (height * width)  # (H, W)
    side = min(height, width)
    ring = (radii(height, width).double() * side).round().long().flatten()
    totals = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add(0, ring, amplitude.flatten())
    rings = slice(1, side // 2 + 1)  # without the mean, which is no wave, and the corners, which are no whole rings
    return torch.arange(side)[rings] / side, (totals / torch.bincount(ring))[rings]
