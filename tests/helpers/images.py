"""Images that are made for the scripts."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.helpers.scripts import Script


def scene(size: tuple[int, int], number: int = 0) -> Image.Image:
    """A image with no two rows or columns alike."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    levels = np.stack([x * 5, y * 7, (x + y) * 3 ^ 90 * number], axis=2) % 256
    return Image.fromarray(levels.astype(np.uint8))


def add(folder, name: str, size: tuple[int, int], number: int = 0) -> np.ndarray:
    """A image whose right half is masked; what is masked, (H, W)."""
    folder.mkdir(exist_ok=True)
    scene(size, number).save(folder / f"{name}.png")
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, size[0] // 2 :] = 255
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return mask > 0


def original(script: Script, entry) -> np.ndarray:
    return np.asarray(Image.open(script.folder / "in" / entry["image"])).astype(int)


def small(path, size=(8, 8), seed=0) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return str(path)


def labelled(path, size=(32, 32), top=181, mode="L", seed=0) -> str:
    labels = np.random.default_rng(seed).integers(0, top + 1, size[::-1], dtype=np.uint8)
    labels[0, 0] = top
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(path)
    return str(path)


def slope(path, size=(64, 64), turned: bool = False) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([y, x, x] if turned else [x, y, (x + y) / 2], axis=2).astype(np.uint8))
    image.save(path)
    return image
