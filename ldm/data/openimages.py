"""Open Images: its images, pairs for super-resolution, and its boxes.

The published code of these datasets was never released; the layout on disk is that of Open Images' own downloads:
data/openimages/{train,validation}/ID.jpg, and for boxes {train,validation}-annotations-bbox.csv and
class-descriptions-boxable.csv beside them.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.data.boxes import Boxes, BoxTokens, LabelledBox
from ldm.data.images import ImagePaths
from ldm.data.superresolution import SuperResolution
from ldm.io.images import files_below

ROOT = "data/openimages"


class FullOpenImages(ImagePaths):
    """The images: the smaller side resized to `size`, then a square of `crop_size`, in training from anywhere.

    Args:
        size: None = not resized, unless the image is smaller than the square.
        crop_size: side of the square.
        data_root: the folder of Open Images.
    """

    part: str
    anywhere: bool

    def __init__(self, size: int | None = None, crop_size: int | None = None, data_root: str = ROOT):
        super().__init__(files_below(Path(data_root) / self.part), size, crop_size, self.anywhere)


class FullOpenImagesTrain(FullOpenImages):
    part, anywhere = "train", True


class FullOpenImagesValidation(FullOpenImages):
    part, anywhere = "validation", False


class SuperresOpenImagesAdvanced(SuperResolution):
    """Pairs for super-resolution; arguments as for `SuperResolution`."""

    part: str

    def __init__(self, size: int, data_root: str = ROOT, **rest: Any):
        self.data_root = Path(data_root)
        super().__init__(size, **rest)

    def files(self) -> list[Path]:
        return files_below(self.data_root / self.part)


class SuperresOpenImagesAdvancedTrain(SuperresOpenImagesAdvanced):
    part = "train"


class SuperresOpenImagesAdvancedValidation(SuperresOpenImagesAdvanced):
    part = "validation"


class OpenImagesBBox(BoxTokens):
    """Images with their boxes as tokens; the rest of the arguments as for `BoxTokens`."""

    part: str
    anywhere: bool

    def __init__(self, size: int, data_root: str = ROOT, **rest: Any):
        self.data_root = Path(data_root)
        super().__init__(size, **{"random_crop": self.anywhere, "random_flip": self.anywhere} | rest)

    def read(self) -> Boxes:
        paths = files_below(self.data_root / self.part)
        numbers = classes_of(self.data_root / "class-descriptions-boxable.csv")
        found = boxes_of(self.data_root / f"{self.part}-annotations-bbox.csv", numbers)
        return Boxes(paths, [found.get(path.stem, []) for path in paths], len(numbers))


class OpenImagesBBoxTrain(OpenImagesBBox):
    part, anywhere = "train", True


class OpenImagesBBoxValidation(OpenImagesBBox):
    part, anywhere = "validation", False


def rows_of(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV file, one by one: that of the training set has fifteen million."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it is one of Open Images' downloads")
    with file.open(newline="", encoding="utf-8") as stream:
        yield from csv.reader(stream)


def classes_of(file: Path) -> dict[str, int]:
    """The number of each class, in the order of their labels (/m/...)."""
    labels = sorted(row[0] for row in rows_of(file) if row and row[0].startswith("/"))
    return {label: i for i, label in enumerate(labels)}


def boxes_of(file: Path, numbers: dict[str, int]) -> dict[str, list[LabelledBox]]:
    """The boxes of each image, by its ID.

    Raises:
        ValueError: the file lacks a column, or a value is no number.
    """
    rows = rows_of(file)
    header = next(rows, [])
    found: dict[str, list[LabelledBox]] = {}
    try:
        at = {
            name: header.index(name) for name in ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
        }
        for row in rows:
            left, right, top, bottom = (float(row[at[name]]) for name in ("XMin", "XMax", "YMin", "YMax"))
            box = LabelledBox(
                (left, top, right - left, bottom - top), numbers[row[at["LabelName"]]], row[at["IsGroupOf"]] == "1"
            )
            found.setdefault(row[at["ImageID"]], []).append(box)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file}: not Open Images' boxes: {error}") from error
    return found
