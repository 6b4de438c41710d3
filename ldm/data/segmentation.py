"""Images with semantic maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.images import ImagePaths, corner, cut, in_range, smallest_side
from ldm.io.images import files_below, open_labels


class SegmentationFolder(ImagePaths):
    """A folder with `images/NAME.*` and `segmentations/NAME.png`, whose levels or palette indices are classes.

    The example has the map under `segmentation`, (H, W, classes), 1 at each pixel's class.

    Args:
        root: the folder.
        size, crop_size, random_crop: see `ImagePaths`; maps are resized without mixing classes.
        classes: number of classes, 182 as for COCO-stuff in the published models.
        segmentation_to_float32: accepted for published configs: maps are float32.

    Raises:
        ValueError: an image without a map, or (when it is read) a map of other classes or of another size.
    """

    def __init__(
        self,
        root: str,
        size: int,
        crop_size: int | None = None,
        random_crop: bool = False,
        classes: int = 182,
        segmentation_to_float32: bool = True,
    ):
        folder = Path(root)
        super().__init__(files_below(folder / "images"), size, crop_size, random_crop)
        self.maps = [folder / "segmentations" / f"{path.stem}.png" for path in self.paths]
        self.classes = classes
        for image, file in zip(self.paths, self.maps, strict=True):
            if not file.is_file():
                raise ValueError(f"{image}: no semantic map {file}")

    def __getitem__(self, i: int) -> dict[str, Any]:
        pixels, labels = self.pixels(i), open_labels(self.maps[i]).numpy().astype(np.uint16)
        if pixels.shape[:2] != labels.shape:
            raise ValueError(f"{self.maps[i]}: {labels.shape} pixels; the image has {pixels.shape[:2]}")
        if labels.max() >= self.classes:
            raise ValueError(f"{self.maps[i]}: class {labels.max()}; expected 0..{self.classes - 1}")
        pixels, labels = smallest_side(pixels, self.size), smallest_side(labels, self.size, "INTER_NEAREST")
        top, left = corner(pixels, self.crop_size, self.random_crop)
        pixels, labels = (cut(values, top, left, self.crop_size) for values in (pixels, labels))
        one_hot = (labels[..., None] == np.arange(self.classes)).astype(np.float32)
        return {"image": in_range(pixels), "segmentation": one_hot, "file_path_": str(self.paths[i])}
