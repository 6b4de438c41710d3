"""Where a run computes: its device, and the processes that share its work, as torchrun starts them.

The first process leads: it alone looks for images, prints and writes, and tells the others what to compute with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ldm.cli.parser import torchrun_ranks
from ldm.io.errors import BadInput, SettingError, fault_of


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    rank:  0..size-1; 0 leads.
    local: rank among those of this machine, which names its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @staticmethod
    def from_environment() -> Processes:
        """As torchrun says in the environment; without it, one alone.

        Raises:
            BadInput: there it says what can't be.
        """
        return Processes(*torchrun_ranks())

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """They can talk to each other inside the block; over NCCL between GPUs, else over gloo."""
        if not self.several:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with fault_of(f"environment variable WORLD_SIZE: {self.size} processes can't meet", (ValueError, RuntimeError)):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if not self.several:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)

    def tell(self, order: Any) -> None:
        """The leader's order to all others; None = there is nothing more to do."""
        if self.several:
            dist.broadcast_object_list([order])

    def orders(self) -> Iterator[Any]:
        """What the leader tells, until there is nothing more to do."""
        while True:
            order = [None]
            try:
                dist.broadcast_object_list(order)
            except RuntimeError as error:
                raise BadInput(f"process {self.rank}: the leading process has ended ({error})") from error
            if order[0] is None:
                return
            yield order[0]


ALONE = Processes()


def find_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of that name, or the best one for auto.

    Raises:
        SettingError: it is not on this machine.
    """
    if processes.several:
        return _own_device(name, processes)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise SettingError("device", f"{name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def _own_device(name: str, processes: Processes) -> torch.device:
    """This process's, where there are several: the CPU for all, or a GPU for each."""
    if name not in ("auto", "cuda", "cpu"):
        raise SettingError(
            "device", f"{name} is one device, and there are {processes.size} processes; accepted: auto, cuda, cpu"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if processes.local >= gpus:
        raise SettingError("device", f"process {processes.rank} has no GPU of its own; this machine has {gpus}")
    return torch.device("cuda", processes.local)
