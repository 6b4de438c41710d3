"""A few images of a thing to teach a model, beside images of its class."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.folder import CaptionedFolder, ImageFolder
from ldm.io.files import Count

FAR, CLOSE = ("a far away ", "very small "), ("zoomed in ", "close up ")
FACTOR = 8  # pixels of a position of the mask, as published


class Subject(Dataset):
    """Images of a thing with their captions, and with each an image of its class.

    Args:
        root: folder of the images.
        size: side of the images that are trained on; they are scaled so that their shorter side has it, and cropped.
        prompt: caption of all of them; None = captions in the folder, see `CaptionedFolder`.
        class_root, class_prompt: images of the class, of which one is drawn for each image of the thing, and their
            caption; None = no images; no prompt = captions in the folder.
        augment: scale and crop the images of the thing at random, say so in the caption, and give a mask of where the
            image is (Custom Diffusion).
        repeat: how often each image comes in an epoch.

    Raises:
        ValueError: no such folder, no images in it, or an image without a caption.
    """

    def __init__(
        self,
        root: str,
        size: Count,
        prompt: str | None = None,
        class_root: str | None = None,
        class_prompt: str | None = None,
        augment: bool = False,
        repeat: Count = 1,
    ) -> None:
        self.own, self.prompt = captioned(root, size, prompt), prompt
        self.augment, self.repeat = augment, repeat
        self.prior = None if class_root is None else captioned(class_root, size, class_prompt)
        self.class_prompt = class_prompt

    def __len__(self) -> int:
        return len(self.own) * self.repeat

    def __getitem__(self, i: int) -> dict[str, Any]:
        own = self.own[i % len(self.own)]
        example = {"image": own["image"], "caption": own.get("caption", self.prompt)}
        if self.augment:
            example |= augmented(example["image"], example["caption"])
        if self.prior is not None:
            other = self.prior[int(torch.randint(len(self.prior), ()))]
            example |= {"class_image": other["image"], "class_caption": other.get("caption", self.class_prompt)}
        return example


def captioned(root: str, size: int, prompt: str | None) -> ImageFolder:
    """The images of a folder, with captions of their own where there is no prompt for all."""
    return CaptionedFolder(root, size) if prompt is None else ImageFolder(root, size)


def augmented(image: np.ndarray, caption: str) -> dict[str, Any]:
    """A square image (H, W, 3) in [-1, 1] scaled at random, its caption and its mask (H / 8, W / 8, 1), as published.

    Two of three are scaled to a third of the size up to the size, and lie anywhere on grey; below 0.6 the caption says
    so. The others are enlarged by 1.2 to 1.4 and cropped, which the caption says too.
    """
    size = len(image)
    smaller = bool(torch.rand(()) < 2 / 3)
    low, high = (size // 3, size) if smaller else (int(1.2 * size), int(1.4 * size))
    scale = int(torch.randint(low, high + 1, ())) // 2 * 2
    scaled = cv2.resize(image, (scale, scale), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    x, y = (int(torch.randint(abs(size - scale) + 1, ())) for _ in range(2))
    if not smaller:
        mask = np.ones((max(1, size // FACTOR), max(1, size // FACTOR), 1), np.float32)
        return {"image": scaled[y : y + size, x : x + size], "caption": _prefixed(CLOSE, caption), "mask": mask}
    canvas, mask = np.zeros_like(image), np.zeros((max(1, size // FACTOR), max(1, size // FACTOR), 1), np.float32)
    canvas[y : y + scale, x : x + scale] = scaled
    inside = [(start // FACTOR + 1, (start + scale) // FACTOR - 1) for start in (y, x)]
    rows, columns = (slice(first, max(last, first + 1)) for first, last in inside)
    mask[rows, columns] = 1.0
    if not mask.any():
        mask[:] = 1.0
    return {"image": canvas, "caption": _prefixed(FAR, caption) if scale < 0.6 * size else caption, "mask": mask}


def _prefixed(prefixes: tuple[str, str], caption: str) -> str:
    return prefixes[int(torch.randint(2, ()))] + caption
