"""Spectra of images."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.plots.images import low_pass, spectrum


@pytest.mark.parametrize("cycles", [1, 3, 8])
def test_spectrum_of_a_wave_is_at_its_frequency(cycles):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 3, 16, 16)
    frequencies, amplitudes = spectrum(wave)
    assert int(amplitudes.argmax()) == cycles - 1 and float(frequencies[cycles - 1]) == pytest.approx(cycles / 16)
    assert float(amplitudes.sum() - amplitudes.max()) < 1e-6


def test_spectrum_of_a_wave_has_its_amplitude():
    """The ring at 1/16 has the four coefficients (+-1, 0), (0, +-1) and the corners at distance sqrt 2."""
    wave = 0.8 * torch.cos(2 * math.pi * torch.arange(16) / 16).expand(1, 3, 16, 16)
    assert float(spectrum(wave)[1][0]) == pytest.approx(2 * 0.4 / 8)


def test_low_frequencies_keep_slow_waves_and_lose_fast_ones():
    slow, fast = (torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 3, 16, 16) for cycles in (1, 4))
    torch.testing.assert_close(low_pass(1 + slow + fast, 0.125), 1 + slow, rtol=0, atol=1e-5)
