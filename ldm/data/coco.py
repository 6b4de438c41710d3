"""MS-COCO: captions, and boxes of things and stuff."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.data.boxes import Boxes, BoxTokens, LabelledBox
from ldm.data.captions import of_coco
from ldm.data.folder import drawn
from ldm.data.images import ImagePaths
from ldm.io.files import FileError, Share, read_json

ROOT = "data/coco"


class CocoCaptions(ImagePaths):
    """Images with one of their captions, drawn at each access.

    Args:
        size: side of the squares.
        random_crop: they lie anywhere, not in the centre; None = in training.
        flip: share of images that are mirrored.
        data_root: the folder with annotations/captions_{train,val}2017.json and the folders train2017 and val2017.
    """

    part: str
    anywhere: bool

    def __init__(self, size: int, data_root: str = ROOT, random_crop: bool | None = None, flip: Share = 0.0):
        root = Path(data_root)
        file = root / "annotations" / f"captions_{self.part}2017.json"
        found = {name: some for name, some in of_coco(annotations(file), file).items() if some}
        self.captions = list(found.values())
        anywhere = self.anywhere if random_crop is None else random_crop
        super().__init__([root / f"{self.part}2017" / name for name in found], size, None, anywhere, flip)

    def described(self, i: int) -> dict[str, Any]:
        return super().described(i) | {"caption": drawn(self.captions[i])}


class CocoCaptionsTrain(CocoCaptions):
    part, anywhere = "train", True


class CocoCaptionsValidation(CocoCaptions):
    part, anywhere = "val", False


class CocoBoxes(BoxTokens):
    """Images with the boxes of their things and stuff as tokens; the rest of the arguments as for `BoxTokens`.

    Categories are numbered in the order of their ids as texts ("1", "10", "11", ...), without "other", as published.
    """

    part: str
    anywhere: bool

    def __init__(self, size: int, data_root: str = ROOT, **rest: Any):
        self.data_root = Path(data_root)
        super().__init__(size, **{"random_crop": self.anywhere, "random_flip": self.anywhere} | rest)

    def read(self) -> Boxes:
        folder = self.data_root / "annotations"
        contents = [annotations(folder / f"{kind}_{self.part}2017.json") for kind in ("instances", "stuff")]
        numbers = category_numbers(contents)
        images = {image["id"]: image for image in contents[0]["images"]}
        boxes: dict[int, list[LabelledBox]] = {key: [] for key in images}
        for note in (note for content in contents for note in content["annotations"]):
            if note["category_id"] in numbers and note["image_id"] in images:
                boxes[note["image_id"]].append(labelled(note, images[note["image_id"]], numbers))
        paths = [self.data_root / f"{self.part}2017" / image["file_name"] for image in images.values()]
        return Boxes(paths, list(boxes.values()), len(numbers))


class CocoBoxesTrain(CocoBoxes):
    part, anywhere = "train", True


class CocoBoxesValidation(CocoBoxes):
    part, anywhere = "val", False


def annotations(file: Path) -> dict[str, Any]:
    """The content of one of COCO's files.

    Raises:
        ValueError: it is not there, or not COCO's.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it is one of COCO's annotations")
    content = read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise FileError(f"{file}: not COCO's annotations: no lists images and annotations")
    return content


def category_numbers(contents: list[dict[str, Any]]) -> dict[int, int]:
    ids = {c["id"] for content in contents for c in content["categories"] if c["name"] != "other"}
    return {id_: number for number, id_ in enumerate(sorted(ids, key=str))}


def labelled(note: dict[str, Any], image: dict[str, Any], numbers: dict[int, int]) -> LabelledBox:
    x, y, width, height = note["bbox"]
    area = (x / image["width"], y / image["height"], width / image["width"], height / image["height"])
    return LabelledBox(area, numbers[note["category_id"]], bool(note.get("iscrowd")))
