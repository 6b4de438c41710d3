"""The device that a command line's --device names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm.cli.processes import ALONE, Processes
from ldm.io.errors import BadInput, SettingError, flags_named

# PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch


def find_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of that name, or the best one for auto.

    Raises:
        BadInput: it is not on this machine.
    """
    if processes.several:
        return _own_device(name, processes)
    with flags_named({}):
        return device_named(name)


def device_named(name: str) -> torch.device:
    """The device of that name, or the best one for auto.

    Raises:
        SettingError: `device`: it is not on this machine.
    """
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise SettingError("device", f"{name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def _own_device(name: str, processes: Processes) -> torch.device:
    """This process's, where there are several: the CPU for all, or a GPU for each."""
    import torch

    if name not in ("auto", "cuda", "cpu"):
        raise BadInput(
            f"--device: {name} is one device, and there are {processes.size} processes; accepted: auto, cuda, cpu"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if processes.local >= gpus:
        raise BadInput(f"--device: process {processes.rank} has no GPU of its own; this machine has {gpus}")
    return torch.device("cuda", processes.local)
