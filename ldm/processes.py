"""Several processes that make the pictures of one run together, as torchrun starts them.

The first one leads: it alone looks for pictures, prints and writes, and tells the others what to compute with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli import BadInput

# PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch


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
    def of_run() -> Processes:
        """As torchrun says in the environment; without it, one alone."""
        return Processes(*(int(os.environ.get(name, default)) for name, default in (
            ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    @property
    def several(self) -> bool:
        return self.size > 1

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """They can talk to each other inside the block; over NCCL between GPUs, else over gloo."""
        if not self.several:
            yield
            return
        import torch.distributed as dist

        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if not self.several:
            return value
        import torch.distributed as dist

        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)

    def tell(self, order: Any) -> None:
        """The leader's order to all others; None = there is nothing more to do."""
        if self.several:
            import torch.distributed as dist

            dist.broadcast_object_list([order])

    def orders(self) -> Iterator[Any]:
        """What the leader tells, until there is nothing more to do."""
        import torch.distributed as dist

        while True:
            told = [None]
            try:
                dist.broadcast_object_list(told)
            except RuntimeError as error:
                raise BadInput(f"process {self.rank}: the leading process has ended ({error})") from error
            if told[0] is None:
                return
            yield told[0]


ALONE = Processes()
