"""Read PyTorch's own files without running code, and find the state dict in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.weight_file import CheckpointError
from ldm.io.errors import some

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
