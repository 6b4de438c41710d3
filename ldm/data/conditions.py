"""Control images, which control networks read, made of images: edges, scribbles, depth. All as published."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

THRESHOLDS = (100, 200)
SIGMA = 3.0  # of the blurs around a scribble
LINES = (  # of three pixels: horizontal, vertical, and the two diagonals
    ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
)


def resized(image: Image.Image, resolution: int, multiple: int = 64) -> Image.Image:
    """The image with its short side of about `resolution` pixels, both sides multiples of `multiple`."""
    how = cv2.INTER_LANCZOS4 if resolution > min(image.size) else cv2.INTER_AREA
    size = usual_size(image.size, resolution, multiple)
    return Image.fromarray(cv2.resize(np.asarray(image), size, interpolation=how))


def usual_size(size: tuple[int, int], resolution: int, multiple: int = 64) -> tuple[int, int]:
    """Width and height that `resized` gives to an image of this width and height."""
    factor = resolution / min(size)
    width, height = (max(multiple, round(side * factor / multiple) * multiple) for side in size)
    return width, height


def edges(image: Image.Image, low: float = THRESHOLDS[0], high: float = THRESHOLDS[1]) -> Image.Image:
    """The edges of an RGB image by Canny's rule, white on black, mode L.

    low, high: of the gradient: above high an edge begins, above low it goes on.
    """
    return Image.fromarray(cv2.Canny(np.asarray(image), low, high))


def soft_edges(image: Image.Image, detector: Callable[[Tensor], Tensor]) -> Image.Image:
    """How much each pixel of an RGB image is an edge by HED, mode L, black = not at all."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()  # (1, 3, H, W), 0..255
    with torch.no_grad():
        found = detector(pixels)[0, 0]  # (H, W), 0..1
    return Image.fromarray((255 * found.clamp(0, 1)).byte().numpy())


def scribble(soft: Image.Image) -> Image.Image:
    """Thick lines, white on black, along the ridges of `soft_edges`; mode L."""
    blurred = cv2.GaussianBlur(ridges(np.asarray(soft)), (0, 0), SIGMA)
    return Image.fromarray(np.where(blurred > 4, 255, 0).astype(np.uint8))


def ridges(levels: np.ndarray, above: int = 127) -> np.ndarray:
    """255 where smoothed levels (H, W) are above a threshold and the largest on a line of three pixels, else 0."""
    smooth = cv2.GaussianBlur(levels.astype(np.float32), (0, 0), SIGMA)
    largest = [cv2.dilate(smooth, np.array(line, np.uint8)) == smooth for line in LINES]
    return np.where(np.any(largest, axis=0) & (smooth > above), 255, 0).astype(np.uint8)


def depth(image: Image.Image, detector: Callable[[Tensor], Tensor]) -> Image.Image:
    """Inverse depth of an RGB image by MiDaS, from black (farthest) to white (nearest), mode L."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, H, W)
    with torch.no_grad():
        found = detector(pixels)[0, 0].numpy()  # (h, w)
    found = found - found.min()
    levels = (255 * found / max(found.max(), 1e-12)).astype(np.uint8)
    return Image.fromarray(cv2.resize(levels, image.size, interpolation=cv2.INTER_LINEAR))


def as_hint(image: Image.Image) -> Tensor:
    """A control image as control networks read it: (3, H, W), RGB in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def edge_scores(condition: np.ndarray, found: np.ndarray, within: int = 1) -> tuple[float, float, float]:
    """How well edges are followed: precision, recall and F-score, each 0..1, of edge maps (H, W), more than 0 = edge.

    Precision is the share of the edges found that have one of the condition within so many pixels in each direction,
    recall the share of the condition's that have one that was found. Without edges on a side its share is 0.
    """
    condition, found = (np.asarray(edge) > 0 for edge in (condition, found))
    window = np.ones((2 * within + 1, 2 * within + 1), np.uint8)
    near = [cv2.dilate(edge.astype(np.uint8), window) > 0 for edge in (condition, found)]
    precision = float((found & near[0]).sum() / max(1, found.sum()))
    recall = float((condition & near[1]).sum() / max(1, condition.sum()))
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)
