"""Data of one's own, without code: a folder of images, folders as classes, images with captions.

data.params.train.target: ldm.data.folder.ImageFolder, ClassFolders or CaptionedFolder
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.images import ImagePaths, files_below
from ldm.io.files import FileError, parse_json_lines, read_json, read_lines, read_text
from ldm.io.schema import Share

SPLITS = ("all", "train", "validation")


def split_of(paths: Sequence[Path], root: Path, split: str, held_out: float) -> list[Path]:
    """The files of a split. Held out are those whose names have the lowest checksums, one at least.

    Raises:
        ValueError: an unknown split, or nothing is left.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if split == "all":
        return list(paths)
    by_checksum = sorted(paths, key=lambda path: zlib.crc32(path.relative_to(root).as_posix().encode()))
    held = set(by_checksum[: max(1, round(held_out * len(paths)))])
    chosen = [path for path in paths if (path in held) == (split == "validation")]
    if not chosen:
        raise ValueError(f"{root}: none of its {len(paths)} images is left for the split {split}")
    return chosen


class ImageFolder(ImagePaths):
    """The images in a folder and its subfolders.

    Args:
        root: the folder.
        size: side of the images that are trained on.
        random_crop, flip: see `ImagePaths`.
        split: all, or the images to train on or to validate with, which are `held_out`, a share of all.

    Raises:
        ValueError: no such folder, no images in it.
    """

    def __init__(
        self,
        root: str,
        size: int,
        random_crop: bool = False,
        flip: Share = 0.0,
        split: str = "all",
        held_out: Share = 0.05,
    ):
        self.root = Path(root)
        super().__init__(split_of(files_below(self.root), self.root, split, held_out), size, None, random_crop, flip)


class ClassFolders(ImageFolder):
    """As `ImageFolder`; the folder of an image below `root` is its class, numbered in the order of the names.

    Raises:
        ValueError: images that are in no such folder.
    """

    def __init__(self, root: str, size: int, **rest: Any):
        super().__init__(root, size, **rest)
        outside = [path for path in self.paths if path.parent == self.root]
        if outside:
            raise ValueError(f"{outside[0]}: in no folder of a class; expected {root}/CLASS/image")
        self.classes = sorted({path.relative_to(self.root).parts[0] for path in files_below(self.root)})
        number = {name: i for i, name in enumerate(self.classes)}
        names = [path.relative_to(self.root).parts[0] for path in self.paths]
        self.labels = {"class_label": [number[name] for name in names], "human_label": names}


class CaptionedFolder(ImageFolder):
    """As `ImageFolder`, with captions: those of `metadata.jsonl` or `captions.json` in the folder, or of text files.

    - `metadata.jsonl`: a line for each image: {"file_name": PATH, "text": CAPTION or a list of captions}.
    - `captions.json`: {PATH: CAPTION or a list of captions}, or COCO's format.
    - otherwise `NAME.txt` beside each image has its captions, one a line.

    At each access one of an image's captions is drawn.

    Raises:
        ValueError: an image without a caption; a file that can't be read.
    """

    def __init__(self, root: str, size: int, **rest: Any):
        super().__init__(root, size, **rest)
        found = captions_below(self.root, self.paths)
        missing = [path for path in self.paths if not found.get(path)]
        if missing:
            raise ValueError(
                f"{missing[0]}: no caption ({len(missing)} of {len(self.paths)} images have none); expected them in "
                f"metadata.jsonl or captions.json in {root}, or in {missing[0].with_suffix('.txt').name} beside it"
            )
        self.captions = [found[path] for path in self.paths]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return super().__getitem__(i) | {"caption": drawn(self.captions[i])}


def drawn(captions: Sequence[str]) -> str:
    return captions[int(torch.randint(len(captions), ()))] if len(captions) > 1 else captions[0]


def captions_below(root: Path, paths: Sequence[Path]) -> dict[Path, list[str]]:
    """The captions of each image file."""
    lines, mapping = root / "metadata.jsonl", root / "captions.json"
    if lines.is_file():
        return of_lines(root, lines)
    if mapping.is_file():
        return of_mapping(root, mapping)
    texts = {path: path.with_suffix(".txt") for path in paths}
    return {
        path: [line.strip() for line in read_lines(text) if line.strip()]
        for path, text in texts.items()
        if text.is_file()
    }


def of_lines(root: Path, file: Path) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for number, entry in ((at + 1, entry) for at, entry in parse_json_lines(read_text(file))):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "text" not in entry:
            raise FileError(f'{file}: line {number}: expected {{"file_name": PATH, "text": CAPTION}}')
        found.setdefault(root / entry["file_name"], []).extend(as_captions(entry["text"], f"{file}: line {number}"))
    return found


def of_mapping(root: Path, file: Path) -> dict[Path, list[str]]:
    content = read_json(file)
    if isinstance(content, dict) and "annotations" in content:
        return {root / name: captions for name, captions in of_coco(content, file).items()}
    if not isinstance(content, dict):
        raise FileError(f"{file}: expected {{PATH: CAPTION}}, or COCO's images and annotations")
    return {root / name: as_captions(value, f"{file}: {name}") for name, value in content.items()}


def of_coco(content: dict[str, Any], file: Path) -> dict[str, list[str]]:
    """File names and their captions, from the content of a COCO file."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for note in content["annotations"]:
            found[names[note["image_id"]]].append(str(note["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise FileError(f"{file}: not COCO's captions: {error!r}") from error
    return found


def as_captions(value: Any, place: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
        raise FileError(f"{place}: expected a caption, or a list of captions")
    return [text.strip() for text in values]
