"""LSUN: a list of files in a folder, or the database that LSUN is published as."""

from __future__ import annotations

import io
from functools import cache
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


@cache
def environment(folder: Path) -> lmdb.Environment:
    """An LMDB database. A process can open it only once; those that are forked from it read the same memory."""
    return lmdb.open(str(folder), readonly=True, lock=False, max_readers=1, readahead=False)


class Database:
    """The images of an LMDB database."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        with self.transaction() as transaction:
            self.keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]

    def transaction(self) -> Any:
        return environment(self.folder).begin()

    def image(self, i: int) -> Image.Image:
        with self.transaction() as transaction:
            data = transaction.get(self.keys[i])
        with opened(io.BytesIO(data)) as image:
            return image.convert("RGB")


class LSUNSplit(LSUNBase):
    """A published part of LSUN below data/lsun: the database that LSUN publishes, or a list and a folder."""

    list: str
    folder: str
    lmdb: str | None = None
    mirrored = 0.5

    def __init__(self, txt_file: str | None = None, data_root: str | None = None, **rest: Any):
        root = Path("data/lsun")
        downloaded = self.lmdb is not None and (root / self.lmdb / "data.mdb").is_file()
        folder = data_root or str(root / (self.lmdb if downloaded else self.folder))
        super().__init__(txt_file or str(root / self.list), folder, **{"flip_p": self.mirrored} | rest)


class LSUNChurchesTrain(LSUNSplit):
    list, folder, lmdb = "church_outdoor_train.txt", "churches", "church_outdoor_train_lmdb"


class LSUNChurchesValidation(LSUNSplit):
    list, folder, lmdb = "church_outdoor_val.txt", "churches", "church_outdoor_val_lmdb"
    mirrored = 0.0


class LSUNBedroomsTrain(LSUNSplit):
    list, folder, lmdb = "bedrooms_train.txt", "bedrooms", "bedroom_train_lmdb"


class LSUNBedroomsValidation(LSUNSplit):
    list, folder, lmdb = "bedrooms_val.txt", "bedrooms", "bedroom_val_lmdb"
    mirrored = 0.0


class LSUNCatsTrain(LSUNSplit):
    list, folder = "cat_train.txt", "cats"


class LSUNCatsValidation(LSUNSplit):
    list, folder, mirrored = "cat_val.txt", "cats", 0.0
