"""Figures of images side by side: samplers, variants of propagation, fewer steps, prior noise, key timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, image_grid, new_figure, note
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.io.images import psnr
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.sampling.engine import Engine

# Plain and accelerated images of several samplers (figures 18 to 24 of the paper)


def draw_samplers(experiment: Experiment, *, samplers: Sequence[tuple[str, int]]) -> Drawing:
    """Draw the images of each sampler and number of steps."""
    widths = [2.1 * CELL] * len(samplers)
    figure = new_figure(1.2 + sum(widths), 0.9 + CELL * experiment.count)
    widths[0] += 1.2  # for the labels
    parts = figure.subfigures(1, len(samplers), squeeze=False, width_ratios=widths)[0]
    values = {}
    for k, ((sampler, steps), part) in enumerate(zip(samplers, parts, strict=True)):
        plain = experiment.images(experiment.engine(sampler, steps))
        fast = experiment.images(engine := experiment.engine(sampler, steps, "faster-diffusion", NOISE_WEIGHT))
        distance = psnr(fast, plain).mean()
        keys, nodes = engine.plan.keys, engine.plan.num_nodes
        values[f"{sampler}:{steps}"] = {"psnr": distance, "keys": keys}
        labels = experiment.labels if k == 0 else ()
        image_grid(part, [*zip(plain, fast, strict=True)], ["plain", "accelerated"], labels)
        part.suptitle(f"{sampler}, {steps} steps\n{len(keys)} of {nodes} key, {distance:.1f} dB", fontsize=8)
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
    runs = {name: load_plan(plan, nodes, nodes, propagate) for name, (plan, propagate) in VARIANTS.items()}
    runs = {"plain": load_plan("off", nodes)} | runs
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
        axes.set(xlabel=f"{sampler} steps", xscale="log")
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
    frequencies, plain = spectra["plain"]
    for (name, (_, amplitudes)), colour, line in zip(spectra.items(), COLOURS, ("-", "--", "-."), strict=False):
        absolute.plot(frequencies, amplitudes, line, color=colour, label=name)
        ratio.plot(frequencies, 20 * torch.log10(amplitudes / plain), line, color=colour)
    absolute.set(yscale="log", ylabel="amplitude (grey levels −1 to 1)")
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
        {"frequencies": frequencies, "amplitudes": {name: s[1] for name, s in spectra.items()}},
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


# Number and placement of the key timesteps: the strategies of table 5 and figure 9, and calibrated ones

Points = dict[str, dict[str, Any]]  # plan -> the values of its point, see `errors`

# By plan, as table 5 calls them.
STRATEGIES = {f"uniform-{k}": f"uniform {numeral}" for k, numeral in enumerate(("I", "II", "III"), 1)}
STRATEGIES |= {f"nonuniform-{k}": f"non-uniform {numeral}" for k, numeral in enumerate(("I", "II", "III", "IV"), 1)}
UNIFORM = ("uniform:2", "uniform:3", "uniform:4", "uniform:6", "uniform:8", "uniform:12")
CALIBRATED = ("auto:5", "auto:7", "auto:9", "auto:13", "auto:18", "auto:25")
# Label of each series -> plans, propagation, colour and marker.
SERIES = {
    "every n-th step, held": (UNIFORM, "hold", COLOURS[0], "o-"),
    "every n-th step, quadratic": (UNIFORM, "quadratic", COLOURS[0], "o--"),
    "calibrated (auto), held": (CALIBRATED, "hold", COLOURS[2], "s-"),
    "calibrated (auto), quadratic": (CALIBRATED, "quadratic", COLOURS[2], "s--"),
    "table 5, held": ((*STRATEGIES,), "hold", COLOURS[1], "D"),
}
SHOWN = 3  # images beside the curves


def draw_placement(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw the error of each plan over `steps` DDIM steps against its number of key timesteps."""
    plans, remark = experiment.plans(
        {(label, spec): (spec, "ddim", steps, how) for label, (specs, how, *_) in SERIES.items() for spec in specs}
    )
    engine = experiment.engine("ddim", steps)
    found, rows = errors(experiment, engine, plans)
    columns = min(SHOWN, experiment.count)
    figure = new_figure(5.4 + CELL * 0.85 * columns, 0.5 + CELL * 0.72 * len(rows))
    left, right = figure.subfigures(1, 2, width_ratios=[4.3, 1.2 + CELL * 0.85 * columns])
    axes = left.subplots()
    chart(axes, found)
    share, nodes = engine.unit.encode / engine.unit.whole, engine.plan.num_nodes
    percent = lambda k: 100 * (1 - share * (1 - k / nodes)), lambda m: nodes * (1 - (1 - m / 100) / share)
    axes.secondary_xaxis("top", functions=percent).set_xlabel("MACs of the UNet, % of the plain run")
    image_grid(right, [*rows.values()], [""] * columns, [*rows])
    shown = "”, “".join(experiment.labels[:SHOWN])
    return Drawing(
        figure,
        f"Strategies for the key timesteps of {steps} DDIM steps, without prior noise; labels are "
        "those of the paper's table 5 (u: uniform, n: non-uniform); n IV is its own. Between key "
        "timesteps the features are held, or extrapolated from the last three (quadratic). Markers: mean "
        f"over the images; bars: two standard errors.{remark} Images: “{shown}”, with the mean "
        "PSNR to the plain run over all images.",
        found,
    )


