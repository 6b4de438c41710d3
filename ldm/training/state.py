"""The saved state from which a training is resumed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.io.files import check_regular

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
PARTS = {
    "global_step": int,
    "epoch": int,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "pytorch-lightning_version": str,
}


def read_state(path: Path) -> dict[str, Any]:
    """The state of a training in its `last.ckpt`; tensors are mapped from the file.

    The content is checked first, against the CRCs in the file.

    Raises:
        ValueError: the file is damaged, or not a state of a training; the message names the state before it, if any.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if isinstance(state, dict) and all(isinstance(state.get(part), kind) for part, kind in PARTS.items()):
                return state
            raise ValueError("it does not hold the state of a training")
        raise ValueError(f"its part {damaged} does not match its CRC")
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        previous = path.with_name(PREVIOUS)
        advice = (
            f"the state before it is in {previous.name}: to go on from that, give it the name {path.name}"
            if previous.exists() and path.name != PREVIOUS
            else "begin a new run"
        )
        reason = (
            " ".join(str(error).split())[:200]
            if isinstance(error, ValueError | zipfile.BadZipFile)
            else type(error).__name__
        )
        raise ValueError(f"{path} is damaged ({reason}); {advice}") from error


def check_fits(state: Mapping[str, Any], module: torch.nn.Module, path: Path) -> None:
    """Raise ValueError unless the weights of a state have the names, shapes and types of the module's."""
    kept, wanted = state["state_dict"], module.state_dict()
    for name in [*wanted, *kept]:
        there, here = (described(weights.get(name)) for weights in (kept, wanted))
        if there != here:
            raise ValueError(
                f"{path} does not fit the configuration: {name} is {there} there, and {here} by the "
                f"configuration; a model that is changed needs a new run"
            )


def described(weight: Any) -> str:
    return f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, torch.Tensor) else "missing"


def steps_done(path: Path) -> int:
    """The number of optimizer steps of a saved state."""
    return read_state(path)["global_step"]
