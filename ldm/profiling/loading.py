"""How long loading a model takes and how much memory, on checkpoints of its shapes filled with random numbers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint import load_config, load_model, read_checkpoint, unmade_model
from ldm.checkpoint.model import fill, unmade
from ldm.profiling.timing import resident
from ldm.util import instantiate_from_config


@dataclass(frozen=True)
class Loading:
    """seconds: until the model is there; seconds_read: until each of its weights was read; the rest in bytes.

    file: the checkpoint; before, peak: what the process had in memory; weights: as the model computes with them.
    """

    file: int
    seconds: float
    seconds_read: float
    before: int
    peak: int
    weights: int


def measure_loading(config: str, suffix: str, dtype: str, folder: str) -> Loading:
    """Load a checkpoint of random weights in a new process.

    Args:
        config: of the model.
        suffix, dtype: of the checkpoint, .safetensors or .ckpt, and a name of PyTorch's.
        folder: where the checkpoint lies for that time.

    Raises:
        ValueError, OSError: the config makes no model.
    """
    load_config(config)  # before a process is started
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / f"model{suffix}"
        in_new_process(_write, config, path, dtype)
        return in_new_process(_load, config, path)


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own, which is started for it and ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def random_weights(state: Mapping[str, Tensor], dtype: str = "float32") -> dict[str, Tensor]:
    """Random numbers in the place of tensors on the meta device."""
    torch.manual_seed(0)
    return {
        key: torch.randn(value.shape).mul_(0.02).to(getattr(torch, dtype)) if value.is_meta else value
        for key, value in state.items()
    }


def _write(config: str, path: Path, dtype: str) -> None:
    """Write a checkpoint of random weights in the config's shapes."""
    state = random_weights(unmade_model(load_config(config)).state_dict(), dtype)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)


def _load(config: str, path: Path) -> Loading:
    return measured(lambda: load_model(config, path), path)


def load_network(
    config: Mapping[str, Any], renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None, path: Path
) -> Loading:
    """Load a network alone, as a model's is loaded; `renamed`: the file's names -> ours, None = they are ours."""

    def load() -> nn.Module:
        network, state = unmade(lambda: instantiate_from_config(config)), read_checkpoint(path)
        if renamed is not None:
            state = renamed(state)  # alone, so that the file is let go of on the way
        fill(network, state, path, "raw", assign=True)
        return network

    return measured(load, path)


def measured(load: Callable[[], nn.Module], path: Path) -> Loading:
    """What it takes in this process to load a model from a file and to read each of its weights."""
    before, began = resident("VmHWM"), time.perf_counter()
    model = load()
    seconds = time.perf_counter() - began
    tensors = model.state_dict().values()
    for tensor in tensors:
        tensor.sum()
    seconds_read, weights = time.perf_counter() - began, sum(tensor.nbytes for tensor in tensors)
    return Loading(path.stat().st_size, seconds, seconds_read, before, resident("VmHWM"), weights)
