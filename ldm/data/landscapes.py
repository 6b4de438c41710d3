"""Landscapes with semantic maps. Their published list of images (RFW) was never released.

On disk: data/rfw/{train,validation}/images/NAME.jpg, and the class of each pixel in .../segmentations/NAME.png.
"""

from __future__ import annotations

from typing import Any

from ldm.data.segmentation import SegmentationFolder


class RFW(SegmentationFolder):
    part: str
    anywhere: bool

    def __init__(self, size: int, root: str = "data/rfw", **rest: Any):
        super().__init__(f"{root}/{self.part}", size, **{"random_crop": self.anywhere} | rest)


class RFWTrain(RFW):
    part, anywhere = "train", True


class RFWValidation(RFW):
    part, anywhere = "validation", False
