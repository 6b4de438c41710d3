"""One file of a database's embeddings, read where it lies."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.io.arrays import array_names, load_array, map_array, open_array
from ldm.io.files import FileError, parse_json_lines, read_text

EMBEDDING = "embedding"  # names of arrays: as published,
LENGTH = "length"  # and the embeddings' lengths, which then need not be computed
SUFFIXES = (".npz", ".npy")
CHUNK_BYTES = 1 << 21  # of embeddings at a time: what stays in a processor's cache while it is used twice
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of an npy file, that stand for its content
MOST_NUMBERS = 1 << 31  # of an array other than the embeddings


@dataclass(frozen=True)
class Part:
    """Embeddings (rows, width) in an npz file with whatever else it has of each row, or in an npy file.

    Those of an uncompressed file are mapped; a compressed one is unpacked at each use, a chunk at a time.
    """

    path: Path
    rows: int
    width: int
    dtype: np.dtype

    @staticmethod
    def open(path: Path) -> Part:
        """Read the header.

        Raises:
            FileError: no such array, or a damaged file.
        """
        with _named(path), open_array(path, EMBEDDING) as (_, header):
            if len(header.shape) != 2 or header.dtype.kind != "f" or not all(header.shape) or header.fortran:
                raise ValueError(f"{EMBEDDING} is {header.dtype} {header.shape}; expected numbers (rows, width)")
            return Part(path, *header.shape, header.dtype)

    @cached_property
    def mapped(self) -> np.ndarray | None:
        """The embeddings; None in a compressed file."""
        with _named(self.path):
            mapped = map_array(self.path, EMBEDDING)
        return None if mapped is None else np.asarray(mapped)

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """The embeddings' lengths, (rows,); None if the file does not have them."""
        return self.field(LENGTH, np.arange(self.rows)) if self.has(LENGTH) else None

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The embeddings in order, (at most some, width) float32 at a time, and their lengths."""
        step = max(1, CHUNK_BYTES // (self.width * self.dtype.itemsize))
        for first, chunk in zip(range(0, self.rows, step), self._stored(step), strict=True):
            chunk = np.require(chunk, np.float32, "A")  # NumPy computes at full speed with aligned values alone
            if self.lengths is None:
                yield chunk, torch.linalg.vector_norm(torch.from_numpy(chunk), dim=1).numpy()
            else:
                yield chunk, self.lengths[first : first + step]

    def _stored(self, step: int) -> Iterator[np.ndarray]:
        if self.mapped is not None:
            yield from (self.mapped[first : first + step] for first in range(0, self.rows, step))
            return
        with _named(self.path), open_array(self.path, EMBEDDING) as (stream, _):
            for first in range(0, self.rows, step):
                count = min(step, self.rows - first)
                content = stream.read(count * self.width * self.dtype.itemsize)
                yield np.frombuffer(bytearray(content), self.dtype).reshape(count, self.width)

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows, (n, width) float32."""
        if self.mapped is not None:
            return self.mapped[rows].astype(np.float32)
        found, first = np.empty((len(rows), self.width), np.float32), 0
        for chunk, _ in self.chunks():
            here = (rows >= first) & (rows < first + len(chunk))
            found[here] = chunk[rows[here] - first]
            first += len(chunk)
        return found

    def has(self, name: str) -> bool:
        """Whether the file has another array of that name."""
        with _named(self.path):
            return self.path.suffix == ".npz" and name in array_names(self.path)

    def field(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Another array of the file, of some rows: img_id, patch_coords, thumbnail."""
        with _named(self.path):
            mapped = map_array(self.path, name)
            array = load_array(self.path, name, MOST_NUMBERS) if mapped is None else mapped
            if len(array) != self.rows:
                raise ValueError(f"{name} has {len(array)} rows, {EMBEDDING} {self.rows}")
        return np.asarray(array[rows])

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """What is known of each row's image; empty without a file of that name beside the embeddings."""
        path = self.path.with_suffix(".jsonl")
        if not path.is_file():
            return []
        found = [entry for _, entry in parse_json_lines(read_text(path))]
        if len(found) != self.rows or not all(isinstance(entry, dict) for entry in found):
            raise FileError(f"{path}: expected {self.rows} lines, one for each row of {self.path.name}")
        return found

    @property
    def content(self) -> list[Any]:
        """What tells these embeddings from others, without reading them all."""
        return [self.path.name, self.rows, self.width, self._checksum()]

    def _checksum(self) -> int:
        if self.path.suffix == ".npz":
            with zipfile.ZipFile(self.path) as archive:
                return archive.getinfo(f"{EMBEDDING}.npy").CRC
        total, size = 0, self.path.stat().st_size
        with self.path.open("rb") as file:
            for at in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64).tolist():
                file.seek(at)
                total = zlib.crc32(file.read(SAMPLE_BYTES), total)
        return total


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a damaged file become a FileError that names it."""
    try:
        yield
    except FileError:
        raise
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise FileError(f"{path}: {' '.join(str(error).split())}") from error


def parts_in(folder: Path) -> list[Part]:
    """The parts of a folder, by their numbers.

    Raises:
        ValueError: there are none, they are of several widths, or one is damaged.
    """
    paths = sorted(
        (path for path in folder.iterdir() if path.suffix in SUFFIXES), key=lambda path: (number_of(path), path.name)
    )
    if not paths:
        raise ValueError(f"{folder}: no parts; expected files NAME-part_NUMBER.npz with the array {EMBEDDING}")
    parts = [Part.open(path) for path in paths]
    for part in parts:
        if part.width != parts[0].width:
            raise ValueError(
                f"{part.path}: embeddings {part.width} wide; those of {parts[0].path} are {parts[0].width}"
            )
    return parts


def number_of(path: Path) -> int:
    """The number in a part's name; -1 if it has none."""
    found = re.search(r"part_(\d{1,9})$", path.stem)
    return int(found[1]) if found else -1
