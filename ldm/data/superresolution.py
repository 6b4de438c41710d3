"""Pairs of an image and its degraded, smaller version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.degradation import SCALE, degradation
from ldm.data.folder import split_of
from ldm.data.images import corner, cut, in_range, read_pixels, smallest_side, uniform
from ldm.io.files import Share
from ldm.io.images import files_below


class SuperResolution(Dataset, ABC):
    """A square of each image, of random size and place, and its low-resolution version. Subclasses say which images.

    Args:
        size: side of the image.
        degradation: see `ldm.data.degradation.degradation`.
        downscale_f: the low-resolution image has the side size / downscale_f.
        min_crop_f, max_crop_f: least and greatest side of the square, as shares of the image's smaller side.
        random_crop: the square lies anywhere; otherwise in the centre.

    Raises:
        ValueError: an unknown degradation; sizes that do not fit each other.
    """

    def __init__(
        self,
        size: int,
        degradation: str = "bsrgan_light",
        downscale_f: int = SCALE,
        min_crop_f: Share = 0.5,
        max_crop_f: Share = 1.0,
        random_crop: bool = True,
    ):
        if not 0.0 < min_crop_f <= max_crop_f:
            raise ValueError(f"min_crop_f: {min_crop_f} does not lie in (0, max_crop_f={max_crop_f}]")
        if size % downscale_f:
            raise ValueError(f"size: {size} is not a multiple of downscale_f: {downscale_f}")
        if degradation.startswith("bsrgan") and downscale_f != SCALE:
            raise ValueError(f"downscale_f: {degradation} makes a quarter of the size; got {downscale_f}")
        self.paths, self.size, self.random_crop = self.files(), size, random_crop
        self.shares = (min_crop_f, max_crop_f)
        self.degrade = degradation_of(degradation, size // downscale_f)

    @abstractmethod
    def files(self) -> list[Path]:
        """The image files."""

    def __len__(self) -> int:
        return len(self.paths)

    def pair(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An image (H, W, 3) uint8 -> the square and its low-resolution version, uint8."""
        side = max(1, int(min(pixels.shape[:2]) * uniform(*self.shares)))
        square = cut(pixels, *corner(pixels, side, self.random_crop), side)
        square = smallest_side(square, self.size, "INTER_AREA")
        return square, self.degrade(square)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, small = self.pair(read_pixels(self.paths[i]))
        return {"image": in_range(image), "LR_image": in_range(small), "file_path_": str(self.paths[i])}


degradation_of = degradation  # the argument of the same name hides the function


class SuperResolutionFolder(SuperResolution):
    """As `SuperResolution`, of the images in a folder; split and held_out: see `ldm.data.folder.ImageFolder`."""

    def __init__(self, root: str, size: int, split: str = "all", held_out: Share = 0.05, **rest: Any):
        self.root, self.split, self.held_out = Path(root), split, held_out
        super().__init__(size, **rest)

    def files(self) -> list[Path]:
        return split_of(files_below(self.root), self.root, self.split, self.held_out)
