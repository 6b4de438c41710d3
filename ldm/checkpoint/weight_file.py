"""The format of a file of weights, from its first bytes and its table of contents; no tensor is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ldm.io.files import FileError, kind, parse_json

HEADER_LIMIT = 10**8  # bytes of a safetensors header, the format's own limit
FOREIGN = {  # first bytes of what servers and tools leave in the place of weights
    b"version https://git-lfs": "a Git LFS pointer, not a checkpoint; run 'git lfs pull'",
    b"\x1f\x8b": "compressed with gzip, not a checkpoint; unpack it, or download it again",
    b"GGUF": "a GGUF file, which this project does not read; take the model's .safetensors file",
    b"\x89HDF": "an HDF5 file, not a PyTorch checkpoint",
}


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not the expected one."""


def weight_format(path: str | Path) -> str:
    """ "safetensors", "zip" (PyTorch since 1.6) or "pickle" (PyTorch before), from the content, not from the name.

    Truncated files are detected by the size that a safetensors header states, and by the table of contents at the end
    of a zip archive. An older pickle has neither.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it is not a regular file, empty, truncated, or something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a .safetensors or .ckpt checkpoint")
    if found := kind(path):
        raise CheckpointError(f"{path}: {found}; expected a .safetensors or .ckpt checkpoint")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise CheckpointError(f"{path}: this is a web page, not a checkpoint; the download went wrong")
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path}: this is {what}")
    if head[8:9] == b"{":
        _check_safetensors(path)
        return "safetensors"
    if head[:2] == b"PK":
        _check_zip(path)
        return "zip"
    if head[:1] == b"\x80":
        return "pickle"
    raise CheckpointError(f"{path}: neither a safetensors file nor a PyTorch checkpoint")


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size or length > HEADER_LIMIT:
            raise CheckpointError(f"{path}: truncated safetensors file: {size} bytes, header of {8 + length}")
        try:
            tensors = parse_json(file.read(length).decode())
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            why = error if isinstance(error, FileError) else type(error).__name__
            raise CheckpointError(
                f"{path}: damaged safetensors file: its header is not a table of tensors ({why})"
            ) from error
    if end != size:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file: {size} bytes, its header states {end}")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: truncated or damaged: the table of contents at its end is not readable ({type(error).__name__})"
        ) from error
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: a TorchScript program, not a checkpoint of weights")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, not a PyTorch checkpoint; if it holds one, unpack it")
