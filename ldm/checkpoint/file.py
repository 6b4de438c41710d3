"""Files of weights: safe reading of every format, writing, and a hash of the content."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import conversion_xl
from ldm.checkpoint.conversion import (
    OPENCLIP,
    PARTS,
    TEXT_ACTIVATIONS,
    UNET,
    ConversionError,
    is_video,
    to_ldm,
    video_to_ldm,
)
from ldm.io.errors import one_line, some
from ldm.io.files import FileError, atomic_write, file_sha256, kind, parse_json, read_json
from ldm.modules.ema import ema_name

GROUP = 2**27  # bytes of a safetensors file that are mapped, and released, together
SECOND = "text_encoder_2"
PART_FILES = {
    part: [f"{stem}{variant}{suffix}" for suffix, stem in stems.items() for variant in ("", ".fp16")]
    for part, stems in {
        **dict.fromkeys(("unet", "vae"), dict.fromkeys((".safetensors", ".bin"), "diffusion_pytorch_model")),
        **dict.fromkeys(("text_encoder", "text_encoder_2"), {".safetensors": "model", ".bin": "pytorch_model"}),
    }.items()
}
# The files of ModelScope's text to video, and what stands before the names of each: those of the first stage have it.
MODELSCOPE = {
    "text2video_pytorch_model.pth": UNET,
    "VQGAN_autoencoder.pth": "",
    "open_clip_pytorch_model.bin": OPENCLIP,
}
UNUSED = ("visual.", "loss.", "model_ema.")  # in them: the encoder of images, and a training's own
# How the weights of a run of main.py begin, of a diffusion model or a first stage; published ones never do.
TRAINED = ("model.model.", "model.encoder.")
CONDITIONER = "cond_stage_model."
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # as diffusers calls them


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of a .ckpt / .pt / .pth one, see `state_dict_in`.

    A folder of the diffusers library (Stable Diffusion 1, 2 or XL) is converted to the names of the published file, see
    `ldm.checkpoint.conversion` and `conversion_xl`; the files in a folder of ModelScope's text to video become one.

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
    return of_training(named) if any(key.startswith(TRAINED) for key in named) else named


def of_training(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a run of main.py under the published names; the conditioner's weights are their averages."""
    averages = {k.removeprefix("conditioner_ema."): v for k, v in state.items() if k.startswith("conditioner_ema.")}
    named = {}
    for key, value in state.items():
        if key.startswith("network_ema."):
            named[key.replace("network_ema.", "model_ema.", 1)] = value
        elif not key.startswith("conditioner_ema."):
            named[key.removeprefix("model.")] = value
    for key in [key for key in named if key.startswith(CONDITIONER)]:
        named[key] = averages.get(ema_name(key.removeprefix(CONDITIONER)), named[key])
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
    if files.keys() == MODELSCOPE.keys():
        return {
            MODELSCOPE[name] + key: value
            for name, file in files.items()
            for key, value in read_checkpoint(file).items()
            if not key.startswith(UNUSED)
        }
    if SECOND in files:
        try:
            return conversion_xl.to_ldm({part: read_checkpoint(file) for part, file in files.items()})
        except ConversionError as error:
            raise CheckpointError(f"{path}: {error}") from error
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
        parts = {part: read_checkpoint(file) for part, file in files.items()}
        return to_ldm(parts, openclip, video_to_ldm if is_video(parts["unet"]) else None)
    except ConversionError as error:
        raise CheckpointError(f"{path}: {error}") from error


def part_files(path: Path) -> dict[str, Path]:
    """The weights of each part of a diffusers folder, in which a second text encoder is SDXL's; or ModelScope's files.

    Raises:
        CheckpointError: a part is not there.
    """
    network, *others = MODELSCOPE
    if (path / network).is_file():
        if missing := [name for name in others if not (path / name).is_file()]:
            raise CheckpointError(f"{path}: has {network} of ModelScope's text to video, but not {', '.join(missing)}")
        return {name: path / name for name in MODELSCOPE}
    files = {}
    parts = [*PARTS, SECOND] if (path / SECOND).is_dir() else [*PARTS]
    if SECOND in parts and not (path / "text_encoder").exists():
        parts.remove("text_encoder")  # SDXL's refiner
    for part in parts:
        names = PART_FILES[part]
        found = [file for file in (path / part / name for name in names) if file.is_file()]
        if not found:
            raise CheckpointError(
                f"{path}: a folder without {part}/{names[0]} (or {', '.join(names[1:])}); a "
                f"diffusers folder needs {'/, '.join(parts)}/, anything else is a file; scripts/if2img.py takes the "
                f"folders of DeepFloyd-IF"
            )
        files[part] = found[0]
    return files


