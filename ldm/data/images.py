"""Image files as the published trainings read them: resized, cropped, (H, W, 3) float32 in [-1, 1].

Random numbers come from PyTorch's generator, which a training seeds for each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.io.arrays import load_array
from ldm.io.files import FileError, read_lines
from ldm.io.images import MOST_PIXELS, open_image

INTERPOLATIONS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def listed(file: Path, root: Path) -> list[Path]:
    """The image files that a text file lists, one path a line, from a folder on.

    Raises:
        ValueError: the list is not there, or lists nothing.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a list of images, one path below {root} a line")
    paths = [root / name.strip() for name in read_lines(file) if name.strip()]
    if not paths:
        raise ValueError(f"{file}: lists no images")
    return paths


def read_pixels(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8."""
    return np.asarray(open_image(path))


def array_pixels(path: Path) -> np.ndarray:
    """An npy file of (1, 3, H, W) uint8 as (H, W, 3).

    Raises:
        FileError: it is not one.
    """
    try:
        array = load_array(path, "", 3 * MOST_PIXELS)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[:2] != (1, 3):
        raise FileError(f"{path}: {array.dtype} {array.shape}; expected uint8 (1, 3, H, W)")
    return array[0].transpose(1, 2, 0)


def in_range(pixels: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 -> float32 in [-1, 1]."""
    return (pixels / 127.5 - 1.0).astype(np.float32)


def uniform(low: float = 0.0, high: float = 1.0) -> float:
    """A random number, from PyTorch's generator."""
    return low + (high - low) * torch.rand(()).item()


def smallest_side(pixels: np.ndarray, size: int, interpolation: str = "INTER_LINEAR") -> np.ndarray:
    """Resized so that the smaller side has `size` pixels, by OpenCV without antialiasing, as published."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if scale == 1.0:
        return pixels
    target = (round(width * scale), round(height * scale))
    return cv2.resize(pixels, target, interpolation=getattr(cv2, interpolation))


def corner(pixels: np.ndarray, size: int, random: bool) -> tuple[int, int]:
    """Top and left of a square of `size` pixels: in the centre, or anywhere."""
    height, width = pixels.shape[:2]
    if not random:
        return (height - size) // 2, (width - size) // 2
    down, right = uniform(), uniform()
    return min(int((height - size + 1) * down), height - size), min(int((width - size + 1) * right), width - size)


def cut(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return pixels[top : top + size, left : left + size]


def center_square(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """The largest square in the centre, then resized by Pillow (antialiased), as LSUN is prepared."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), INTERPOLATIONS[interpolation])


class ImagePaths(Dataset):
    """Images of a list of files, each with its labels.

    The smaller side is resized to `size` (OpenCV, linear), then a square is cut out.

    Args:
        paths: image files; `.npy` files hold (1, 3, H, W) uint8.
        size: side of the square; None = the image as it is.
        crop_size: side of the square, if it is smaller than `size`.
        random_crop: the square lies anywhere; otherwise in the centre.
        flip: share of images that are mirrored.
        labels: values of each image, by name; they are added to the example.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        flip: float = 0.0,
        labels: Mapping[str, Sequence[Any]] | None = None,
    ):
        self.paths, self.size, self.crop_size = list(paths), size, crop_size or size
        self.random_crop, self.flip, self.labels = random_crop, flip, dict(labels or {})

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, i: int) -> np.ndarray:
        path = self.paths[i]
        if path.suffix == ".npy":
            return array_pixels(path)
        return read_pixels(path)

    def prepared(self, pixels: np.ndarray) -> np.ndarray:
        """The square of an image, (size, size, 3) uint8."""
        if self.crop_size is not None:
            smaller = self.size or min(pixels.shape[:2])
            if self.size is not None or smaller < self.crop_size:
                pixels = smallest_side(pixels, max(smaller, self.crop_size))
            pixels = cut(pixels, *corner(pixels, self.crop_size, self.random_crop), self.crop_size)
        return pixels[:, ::-1] if self.flip and uniform() < self.flip else pixels

    def described(self, i: int) -> dict[str, Any]:
        """What an example has besides its image."""
        return {"file_path_": str(self.paths[i]), **{name: values[i] for name, values in self.labels.items()}}

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": in_range(self.prepared(self.pixels(i)))} | self.described(i)
