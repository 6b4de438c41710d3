"""Boxes as tokens: what the layout-to-image model is conditioned on, through its BERTEmbedder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """An object and where it is; lengths are shares of the image's width and height, 0..1.

    category:      number of the object's class. The published builder can make attributes part of it: the number of
                   classes times (1 if a group + 2 if occluded + 4 if depicted + 8 if seen from inside) is added.
    x, y:          of the top left corner.
    width, height: of the box, which lies in the image.
    """

    category: int
    x: float
    y: float
    width: float
    height: float

    def __post_init__(self) -> None:
        if not isinstance(self.category, int) or self.category < 0:
            raise ValueError(f"box: category must be a whole number >= 0; got {self.category!r}")
        if not (self.width > 0 and self.height > 0):
            raise ValueError(f"box: width and height must be positive; got {self.width} and {self.height}")
        edges = (self.x, self.y, self.x + self.width, self.y + self.height)
        if not all(-1e-6 <= edge <= 1 + 1e-6 for edge in edges):
            raise ValueError(f"box: must lie in the image, 0..1; got left, top, right, bottom {edges}")


def box_tokens(
    boxes: Sequence[Box],
    max_boxes: int = 30,
    vocab_size: int = 8192,
    crop: tuple[float, float, float, float] | None = (0.0, 0.0, 1.0, 1.0),
) -> Tensor:
    """Token ids of an image's boxes, (3 * max_boxes + 2,), int64.

    Each box is its category and its top left and bottom right corners on a grid of isqrt(vocab_size) points a
    side, row by row; missing boxes are three times the last id. Then come the corners of the crop.

    Args:
        boxes: at most max_boxes, in any order.
        max_boxes, vocab_size: of the model (layout2img-openimages256: 30 boxes, 8192 ids).
        crop: x, y, width, height of the part of the original image that is to be seen; None = the model
            was trained without, and its tokens are missing.

    Raises:
        ValueError: too many boxes, a category that is no id, or a crop that does not lie in the image.

    Source: the conditional builder of taming-transformers, which layout-to-image diffusion uses
        (arXiv 2112.10752, section 4.3.1). There the boxes come in random order.
    """
    none, side = vocab_size - 1, isqrt(vocab_size)
    if len(boxes) > max_boxes:
        raise ValueError(f"boxes: the model takes at most {max_boxes}; got {len(boxes)}")

    def corners(x: float, y: float, width: float, height: float) -> tuple[int, int]:
        def token(x: float, y: float) -> int:
            return round(y * (side - 1)) * side + round(x * (side - 1))

        return token(x, y), token(x + width, y + height)

    ids: list[int] = []
    for box in boxes:
        if box.category >= none:
            raise ValueError(f"box: category must be in 0..{none - 1}; got {box.category}")
        ids += (box.category, *corners(box.x, box.y, box.width, box.height))
    ids += [none] * 3 * (max_boxes - len(boxes))
    if crop is not None:
        Box(0, *crop)
        ids += corners(*crop)
    return torch.tensor(ids)
