"""What the CLIP image encoders look at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green, blue in the images CLIP was trained on, 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(x: Tensor, size: int, antialias: bool) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised as CLIP expects; stretched, not cropped.

    antialias: smooth before shrinking. PyTorch's filter does that here, the published models were trained with
    another (a Gaussian blur); without it the resize is the published one.

    Raises:
        ValueError: x is not three channels.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W); got {tuple(x.shape)}")
    corners = None if antialias else True
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=corners, antialias=antialias)
    mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((x + 1) / 2 - mean) / std