def errors(
    experiment: Experiment, engine: Engine, plans: Mapping[tuple[str, str], AnyPlan]
) -> tuple[dict[str, Points], dict[str, list[Tensor]]]:
    """The distance of each plan from the plain run, by series and plan; and rows of images for the strategies.
    `engine`: of the plain run. `plans`: by series and name."""
    plain = experiment.latents(engine)
    plain_images = experiment.decode(engine, plain)
    found: dict[str, Points] = {label: {} for label in SERIES}
    rows = {"plain": list(plain_images[:SHOWN])}
    for (label, spec), plan in plans.items():
        engine = experiment.engine("ddim", engine.recipe.steps, plan)
        images = experiment.decode(engine, latents := experiment.latents(engine))
        error = (latents - plain).square().flatten(1).mean(1).cpu().numpy()
        found[label][spec] = {"keys": len(plan.keys), "mean": error.mean(), "standard_error": standard_error(error)}
        found[label][spec] |= {"mse": error, "psnr": (ratio := psnr(images, plain_images).mean())}
        if spec in STRATEGIES:
            rows[f"{STRATEGIES[spec]}\n{ratio:.1f} dB"] = list(images[:SHOWN])
    return found, rows


def standard_error(values: np.ndarray) -> np.floating:
    """The standard error of the mean of (N,) values; 0 for a single value, whose error is unknown."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.float64(0)


def chart(axes: Axes, found: Mapping[str, Points]) -> None:
    """Draw the error against the number of key timesteps, a curve for each series that has points."""
    for label, (_, propagate, colour, marker) in SERIES.items():
        points = sorted(found[label].values(), key=lambda point: point["keys"])
        if not points:
            continue
        means, errors = (np.array([point[name] for point in points]) for name in ("mean", "standard_error"))
        lower = np.minimum(2 * errors, 0.9 * means)  # a logarithmic axis has no 0
        style = {"fmt": marker, "color": colour, "label": label, "markersize": 4, "elinewidth": 0.7}
        style["markerfacecolor"] = colour if propagate == "hold" else "white"
        axes.errorbar([point["keys"] for point in points], means, yerr=[lower, 2 * errors], **style)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.08)
    for spec, point in found["table 5, held"].items():
        kind, _, numeral = STRATEGIES[spec].rpartition(" ")
        note(axes, f"{kind[0]} {numeral}", (point["keys"], point["mean"]), (6, 1), fontsize=7)
    axes.set(xlabel="key timesteps", ylabel="latents' mean squared error to the plain run")
    axes.legend()
