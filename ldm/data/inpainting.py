"""Images with a part masked out, for inpainting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldm.data.folder import ImageFolder


class InpaintingFolder(ImageFolder):
    """As `ImageFolder`, with a mask of one to four rectangles, drawn at each access.

    The example has `mask` (H, W, 1), 1 where content is missing, and `masked_image`, black there, as published.
    """

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = super().__getitem__(i)
        mask = rectangles(*example["image"].shape[:2])
        return example | {"mask": mask, "masked_image": np.where(mask > 0, np.float32(-1), example["image"])}


def rectangles(height: int, width: int) -> np.ndarray:
    """One to four rectangles, each with sides of an eighth to a half of the image's: (H, W, 1) float32."""
    mask = np.zeros((height, width, 1), np.float32)
    for _ in range(int(torch.randint(1, 5, ()))):
        sides = [int(torch.randint(max(side // 8, 1), side // 2 + 1, ())) for side in (height, width)]
        top, left = (int(torch.randint(0, side - s + 1, ())) for side, s in zip((height, width), sides, strict=True))
        mask[top : top + sides[0], left : left + sides[1]] = 1.0
    return mask
