"""How a video begins: the latents of one image, moved for each frame (Text2Video-Zero, arXiv 2303.13439)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FIELD = 512  # height and width of the field of motion, whatever the size of the image, as published


def moved(latents: Tensor, frames: Sequence[int], strength: tuple[float, float]) -> Tensor:
    """The latents as they are seen at each frame, when the camera moves evenly; mirrored at the borders.

    Args:
        latents: (1, C, h, w), or one for each frame.
        frames: numbers of the frames; the motion is so many times the strength.
        strength: how far the camera moves to the right and down with each frame, in 512ths of the image; what is
            seen moves to the left and up.

    Returns:
        (len(frames), C, h, w); values are copied, none is computed.
    """
    height, width = latents.shape[2:]
    grids = [_grid(height, width, strength[0] * frame, strength[1] * frame) for frame in frames]
    grid = torch.stack(grids).to(latents)  # (F, h, w, 2)
    return F.grid_sample(
        latents.expand(len(frames), -1, -1, -1), grid, mode="nearest", padding_mode="reflection", align_corners=False
    )


def _grid(height: int, width: int, right: float, down: float) -> Tensor:
    """Where each position of the latents comes from, (h, w, 2): x and y from -1 to 1."""
    x, y = _along(width, right), _along(height, down)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def _along(size: int, shift: float) -> Tensor:
    """The same in one direction, (size,)."""
    field = (torch.arange(FIELD) + shift) / FIELD * 2 - 1
    return F.interpolate(field[None, None], size, mode="linear", align_corners=False)[0, 0]


def noised_again(x: Tensor, noise: Tensor, alphas_cumprod: Tensor, low: int, high: int) -> Tensor:
    """Latents of timestep `low` at the noise level of timestep `high`: x_high ~ q(x_high | x_low).

    Args:
        noise: unit normal, as the latents (B, C, h, w).

    The kept share of the variance is the product of 1 - beta over the timesteps low..high-1, as published.
    """
    kept = alphas_cumprod[high - 1] / (alphas_cumprod[low - 1] if low else 1.0)
    return kept.sqrt() * x + (1 - kept).sqrt() * noise
