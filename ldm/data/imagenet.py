"""ImageNet, as the published configs name it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ldm.data.images import ImagePaths
from ldm.data.superresolution import SuperResolution
from ldm.io.images import files_below

ACCEPTED = ("size", "random_crop", "sub_indices", "keep_orig_class_label")
DAMAGED = "n06596364_9591.JPEG"


def root_of(part: str, data_root: str | None) -> Path:
    """The folder `data` of a part of ImageNet, with a folder of images for each synset."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autoencoders" / "data"
    return Path(data_root or cache) / f"ILSVRC2012_{part}" / "data"


def images_of(part: str, data_root: str | None) -> list[Path]:
    return [path for path in files_below(root_of(part, data_root)) if path.name != DAMAGED]


def numbers_in(text: str, count: int) -> list[int]:
    """The numbers that a text names, such as "32-123, 256" (without 123), sorted.

    Raises:
        ValueError: it is not such a text, or names other numbers than those of `count` classes.
    """
    numbers = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found:
            raise ValueError(f'config: sub_indices: expected numbers such as "32-123, 256"; got {text!r}')
        low = int(found[1])
        numbers |= set(range(low, int(found[2]) if found[2] else low + 1))
    if not numbers or max(numbers) >= count:
        raise ValueError(f"config: sub_indices: {text!r}; there are classes 0 to {count - 1}")
    return sorted(numbers)


class PlainUnpickler(pickle.Unpickler):
    """Reads lists and numbers only: nothing that a file names is looked up, so none of it is run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def indices_in(file: Path, count: int) -> list[int]:
    """The numbers in a published list of images that are large enough (a pickle), of `count` images.

    Raises:
        ValueError: it is not a list of such numbers.
    """
    try:
        with file.open("rb") as stream:
            indices = PlainUnpickler(stream).load()
        if isinstance(indices, list) and all(type(i) is int and 0 <= i < count for i in indices):
            return indices
        raise ValueError(f"expected a list of numbers of 0 to {count - 1}, the images that are here")
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise ValueError(f"{file}: not a list of indices: {error}") from error


class ImageNet(ImagePaths):
    """Images with their classes, which are numbered in the order of the synsets that are there.

    Args:
        config: as published configs give it: `size` (256); `random_crop` (in training true); `sub_indices`, the classes
            that are used, by their numbers, such as "32-123, 256" without 123; `keep_orig_class_label`, to number them
            as in the whole set instead of from 0 on.
        data_root: folder with ILSVRC2012_train and ILSVRC2012_validation; None = the published place, in ~/.cache.
    """

    part: str
    anywhere: bool

    def __init__(self, config: Mapping[str, Any] | None = None, data_root: str | None = None):
        config = dict(config or {})
        size, random_crop = config.pop("size", 256), config.pop("random_crop", self.anywhere)
        used, original = config.pop("sub_indices", None), config.pop("keep_orig_class_label", False)
        if config:
            raise ValueError(f"config: {', '.join(map(str, config))} is not supported; accepted: {', '.join(ACCEPTED)}")
        paths = images_of(self.part, data_root)
        every = sorted({path.parent.name for path in paths})
        names = every if used is None else [every[i] for i in numbers_in(str(used), len(every))]
        number = {name: i for i, name in enumerate(every if original else names)}
        paths = [path for path in paths if path.parent.name in set(names)]
        synsets = [path.parent.name for path in paths]
        labels = {"class_label": [number[name] for name in synsets], "synsets": synsets}
        super().__init__(paths, size, random_crop=random_crop, labels=labels)


class ImageNetTrain(ImageNet):
    part, anywhere = "train", True


class ImageNetValidation(ImageNet):
    part, anywhere = "validation", False


class ImageNetSR(SuperResolution):
    """Pairs for super-resolution from ImageNet; the other arguments as for `SuperResolution`.

    If the published list of images that are large enough is at its place, data/imagenet_train_hr_indices.p (or _val_),
    only those are used, and a line says so.
    """

    part: str
    large: str

    def __init__(self, size: int, degradation: str = "bsrgan_light", data_root: str | None = None, **rest: Any):
        self.data_root = data_root
        super().__init__(size, degradation, **rest)

    def files(self) -> list[Path]:
        paths, chosen = images_of(self.part, self.data_root), Path(self.large)
        if not chosen.is_file():
            return paths
        indices = indices_in(chosen, len(paths))
        print(f"{chosen}: {len(indices)} of {len(paths)} images are used")
        return [paths[i] for i in indices]


class ImageNetSRTrain(ImageNetSR):
    part, large = "train", "data/imagenet_train_hr_indices.p"


class ImageNetSRValidation(ImageNetSR):
    part, large = "validation", "data/imagenet_val_hr_indices.p"
