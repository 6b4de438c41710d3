"""Arrays in npy and npz files. The header is compared with the size of the file before any value is read."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ldm.io.files import check_regular

ALIGNMENT = 64  # bytes; NumPy pads the header of an array to as many
LOCAL_HEADER, ZIP64 = 30, 20  # bytes before an entry's name in a zip file, and of the extra field of its real size
PADDING = b"\x35\xd9"  # of an extra field that aligns what follows, as Android's zipalign marks it
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Header:
    """The header of an npy file. start: bytes before the values."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int


def read_header(stream: IO[bytes], size: int) -> Header:
    """The header of an npy file, read from its beginning.

    Args:
        size: bytes of the file.

    Raises:
        ValueError: no such header, values that are neither numbers nor text, or a size other than the file's.
    """
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"an array of npy version {version}; accepted: {', '.join(map(str, HEADERS))}")
    header = Header(*HEADERS[version](stream), stream.tell())
    if header.dtype.hasobject or any(side < 0 for side in header.shape):
        raise ValueError(f"an array of {header.dtype} {header.shape}; expected numbers, and no side below 0")
    if (stated := math.prod(header.shape) * header.dtype.itemsize) != size - header.start:
        raise ValueError(
            f"truncated, or a wrong header: {header.dtype} {header.shape} are {stated} bytes, "
            f"and there are {size - header.start}"
        )
    return header


@contextmanager
def open_array(path: str | Path, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """Open an array in an npz file, or the one in an npy file, and read its header.

    Args:
        name: name of the array in an npz file.

    Raises:
        OSError: no such file, or not a regular one.
        ValueError: it has no such array, or see `read_header`.
    """
    check_regular(path)
    if Path(path).suffix != ".npz":
        with Path(path).open("rb") as stream:
            yield stream, read_header(stream, os.stat(path).st_size)
        return
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"has no array {name}")
        with archive.open(f"{name}.npy") as stream:
            yield stream, read_header(stream, archive.getinfo(f"{name}.npy").file_size)


def array_names(path: str | Path) -> set[str]:
    """The names of the arrays in an npz file.

    Raises:
        OSError, ValueError: it can't be read.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def map_array(path: str | Path, name: str) -> np.ndarray | None:
    """An array of an npz file, or the one of an npy file, as it lies there: read page by page when it is used.

    What is written to it does not reach the file.

    Returns:
        None for an array that is compressed, or in column order.

    Raises:
        OSError, ValueError: see `open_array`.
    """
    with open_array(path, name) as (_, header):
        pass
    start = header.start
    if Path(path).suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return None
        start += _start_of(path, entry)
    if header.fortran:
        return None
    return np.memmap(path, header.dtype, "c", start, header.shape) if math.prod(header.shape) else None


def _start_of(path: str | Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin in a zip file: behind its local header, which ends in a name and extras."""
    with Path(path).open("rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra


def save_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file as `numpy.savez` does, but with values that begin at multiples of 64 bytes.

    Where values begin anywhere, NumPy copies a mapped array before it computes with it.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            begin = archive.fp.tell() + LOCAL_HEADER + len(entry.filename.encode()) + len(PADDING) + 2 + ZIP64
            zeros = bytes(-begin % ALIGNMENT)
            entry.extra = PADDING + len(zeros).to_bytes(2, "little") + zeros
            with archive.open(entry, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def load_array(path: str | Path, name: str, most: int) -> np.ndarray:
    """An array of an npz file.

    Args:
        most: greatest number of values that is accepted.

    Raises:
        OSError, ValueError: see `open_array`; or it has more values.
    """
    with open_array(path, name) as (stream, header):
        count = math.prod(header.shape)
        if count > most:
            raise ValueError(f"{name} has {count} values; accepted: {most}")
        content = stream.read(count * header.dtype.itemsize)
        if len(content) < count * header.dtype.itemsize:
            raise ValueError(f"{name} is truncated")
        return np.frombuffer(content, header.dtype).reshape(header.shape, order="F" if header.fortran else "C").copy()
