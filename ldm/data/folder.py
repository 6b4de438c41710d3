"""Data of one's own, without code: a folder of images, folders as classes, images with captions.

data.params.train.target: ldm.data.folder.ImageFolder, ClassFolders or CaptionedFolder
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.captions import captions_of_all
from ldm.data.images import ImagePaths
from ldm.io.files import Share
from ldm.io.images import files_below

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

    - `metadata.jsonl`, there or in subfolders: a line for each image: {"file_name": PATH, "text": CAPTION or a list}.
    - `captions.json`: {PATH: CAPTION or a list of captions}, or COCO's format.
    - `manifest.jsonl` of a run that made the images: their prompts.
    - otherwise `NAME.txt` beside each image has its captions, one a line.

    At each access one of an image's captions is drawn.

    Raises:
        ValueError: an image without a caption; a file that can't be read.
    """

    def __init__(self, root: str, size: int, **rest: Any):
        super().__init__(root, size, **rest)
        self.captions = captions_of_all(self.root, self.paths)

    def described(self, i: int) -> dict[str, Any]:
        return super().described(i) | {"caption": drawn(self.captions[i])}


def drawn(captions: Sequence[str]) -> str:
    return captions[int(torch.randint(len(captions), ()))] if len(captions) > 1 else captions[0]