def stated_prediction(ckpt: Path) -> str | None:
    """What the network predicts ("eps", "v", "x0") by the scheduler of a diffusers folder; None = not stated."""
    try:
        settings = read_json(ckpt / "scheduler" / "scheduler_config.json")
        return PREDICTIONS.get(settings.get("prediction_type", "epsilon"))
    except (OSError, ValueError, AttributeError, TypeError):
        return None


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

    The content is read once in a process, and again when the file has changed.

    Raises:
        OSError: no such file, or not a regular one. CheckpointError: a folder that lacks a part.
    """
    path = Path(path)
    files = tuple(part_files(path).values()) if path.is_dir() else (path,)
    return _content(
        files, tuple((at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns) for at in map(Path.stat, files))
    )


@lru_cache(maxsize=64)
def _content(files: tuple[Path, ...], states: tuple[tuple[int, ...], ...]) -> str:
    """SHA-256 of files; `states` differ when one of them was written."""
    return file_sha256(*files)


# The format of a file of weights, from its first bytes and its table of contents; no tensor is read.


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


# Read PyTorch's own files without running code, and find the state dict in them.


WRAPPERS = ("state_dict", "model", "ema", "model_ema", "ema_state_dict", "model_state_dict", "module")
PLAIN_DTYPE = re.compile(r"[?bBhHiIlLqQefdgFDGSUmM]|[biufcSUmM]\d+")


class _Inert:
    """Placeholder for an object that is not read: accepts any arguments and any state, and keeps nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Callback(_Inert):
    """The training callback that published checkpoints use as a dictionary key."""


class _NumpyScalar(_Inert):
    pass


class _NumpyArray(_Inert):
    pass


class _NumpyArrayType(_Inert):
    pass


class _NumpyDtype(_Inert):
    """Refuses arrays of objects and of records; numbers, text and dates are accepted."""

    def __init__(self, code: Any = None, *rest: Any):
        if not (isinstance(code, str) and PLAIN_DTYPE.fullmatch(code)):
            raise ValueError(f"a numpy array of dtype {code!r}")


# Old checkpoints (Lightning 1.x) hold numpy numbers beside the weights: a best score, a learning rate. Only tensors
# are kept, so each of these names maps to a placeholder, and numpy's own functions never get data of the file.
INERT = [
    (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_NumpyDtype, "numpy.dtype"),
    (_NumpyArrayType, "numpy.ndarray"),
    *(
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name, stand_in in (("scalar", _NumpyScalar), ("_reconstruct", _NumpyArray))
    ),
]


def read_pickle(path: Path, zipped: bool) -> Any:
    """The content of a file of `torch.save`. No code in it is run.

    Raises:
        CheckpointError: it is truncated or damaged, or holds other objects than tensors, plain values and numpy's.
    """
    with torch.serialization.safe_globals(INERT):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:  # a hostile or cut-off pickle can make the reader fail in any way
            wanted = _unsafe_globals(path, zipped, str(error))
            if wanted:
                raise CheckpointError(
                    f"{path}: refused, because the pickle asks for code{some(wanted)}; ask its author for a "
                    f".safetensors file, or convert it in a sandbox: torch.load(weights_only=False), then "
                    f"ldm.checkpoint.save_weights of its state_dict"
                ) from error
            if found := re.search("a numpy array of dtype .*", str(error)):
                raise CheckpointError(f"{path}: refused, because the pickle holds {found[0]}") from error
            raise CheckpointError(
                f"{path}: truncated, damaged or not a PyTorch checkpoint: {type(error).__name__}"
            ) from error


def _unsafe_globals(path: Path, zipped: bool, refusal: str) -> list[str]:
    """The names of the code that a refused pickle asked for; for the older format only the first."""
    named = re.findall(r"\bGLOBAL (\S+)", refusal)
    if zipped and named:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return named[:1]


def state_dict_in(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict of a checkpoint: at the top, or under a name that trainers use (WRAPPERS).

    Raises:
        CheckpointError: there is none, or more than one; the message lists what was found.
    """
    if _is_state(content):
        return dict(content)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected {_expected()}; got {type(content).__name__}")
    found = {name: content[name] for name in WRAPPERS if _is_state(content.get(name))}
    if "state_dict" in found or len(found) == 1:
        return dict(found.get("state_dict") or next(iter(found.values())))
    if found:
        which = ", ".join(f"{name!r} ({len(state)} tensors)" for name, state in found.items())
        raise CheckpointError(
            f"{path}: holds several state dicts: {which}; save the one that you want by itself, "
            f"with ldm.checkpoint.save_weights"
        )
    inner = content.get("state_dict", content)
    if isinstance(inner, Mapping) and inner:
        strangers = [
            f"{key}: {_kind(value)}"
            for key, value in inner.items()
            if not (isinstance(key, str) and isinstance(value, Tensor))
        ]
        raise CheckpointError(f"{path}: expected {_expected()}; not tensors:{some(strangers)}")
    raise CheckpointError(
        f"{path}: expected {_expected()}; got {_kind(inner)}{' without entries' if inner == {} else ''}"
    )


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _expected() -> str:
    return f"a dictionary of tensors, or one under {', '.join(map(repr, WRAPPERS[:-1]))} or {WRAPPERS[-1]!r}"


def _kind(value: Any) -> str:
    names = {_NumpyScalar: "numpy number", _NumpyArray: "numpy array", _NumpyDtype: "numpy dtype"}
    return names.get(type(value), type(value).__name__)
