"""How an image comes to the size that a network looks at: recipes by name.

The recipe changes a Fréchet distance by as much as a model does, so every result names it.
Source: On Aliased Resizing and Surprising Subtleties in GAN Evaluation (arXiv 2104.11222).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.io.images import to_pil


def clean(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic filter, smoothed when it shrinks, one channel at a time and without rounding to levels."""
    channels = images.detach().float().cpu().flatten(0, 1).numpy()  # (B*3, H, W)
    resized = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2]).clamp(-1, 1).to(images)


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """What TensorFlow 1 did: the pixel at i is read at i * old / new, corners not aligned, nothing smoothed."""

    def between(x: Tensor, dim: int) -> Tensor:
        old = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(old / size, dtype=torch.float32)
        low = at.long()
        share = (at - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
        first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=old - 1))
        return first + (second - first) * share

    return between(between(images, 3), 2)


def torch_bilinear(images: Tensor, size: int) -> Tensor:
    """PyTorch's bilinear resize as most ports of the score use it: pixel centres, nothing smoothed."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def torch_antialias(images: Tensor, size: int) -> Tensor:
    """PyTorch's bilinear resize, smoothed when it shrinks."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def clip_crop(images: Tensor, size: int) -> Tensor:
    """What CLIP's authors do: 8 bits, Pillow's bicubic filter for the shorter side, the middle cut out."""
    return torch.stack([_middle(image, size) for image in to_pil(images)]).to(images)


def _middle(image: Image.Image, size: int) -> Tensor:
    short = min(image.size)
    width, height = (max(size, int(size * side / short)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1  # (3, size, size)


RECIPES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": clean,
    "tf1-bilinear": tf1_bilinear,
    "torch-bilinear": torch_bilinear,
    "torch-antialias": torch_antialias,
    "clip-crop": clip_crop,
}


def resize(images: Tensor, size: int, recipe: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size); each depends on itself alone.

    Raises:
        ValueError: the recipe is not one of RECIPES, or the images have another shape.
    """
    if recipe not in RECIPES:
        raise ValueError(f"resize: {recipe!r} is not one of {', '.join(RECIPES)}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W); got {tuple(images.shape)}")
    return RECIPES[recipe](images, size)
