"""Emoji images with captions, as scripts/prepare_emoji.py writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.io.files import check_regular, read_json

MAKE = "make the dataset with: python scripts/prepare_emoji.py --out {} (with --size 128 for models of 128 pixels)"
TIERS = (1, 2, 3, 4)
SPLITS = ("train", "heldout_concept", "heldout_pair")


class EmojiDataset(Dataset):
    """Images and captions of one split.

    Args:
        root: folder with `pictures.npy`, (N, size, size, 3) uint8, and `captions.json` (COCO captions).
        split: "train", "heldout_concept" (concepts in no training image) or "heldout_pair"
            (concepts that training shows in other styles only).
        max_tier: 1 = the most concrete concepts, 2 = all concepts with good captions, 3 = every
            concept, 4 = skin tones too.

    Attributes:
        images: the COCO entry of each image (concept, name, style, category, subgroup, tier, ...).

    Raises:
        ValueError: unknown split or tier; the dataset is missing or broken.
    """

    def __init__(self, root: str | Path, split: str = "train", max_tier: int = 3) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
        if max_tier not in TIERS:
            raise ValueError(f"max_tier is {max_tier!r}; accepted: {', '.join(map(str, TIERS))}")
        self._root = Path(root)
        self._pixels, coco = read_dataset(self._root)
        self.images = [i for i in coco["images"] if i["split"] == split and i["tier"] <= max_tier]
        self._every = coco["images"]
        self._rows = np.array([i["id"] for i in self.images], dtype=np.int64)
        self._captions: dict[int, list[str]] = {i["id"]: [] for i in self.images}
        self._groups: dict[int, list[str]] = {i["id"]: [] for i in self.images}
        for note in coco["annotations"]:
            kept = self._groups if note.get("kind") == "group" else self._captions
            if note["image_id"] in kept:
                kept[note["image_id"]].append(note["caption"])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        """One image, (3, H, W) float32 in [-1, 1]."""
        return as_float(self._pixels[self._rows[index]])

    def batch(self, indices: np.ndarray) -> Tensor:
        """Several images at once, (B, 3, H, W) float32 in [-1, 1]."""
        return as_float(self._pixels[self._rows[indices]])

    def groups_by(self, field: str) -> list[str]:
        """The sorted values of a field of the images' entries, of all splits and tiers.

        Raises:
            ValueError: the dataset is of an older version, which does not state it.
        """
        if any(field not in image for image in self._every):
            raise ValueError(f"the dataset in {self._root} states no {field}; {MAKE.format(self._root)}")
        return sorted({image[field] for image in self._every})

    def captions(self, index: int) -> list[str]:
        """What the image may be called: its name first, then keywords, each with the style."""
        return self._captions[self.images[index]["id"]]

    def groups(self, index: int) -> list[str]:
        """Captions that leave open what is drawn ("an animal, noto style"); none in the dataset of 64 pixels."""
        return self._groups[self.images[index]["id"]]


def without_style(caption: str) -> str:
    """The caption without its style, which comes last: 'a fox, noto style' -> 'a fox'."""
    return caption.rsplit(", ", 1)[0]


def as_float(pixels: np.ndarray) -> Tensor:
    """(..., H, W, 3) uint8 in 0..255 -> (..., 3, H, W) float32 in [-1, 1]."""
    # a copy: a tensor must not share the read-only pages of the file
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3).float().div_(127.5).sub_(1)


def read_dataset(root: Path) -> tuple[np.ndarray, dict]:
    """(N, H, W, 3) uint8 in 0..255, mapped, and captions.json of a dataset that prepare_emoji.py made.

    Raises:
        ValueError: a file is missing or is not what it should be.
    """
    try:
        check_regular(root / "pictures.npy")
        pixels = np.load(root / "pictures.npy", mmap_mode="r")
        coco = read_json(root / "captions.json")
        rows = [image["id"] for image in coco["images"]]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing; {MAKE.format(root)}") from None
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"the dataset in {root} cannot be read ({error}); {MAKE.format(root)}") from None
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"{root}/pictures.npy holds {pixels.dtype} {pixels.shape}, not uint8 (N, H, W, 3); {MAKE.format(root)}"
        )
    if rows != list(range(len(pixels))):
        raise ValueError(
            f"{root} holds {len(pixels)} images but captions.json describes {len(rows)}, expected as many, with ids "
            f"0, 1, 2, ... in order; {MAKE.format(root)}"
        )
    return pixels, coco
