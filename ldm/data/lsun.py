"""LSUN: a list of files in a folder, or the database that LSUN is published as."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.images import INTERPOLATIONS, center_square, in_range, listed, uniform
from ldm.io.images import open_image, opened


class LSUNBase(Dataset):
    """Squares from the centre, resized by Pillow, half of them mirrored in training.

    Args:
        txt_file: list of the images, one path below data_root a line; it is not read for a database.
        data_root: a folder of images, or of an LMDB database (`data.mdb`) as LSUN publishes it.
        size: side of the images; None = the square as it is.
        interpolation: linear, bilinear, bicubic or lanczos.
        flip_p: share of images that are mirrored.

    Raises:
        ValueError: unknown interpolation; no such list; nothing in it.
    """

    def __init__(
        self,
        txt_file: str,
        data_root: str,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
    ):
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: {interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        self.root, self.size, self.interpolation, self.flip_p = Path(data_root), size, interpolation, flip_p
        self.database = Database(self.root) if (self.root / "data.mdb").is_file() else None
        self.paths = [] if self.database else listed(Path(txt_file), self.root)

    def __len__(self) -> int:
        return len(self.database.keys if self.database else self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        name = self.database.keys[i].decode() if self.database else str(self.paths[i])
        image = self.database.image(i) if self.database else open_image(self.paths[i])
        image = center_square(image, self.size or min(image.size), self.interpolation)
        pixels = np.asarray(image)
        pixels = pixels[:, ::-1] if uniform() < self.flip_p else pixels
        return {"image": in_range(pixels), "file_path_": name}


class Database:
    """The images of an LMDB database; each process opens it for itself."""

    def __init__(self, folder: Path):
        self.folder, self._opened = folder, None
        with self.transaction() as transaction:
            self.keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]

    def transaction(self) -> Any:
        if self._opened is None:
            self._opened = lmdb.open(str(self.folder), readonly=True, lock=False, max_readers=1, readahead=False)
        return self._opened.begin()

    def image(self, i: int) -> Image.Image:
        with self.transaction() as transaction:
            data = transaction.get(self.keys[i])
        with opened(io.BytesIO(data)) as image:
            return image.convert("RGB")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


class LSUNSplit(LSUNBase):
    """A published part of LSUN; its list and its folder lie below data/lsun."""

    list: str
    folder: str
    mirrored = 0.5

    def __init__(self, txt_file: str | None = None, data_root: str | None = None, **rest: Any):
        flip = {"flip_p": self.mirrored} | rest
        super().__init__(txt_file or f"data/lsun/{self.list}", data_root or f"data/lsun/{self.folder}", **flip)


class LSUNChurchesTrain(LSUNSplit):
    list, folder = "church_outdoor_train.txt", "churches"


class LSUNChurchesValidation(LSUNSplit):
    list, folder, mirrored = "church_outdoor_val.txt", "churches", 0.0


class LSUNBedroomsTrain(LSUNSplit):
    list, folder = "bedrooms_train.txt", "bedrooms"


class LSUNBedroomsValidation(LSUNSplit):
    list, folder, mirrored = "bedrooms_val.txt", "bedrooms", 0.0


class LSUNCatsTrain(LSUNSplit):
    list, folder = "cat_train.txt", "cats"


class LSUNCatsValidation(LSUNSplit):
    list, folder, mirrored = "cat_val.txt", "cats", 0.0
