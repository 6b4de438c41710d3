"""Feature maps as colours."""

from __future__ import annotations

import pytest
import torch

from evaluation.plots.features import colours


def test_three_components_of_three_channels_are_all():
    maps = torch.rand(4, 3, 5, 5)
    shown, share = colours(maps)
    assert shown.shape == (4, 3, 5, 5) and share == pytest.approx(1)
    assert float(shown.min()) == -1 and float(shown.max()) == 1


def test_the_first_component_is_where_the_variance_is():
    maps = torch.zeros(2, 6, 4, 4)
    maps[:, 4] = torch.linspace(-1, 1, 32).view(2, 4, 4)
    maps[:, 1] = 1e-3 * torch.rand(2, 4, 4)
    shown, share = colours(maps)
    red = torch.corrcoef(torch.stack([shown[:, 0].flatten(), maps[:, 4].flatten()]))[0, 1]
    assert red > 0.99 and share > 0.999  # and of the right sign


def test_constant_maps_are_one_colour():
    shown, share = colours(torch.ones(2, 5, 3, 3))
    assert share == 1 and torch.isfinite(shown).all() and (shown == shown[:1, :, :1, :1]).all()
