"""ImageNet, as the published configs name it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data.images import ImagePaths
from ldm.data.superresolution import SuperResolution
from ldm.io.images import files_below

DAMAGED = "n06596364_9591.JPEG"


def root_of(part: str, data_root: str | None) -> Path:
    """The folder `data` of a part of ImageNet, with a folder of images for each synset."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoencoders" / "data"
    return Path(data_root or cache) / f"ILSVRC2012_{part}" / "data"


def images_of(part: str, data_root: str | None) -> list[Path]:
    return [path for path in files_below(root_of(part, data_root)) if path.name != DAMAGED]


class ImageNet(ImagePaths):
    """Images with their classes, which are numbered in the order of the synsets that are there.

    Args:
        config: `size` (256) and `random_crop` (in training true), as published configs give them.
        data_root: folder with ILSVRC2012_train and ILSVRC2012_validation; None = the published place, in ~/.cache.
    """

    part: str
    anywhere: bool

    def __init__(self, config: Mapping[str, Any] | None = None, data_root: str | None = None):
        config = dict(config or {})
        size, random_crop = config.pop("size", 256), config.pop("random_crop", self.anywhere)
        if config:
            raise ValueError(f"config: {', '.join(map(str, config))} is not supported; accepted: size, random_crop")
        paths = images_of(self.part, data_root)
        synsets = [path.parent.name for path in paths]
        number = {name: i for i, name in enumerate(sorted(set(synsets)))}
        labels = {"class_label": [number[name] for name in synsets], "synsets": synsets}
        super().__init__(paths, size, random_crop=random_crop, labels=labels)


class ImageNetTrain(ImageNet):
    part, anywhere = "train", True


class ImageNetValidation(ImageNet):
    part, anywhere = "validation", False


class ImageNetSR(SuperResolution):
    """Pairs for super-resolution from ImageNet; arguments as for `SuperResolution`."""

    part: str

    def __init__(self, size: int, degradation: str = "bsrgan_light", data_root: str | None = None, **rest: Any):
        self.data_root = data_root
        super().__init__(size, degradation, **rest)

    def files(self) -> list[Path]:
        return images_of(self.part, self.data_root)


class ImageNetSRTrain(ImageNetSR):
    part = "train"


class ImageNetSRValidation(ImageNetSR):
    part = "validation"
