"""Prior noise injection: images, their low and high frequencies, and amplitude spectra (figure 6 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.plots.drawing import CELL, COLOURS, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.arguments import NOISE_WEIGHT

CUT = 0.125  # cycles per pixel between low and high frequencies; 0.5 is the highest frequency of an image
METHODS = {
    "plain": ("off", 0.0),
    "encoder propagation": ("faster-diffusion", 0.0),
    "encoder propagation, prior noise": ("faster-diffusion", NOISE_WEIGHT),
}
CONTRAST = 2.0  # the high frequencies are faint


def make(experiment: Experiment, *, steps: int) -> Drawing:
    """Draw images and spectra of `steps` DDIM steps: plain, with encoder propagation, and with prior noise as well."""
    sampled = {name: experiment.images(experiment.engine("ddim", steps, *how)) for name, how in METHODS.items()}
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
