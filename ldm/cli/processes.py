"""Several processes that make the pictures of one run together, as torchrun starts them.

The first one leads: it alone looks for pictures, prints and writes, and tells the others what to compute with it.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.cli.parser import whole
from ldm.io.errors import BadInput, blame

# PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch

MOST_PROCESSES = 65536


def stated(env: Mapping[str, str], name: str, default: int, low: int, high: int = MOST_PROCESSES) -> int:
    """A number in low..high that an environment variable states; the default if it is not set, or empty.

    Raises:
        BadInput: another value.
    """
    try:
        return whole(low, high)(env.get(name) or default)
    except ArgumentTypeError as error:
        raise BadInput(f"environment variable {name}: {error}; torchrun and SLURM set it") from None


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
        """As torchrun says in the environment; without it, one alone.

        Raises:
            BadInput: there it says what can't be.
        """
        size = stated(os.environ, "WORLD_SIZE", 1, 1)
        rank, local = (stated(os.environ, name, 0, 0, size - 1) for name in ("RANK", "LOCAL_RANK"))
        return Processes(rank, size, local)

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
        with blame(f"environment variable WORLD_SIZE: {self.size} processes can't meet", (ValueError, RuntimeError)):
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
