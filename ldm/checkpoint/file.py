"""Files of weights: safe reading of every format, writing, and a hash of the content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.conversion import PARTS, TEXT_ACTIVATIONS, ConversionError, to_ldm
from ldm.checkpoint.pickled import read_pickle, state_dict_in
from ldm.checkpoint.weight_file import CheckpointError, weight_format
from ldm.io.errors import one_line, some
from ldm.io.files import atomic_write, file_sha256, read_json

GROUP = 2**28  # bytes of a safetensors file that are mapped, and released, together
PART_FILES = {
    part: [f"{stem}{variant}{suffix}" for suffix, stem in stems.items() for variant in ("", ".fp16")]
    for part, stems in {
        **dict.fromkeys(("unet", "vae"), dict.fromkeys((".safetensors", ".bin"), "diffusion_pytorch_model")),
        "text_encoder": {".safetensors": "model", ".bin": "pytorch_model"},
    }.items()
}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of a .ckpt / .pt / .pth one, see `state_dict_in`.

    A folder of the diffusers library (Stable Diffusion 1 or 2) is converted to the names of a CompVis checkpoint, see
    `ldm.checkpoint.conversion`.

    The format is detected from the content, not from the name. Tensors are memory-mapped where the format allows it.
    No code in the file is run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is empty, truncated, not a checkpoint, or asks to run code; the folder lacks a part.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    kind = weight_format(path)
    if kind == "safetensors":
        return plain_names(path, _map_safetensors(path))
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: a PyTorch checkpoint under the wrong name; rename it to .ckpt")
    return plain_names(path, state_dict_in(path, read_pickle(path, zipped=kind == "zip")))


def check_weights(path: str | Path) -> None:
    """A quick check before `read_checkpoint`; no tensor is read.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not a checkpoint, or a folder that lacks a part.
    """
    for file in part_files(Path(path)).values() if Path(path).is_dir() else [path]:
        weight_format(file)


def plain_names(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes of training wrappers: "module." (parallel training) before every name,
    "_orig_mod." (a compiled module) anywhere in it.

    Raises:
        CheckpointError: two names become the same, or a tensor is quantized, sparse or without data.
    """
    strange = [f"{key}: {kind}" for key, value in state.items() if (kind := _strange_kind(value))]
    if strange:
        raise CheckpointError(f"{path}: expected plain tensors; got{some(strange)}")
    named = {_uncompiled(key): value for key, value in state.items()}
    if all(key.startswith("module.") for key in named):
        named = {key.removeprefix("module."): value for key, value in named.items()}
    if len(named) < len(state):
        raise CheckpointError(f"{path}: the same weights twice, with and without '_orig_mod.' in their names; save one")
    return named


def _uncompiled(key: str) -> str:
    """Names of averages have no dots inside, see `average_of`."""
    return key.replace("_orig_mod" if "model_ema." in key else "_orig_mod.", "")


def _strange_kind(value: Tensor) -> str | None:
    if value.is_quantized:
        return "quantized"
    if value.is_meta:
        return "no data"
    return None if value.layout == torch.strided else f"layout {value.layout}"


def _read_folder(path: Path) -> dict[str, Tensor]:
    files = part_files(path)
    settings = path / "text_encoder" / "config.json"
    try:
        activation = read_json(settings)["hidden_act"]
        openclip = {kind: which for which, kind in TEXT_ACTIVATIONS.items()}[activation]
    except (OSError, ValueError, KeyError, TypeError) as error:
        kinds = " or ".join(TEXT_ACTIVATIONS.values())
        raise CheckpointError(
            f"{settings}: expected JSON with hidden_act {kinds}, which tells CLIP from OpenCLIP; "
            f"got {type(error).__name__} {one_line(error)}"
        ) from error
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
            raise CheckpointError(
                f"{path}: a folder without {part}/{names[0]} (or {', '.join(names[1:])}); a "
                f"diffusers folder needs {'/, '.join(PARTS)}/, anything else is a file"
            )
        files[part] = found[0]
    return files


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, in its order; none is read before it is used.

    Each group of tensors has a mapping of its own. The pages that were read of a mapping stay in memory as long as one
    of its tensors exists. With a single mapping, copying a model from the file would need the whole file in memory
    beside it.
    """
    state, room = {}, GROUP
    try:
        file = safe_open(path, framework="pt")
        for key in file.offset_keys():
            if room <= 0:
                file, room = safe_open(path, framework="pt"), GROUP
            state[key] = file.get_tensor(key)
            room -= state[key].nbytes
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two: a dtype that PyTorch lacks
        raise CheckpointError(f"{path}: truncated or damaged safetensors file: {one_line(error)}") from error
    if not state:
        raise CheckpointError(f"{path}: a safetensors file without tensors")
    return state


# Writing and naming


def save_weights(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as .safetensors; the file appears whole or not at all.

    Args:
        state: tensors by name, on any device; tensors that share memory are written separately.
        metadata: strings by name for the file's header.
    """
    own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's content (of the weights of a diffusers folder), hexadecimal; identifies a model.

    Raises:
        OSError: no such file, or not a regular one. CheckpointError: a folder that lacks a part.
    """
    path = Path(path)
    return file_sha256(*(part_files(path).values() if path.is_dir() else [path]))
