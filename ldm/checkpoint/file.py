"""State dicts in files: safe reading of every format, writing, and a name for the content."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.conversion import PARTS, TEXT_ACTIVATIONS, ConversionError, to_ldm
from ldm.files import atomic_write, file_sha256

GROUP = 2 ** 28     # bytes of a safetensors file that are mapped, and let go of, together
PART_FILES = {part: [f"{stem}{variant}{suffix}" for suffix, stem in stems.items() for variant in ("", ".fp16")]
              for part, stems in {
                  **dict.fromkeys(("unet", "vae"), dict.fromkeys((".safetensors", ".bin"), "diffusion_pytorch_model")),
                  "text_encoder": {".safetensors": "model", ".bin": "pytorch_model"}}.items()}


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be."""


class _Callback:
    """Stands for the training callback that published checkpoints name as a mere dictionary key."""


INERT = [(_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def some(names: Iterable[str], limit: int = 8) -> str:
    """' (a, b, ... and 3 more)', or nothing for no names."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})" if names else ""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of a .ckpt / .pt / .pth one (bare or under 'state_dict').

    A folder of the diffusers library (Stable Diffusion 1 or 2) is read as the CompVis checkpoint that it stands for,
    see `ldm.conversion`.

    The format is told from the content, not from the name. Tensors are mapped from the file where the
    format allows it. Nothing in the file can run code.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is empty, truncated, not a checkpoint, or asks to run code; the folder lacks a part.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .safetensors or .ckpt checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: this is a web page, not a checkpoint; the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not a checkpoint; run 'git lfs pull'")
    if head[8:9] == b"{":
        return _read_safetensors(path, size, int.from_bytes(head[:8], "little"))
    if head[:1] == b"\x80" or head[:2] == b"PK":
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: a PyTorch checkpoint under the wrong name; rename it to .ckpt")
        return _tensors(path, _read_pickle(path, mmap=head[:2] == b"PK"))
    raise CheckpointError(f"{path}: neither a safetensors file nor a PyTorch checkpoint")


def _read_folder(path: Path) -> dict[str, Tensor]:
    files = part_files(path)
    settings = path / "text_encoder" / "config.json"
    try:
        activation = json.loads(settings.read_text(encoding="utf-8"))["hidden_act"]
        openclip = {kind: which for which, kind in TEXT_ACTIVATIONS.items()}[activation]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{settings}: expected JSON with hidden_act {' or '.join(TEXT_ACTIVATIONS.values())}, "
                              f"which tells CLIP from OpenCLIP; got {type(error).__name__} {error}") from error
    try:
        return to_ldm({part: read_checkpoint(file) for part, file in files.items()}, openclip)
    except ConversionError as error:
        raise CheckpointError(f"{path}: {error}") from error


def part_files(path: Path) -> dict[str, Path]:
    """The weights of each part of a diffusers folder.

    Raises:
        CheckpointError: a part is not there.
    """
    files = {}
    for part, names in PART_FILES.items():
        found = [file for file in (path / part / name for name in names) if file.is_file()]
        if not found:
            raise CheckpointError(f"{path}: a folder without {part}/{names[0]} (or {', '.join(names[1:])}); a "
                                  f"diffusers folder needs {'/, '.join(PARTS)}/, anything else is a file")
        files[part] = found[0]
    return files


def _read_safetensors(path: Path, size: int, header: int) -> dict[str, Tensor]:
    if 8 + header > size:
        raise CheckpointError(f"{path}: truncated safetensors file: {size} bytes, header of {8 + header}")
    try:
        return _map_safetensors(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file: {one_line(error)}") from error


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, in its order; none is read before it is used.

    Each group of them has a mapping of its own. What was read of a mapping stays in memory as long as one of its
    tensors lives, so with a single one a model copied from the file would need the whole file beside it.
    """
    state, file = {}, safe_open(path, framework="pt")
    room = GROUP
    for key in file.offset_keys():
        if room <= 0:
            file, room = safe_open(path, framework="pt"), GROUP
        state[key] = file.get_tensor(key)
        room -= state[key].nbytes
    return state


def _read_pickle(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a hostile or cut-off pickle can make the reader fail in any way
        wanted = _unsafe_globals(path, mmap, str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: refused, because the pickle asks to run {', '.join(wanted)}; ask its author for a "
                f".safetensors file, or convert it in a sandbox: torch.load(weights_only=False), then "
                f"ldm.checkpoint.save_weights of its state_dict") from error
        raise CheckpointError(f"{path}: truncated, damaged or not a PyTorch checkpoint: "
                              f"{type(error).__name__}") from error


def _unsafe_globals(path: Path, zipped: bool, refusal: str) -> list[str]:
    """The names outside PyTorch's own that a refused pickle asked for; the older format tells the first."""
    named = re.findall(r"\bGLOBAL (\S+)", refusal)
    if zipped and named:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return named[:1]


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: expected a dictionary of tensors or one under 'state_dict'; "
                              f"got {type(state).__name__}{' without entries' if state == {} else ''}")
    strangers = [str(key) for key, value in state.items()
                 if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers:
        raise CheckpointError(f"{path}: expected a dictionary of tensors or one under 'state_dict'; "
                              f"not tensors:{some(strangers)}")
    return dict(state)


# Writing and naming

def save_weights(path: str | Path, state: Mapping[str, Tensor],
                 metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as .safetensors; the file appears whole or not at all.

    Args:
        state: tensors by name, on any device; those that share memory are written once each.
        metadata: strings by name for the file's header.
    """
    own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's content (of a diffusers folder's weights), hexadecimal: names what made a picture."""
    path = Path(path)
    return file_sha256(*(part_files(path).values() if path.is_dir() else [path]))
