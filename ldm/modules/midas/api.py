"""Depth from images, for the depth-conditioned model of Stable Diffusion 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.midas.dpt import DPTHybrid

SIDE = 384  # near which the network was trained


def near_side(height: int, width: int) -> tuple[int, int]:
    """The size at which depth is estimated: one side is `SIDE`, the aspect kept, in multiples of 32.

    Of the two factors that bring a side to `SIDE` the one nearer to 1 is taken, as published.
    """
    factor = min(SIDE / width, SIDE / height, key=lambda f: abs(1 - f))
    return tuple(max(32, round(factor * side / 32) * 32) for side in (height, width))


class MiDaSInference(nn.Module):
    """MiDaS with its weights from the diffusion model's checkpoint; frozen.

    Args:
        model_type: "dpt_hybrid", the one that published models use.
        settings: of another size of `DPTHybrid`.

    Raises:
        ValueError: another model_type.
    """

    def __init__(self, model_type: str = "dpt_hybrid", settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if model_type != "dpt_hybrid":
            raise ValueError(f"model_type must be 'dpt_hybrid'; got {model_type!r}")
        self.model = DPTHybrid(**(settings or {})).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size -> inverse depth (B, 1, h, w) at about `SIDE`."""
        return self.model(F.interpolate(image, size=near_side(*image.shape[2:]), mode="bicubic"))
