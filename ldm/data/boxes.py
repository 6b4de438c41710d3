"""Images with boxes, as tokens for layout-to-image models.

Source: the conditional builders of taming-transformers, which latent diffusion uses (arXiv 2112.10752, 4.3.1).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.images import corner, cut, in_range, read_pixels, smallest_side, uniform

Area = tuple[float, float, float, float]  # x, y, width, height as shares of the image's
WHOLE: Area = (0.0, 0.0, 1.0, 1.0)
KINDS = ("objects_bbox", "objects_center_points")


@dataclass(frozen=True)
class LabelledBox:
    """bbox: where the object is; category: its class's number; group: it stands for several."""

    bbox: Area
    category: int
    group: bool = False


@dataclass(frozen=True)
class Tokens:
    """How boxes become token ids.

    kind:       objects_bbox: class, top left and bottom right; objects_center_points: class and centre.
    classes:    number of classes; groups have a number of their own, higher by this.
    vocabulary: number of token ids; the last one stands for no object.
    most:       objects in a sequence.
    crop:       whether the sequence ends with the corners of the part of the image that is seen.
    """

    kind: str
    classes: int
    vocabulary: int = 8192
    most: int = 30
    crop: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")

    @property
    def none(self) -> int:
        return self.vocabulary - 1

    def point(self, x: float, y: float) -> int:
        side = isqrt(self.vocabulary)
        x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
        return round(y * (side - 1)) * side + round(x * (side - 1))

    def corners(self, area: Area) -> list[int]:
        x, y, width, height = area
        return [self.point(x, y), self.point(x + width, y + height)]

    def of_object(self, box: LabelledBox) -> list[int]:
        category = box.category + self.classes * box.group
        x, y, width, height = box.bbox
        place = self.corners(box.bbox) if self.kind == KINDS[0] else [self.point(x + width / 2, y + height / 2)]
        return [category, *place]

    def sequence(self, boxes: Sequence[LabelledBox], area: Area = WHOLE, mirrored: bool = False) -> np.ndarray:
        """Token ids, (n,) int64, of the boxes in their order, as far as there is room.

        Args:
            area: the part of the image that is seen; boxes that do not touch it are left out.
            mirrored: the image is flipped from left to right.
        """
        seen = [box for box in boxes if overlaps(box.bbox, area)]
        if not self.crop:
            seen = [LabelledBox(within(box.bbox, area), box.category, box.group) for box in seen]
        if mirrored:
            seen = [LabelledBox(flipped(box.bbox), box.category, box.group) for box in seen]
            area = flipped(area)
        each = 3 if self.kind == KINDS[0] else 2
        ids = [token for box in seen[: self.most] for token in self.of_object(box)]
        ids += [self.none] * (each * self.most - len(ids))
        return np.array(ids + (self.corners(area) if self.crop else []), dtype=np.int64)


def overlaps(box: Area, area: Area) -> bool:
    return all(box[i] < area[i] + area[i + 2] and area[i] < box[i] + box[i + 2] for i in (0, 1))


def within(box: Area, area: Area) -> Area:
    """A box in shares of an area. As published, a box that begins outside is moved to the border, not cut there."""
    start = [min(max((box[i] - area[i]) / area[i + 2], 0.0), 1.0) for i in (0, 1)]
    sides = [min(box[i + 2] / area[i + 2], 1.0 - start[i]) for i in (0, 1)]
    return (start[0], start[1], sides[0], sides[1])


def flipped(box: Area) -> Area:
    return (1 - box[0] - box[2], box[1], box[2], box[3])


class Boxes(NamedTuple):
    """Image files, the boxes of each, and the number of classes."""

    paths: Sequence[Path]
    boxes: Sequence[Sequence[LabelledBox]]
    classes: int


class BoxTokens(Dataset, ABC):
    """Images with boxes; the example has the tokens under both published names. Subclasses read the boxes.

    Args:
        size: side of the square that is seen.
        no_tokens, max_objects, encode_crop: see `Tokens`.
        min_object_area: smaller boxes are left out.
        min_objects: images with fewer boxes are left out, and those with more than max_objects.
        random_crop, random_flip: as for images.

    Raises:
        ValueError: no image has a fitting number of boxes.
    """

    def __init__(
        self,
        size: int,
        no_tokens: int = 8192,
        max_objects: int = 30,
        encode_crop: bool = True,
        min_object_area: float = 0.0,
        min_objects: int = 1,
        random_crop: bool = False,
        random_flip: bool = False,
    ):
        paths, boxes, classes = self.read()
        large = [[box for box in some if box.bbox[2] * box.bbox[3] > min_object_area] for some in boxes]
        kept = [i for i, some in enumerate(large) if min_objects <= len(some) <= max_objects]
        if not kept:
            raise ValueError(f"none of the {len(paths)} images has {min_objects} to {max_objects} boxes")
        self.paths, self.boxes = [paths[i] for i in kept], [large[i] for i in kept]
        self.size, self.random_crop, self.random_flip = size, random_crop, random_flip
        self.builders = {
            "coordinates_bbox": Tokens(KINDS[0], classes, no_tokens, max_objects, encode_crop),
            "objects_center_points": Tokens(KINDS[1], classes, no_tokens, max_objects, encode_crop),
        }

    @abstractmethod
    def read(self) -> Boxes:
        """All images and boxes."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels = smallest_side(read_pixels(self.paths[i]), self.size)
        top, left = corner(pixels, self.size, self.random_crop)
        height, width = pixels.shape[:2]
        area = (left / width, top / height, self.size / width, self.size / height)
        mirrored = self.random_flip and uniform() < 0.5
        pixels = cut(pixels, top, left, self.size)
        boxes = list(self.boxes[i])
        random.Random(int(torch.randint(2**31, ()))).shuffle(boxes)
        tokens = {name: builder.sequence(boxes, area, mirrored) for name, builder in self.builders.items()}
        return {"image": in_range(pixels[:, ::-1] if mirrored else pixels), "file_path_": str(self.paths[i]), **tokens}
