"""Prior noise injection: pictures, their low and high frequencies, and amplitude spectra (the paper's figure 6)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from evaluation.plots.drawing import CELL, COLOURS, Drawing, canvas, picture_rows
from evaluation.plots.scene import Scene
from ldm.cli.arguments import NOISE_WEIGHT

CUT = 0.125  # cycles per pixel between low and high frequencies; 0.5 is the finest that a picture can hold
METHODS = {
    "plain": ("off", 0.0),
    "encoder propagation": ("faster-diffusion", 0.0),
    "encoder propagation, prior noise": ("faster-diffusion", NOISE_WEIGHT),
}
CONTRAST = 2.0  # of the high frequencies, which are faint


def make(scene: Scene, args: argparse.Namespace) -> Drawing:
    made = {name: scene.pictures(scene.engine("ddim", args.steps, *how)) for name, how in METHODS.items()}
    rows = []
    for pictures in made.values():
        low = below(pictures[:2], CUT)
        high = CONTRAST * (pictures[:2] - low)
        rows.append([part[k] for k in range(len(low)) for part in (pictures, low, high)])
    columns = ["picture", "low frequencies", "high frequencies"] * min(2, scene.count)
    figure = canvas(1.5 + CELL * len(columns), 3.2 + CELL * len(rows))
    upper, lower = figure.subfigures(2, 1, height_ratios=[CELL * len(rows) + 0.3, 2.6])
    picture_rows(upper, rows, columns, [*made])
    absolute, ratio = lower.subplots(1, 2)
    spectra = {name: spectrum(pictures) for name, pictures in made.items()}
    for (name, (frequencies, amplitudes)), colour, line in zip(
        spectra.items(), COLOURS, ("-", "--", "-."), strict=False
    ):
        absolute.plot(frequencies, amplitudes, line, color=colour, label=name)
        ratio.plot(frequencies, 20 * torch.log10(amplitudes / spectra["plain"][1]), line, color=colour)
    absolute.set_yscale("log")
    absolute.set_ylabel("amplitude (grey levels −1 to 1)")
    absolute.legend(fontsize=7)
    ratio.set_ylabel("amplitude against the plain run's (dB)")
    for axes in (absolute, ratio):
        axes.set_xlabel("frequency (cycles per pixel)")
        axes.axvline(CUT, color="#999999", linewidth=0.8, linestyle=":")
    return Drawing(
        figure,
        f"{args.steps} DDIM steps, the paper's key steps, prior noise {NOISE_WEIGHT:g} in every "
        "step below t = 500. Low and high frequencies are those below and above "
        f"{CUT:g} cycles per pixel (dotted); the high ones at {CONTRAST:g} times their contrast. "
        "Spectra: amplitude of the grey pictures, mean over directions and pictures.",
        {"frequencies": spectra["plain"][0], "amplitudes": {name: s[1] for name, s in spectra.items()}},
    )


def radii(height: int, width: int) -> Tensor:
    """Frequency of each coefficient of `fft2`, cycles per pixel, (H, W)."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])


def below(pictures: Tensor, cut: float) -> Tensor:
    """The pictures (B, C, H, W) without the frequencies from `cut` (cycles per pixel) on."""
    keep = radii(*pictures.shape[-2:]) < cut
    return torch.fft.ifft2(torch.fft.fft2(pictures) * keep).real


def spectrum(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean amplitude of (B, 3, H, W) in rings of one period per picture: frequencies in cycles per pixel, amplitudes.

    An amplitude is that of a wave in the grey picture: cos(2 pi f x) has 1/2 at f and at -f.
    """
    grey = pictures.double().mean(1)
    height, width = grey.shape[-2:]
    amplitude = torch.fft.fft2(grey).abs().mean(0) / (height * width)  # (H, W)
    side = min(height, width)
    ring = (radii(height, width).double() * side).round().long().flatten()
    totals = torch.zeros(int(ring.max()) + 1, dtype=torch.float64).index_add(0, ring, amplitude.flatten())
    rings = slice(1, side // 2 + 1)  # the mean is no wave; beyond there are corners only
    return torch.arange(side)[rings] / side, (totals / torch.bincount(ring))[rings]
