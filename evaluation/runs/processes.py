"""Which of a run's processes this one is, and where it computes: one machine or many, by Lightning Fabric.

Fabric starts the processes of `--devices`, or finds itself in those that torchrun or SLURM started. They meet once,
when they begin, and exchange nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.cli.arguments import MOST
from ldm.cli.parser import stated
from ldm.io.errors import BadInput, blame

if TYPE_CHECKING:
    import torch

MOST_DEVICES = 1024  # of a machine; as many machines


@dataclass(frozen=True)
class Process:
    """Process `rank` of 0..world_size-1."""

    rank: int
    world_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.rank}-of-{self.world_size}"


def shard(text: str) -> tuple[int, int]:
    """argparse type of --shard: 2/8 -> (1, 8)."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts) <= MOST):
        raise argparse.ArgumentTypeError(f"expected K/N, part K of 1..N, and N at most {MOST}; got {text!r}")
    return int(part) - 1, int(parts)


def launched(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Devices of each node and nodes, as torchrun or SLURM started processes for them; None = nobody did.

    Raises:
        BadInput: there is said what can't be.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        local = stated(env, "LOCAL_WORLD_SIZE", 1, 1)
        return local, stated(env, "WORLD_SIZE", local, local) // local
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = stated(env, "SLURM_NNODES", 1, 1)
        tasks = stated(env, "SLURM_NTASKS", nodes, nodes)
        return stated(env, "SLURM_NTASKS_PER_NODE", tasks // nodes, 1), nodes
    return None


def join(args: argparse.Namespace) -> Process:
    """Take this process's place among those of `--device`, `--devices`, `--num_nodes`, `--strategy`, `--shard`.

    May start the other processes of this machine, which run the same command line.
    """
    from ldm.cli.devices import find_device

    found = find_device(args.device)
    cores = os.cpu_count() or 1
    if found.type == "cpu" and (args.devices or 1) > cores:
        raise BadInput(f"--devices: this machine has {cores} cores; got {args.devices}")
    devices, nodes = launched(os.environ) or (1, 1)
    devices, nodes = args.devices or devices, args.num_nodes or nodes
    part, parts = args.shard
    if devices * nodes == 1 and args.strategy == "auto":
        return Process(part, parts, found)
    if found.index is not None and args.device not in ("auto", "cuda"):
        raise BadInput(f"--device: {args.device} is one device; with --devices {devices} expected auto, cpu or cuda")

    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    # What torchrun and SLURM say more (ranks, addresses) is read in there, and checked by nobody.
    with blame(
        "--devices" if args.devices else "environment variables of torchrun or SLURM",
        (ValueError, RuntimeError, TypeError, LookupError),
    ):
        # Gloo, since nothing is exchanged: NCCL would keep a GPU's memory for it.
        fabric = Fabric(
            accelerator=found.type, devices=devices, num_nodes=nodes, strategy=DDPStrategy(process_group_backend="gloo")
        )
        fabric.launch()
    world_size = fabric.world_size
    return Process(part * world_size + fabric.global_rank, parts * world_size, fabric.device)
