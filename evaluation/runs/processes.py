"""The processes of a run, on one machine or many.

Lightning Fabric starts them, or takes those that torchrun or SLURM started. They meet once, at the beginning, and
exchange nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from evaluation.runs.generate import Process
from ldm.cli.parser import stated
from ldm.cli.setup import find_device
from ldm.io.errors import SettingError, fault_of


def launched(env: Mapping[str, str]) -> tuple[int, int] | None:
    """Processes on each machine, and machines, as torchrun or SLURM started them; None = they did not.
    Raises BadInput: an environment variable that can't be right."""
    if "TORCHELASTIC_RUN_ID" in env:
        local = stated(env, "LOCAL_WORLD_SIZE", 1, 1)
        return local, stated(env, "WORLD_SIZE", local, local) // local
    if "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = stated(env, "SLURM_NNODES", 1, 1)
        tasks = stated(env, "SLURM_NTASKS", nodes, nodes)
        return stated(env, "SLURM_NTASKS_PER_NODE", tasks // nodes, 1), nodes
    return None


def join(
    device: str = "auto",
    devices: int | None = None,  # processes on each machine; None = as torchrun or SLURM says, or 1
    num_nodes: int | None = None,  # machines, the same
    strategy: str = "auto",  # auto (Fabric only for several processes) or ddp
    part: tuple[int, int] = (0, 1),  # which part of how many of the run these processes make, (0..parts-1, parts)
) -> Process:
    """Take this process's place among those of the run; may start the other processes of this machine, which run the
    same command line. Raises SettingError: no such device, more processes than cores, or one device for several
    processes. BadInput: environment variables of torchrun or SLURM that can't be right."""
    found = find_device(device)
    cores = os.cpu_count() or 1
    if found.type == "cpu" and (devices or 1) > cores:
        raise SettingError("devices", f"this machine has {cores} cores; got {devices}")
    stated_devices, stated_nodes = launched(os.environ) or (1, 1)
    each, nodes = devices or stated_devices, num_nodes or stated_nodes
    if each * nodes == 1 and strategy == "auto":
        return Process(*part, found)
    if found.index is not None and device not in ("auto", "cuda"):
        what = f"{device} is one device; with {{devices}} {each} expected auto, cpu or cuda"
        raise SettingError("device", what, "devices")
    # Ranks and addresses in the environment are read by Fabric, and checked by nobody.
    suspect = "devices" if devices else "environment variables of torchrun or SLURM"
    with fault_of(suspect, (ValueError, RuntimeError, TypeError, LookupError)):
        import lightning_fabric  # slow to import, and one process needs none

        # Gloo, since nothing is exchanged: NCCL would keep a GPU's memory for it.
        ddp = lightning_fabric.strategies.DDPStrategy(process_group_backend="gloo")
        fabric = lightning_fabric.Fabric(accelerator=found.type, devices=each, num_nodes=nodes, strategy=ddp)
        fabric.launch()
    rank, world_size = part[0] * fabric.world_size + fabric.global_rank, part[1] * fabric.world_size
    return Process(rank, world_size, fabric.device)
