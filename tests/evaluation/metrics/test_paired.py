"""Measures of pairs of images."""

from __future__ import annotations

import pytest
import torch

from evaluation.metrics.paired import load_ssim
from ldm.io.images import psnr


def test_ssim_by_hand():
    """For two flat images only brightness is left: (2ab + c) / (a^2 + b^2 + c), c = 0.01^2, on 0..1."""
    a, b = torch.full((1, 3, 16, 16), -0.6), torch.full((1, 3, 16, 16), 0.2)  # 0.2 and 0.6
    ssim = load_ssim()
    assert ssim(a, b).item() == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4), rel=1e-5)
    assert ssim(a, a).item() == pytest.approx(1)
    assert torch.isinf(psnr(a, a)).all()
