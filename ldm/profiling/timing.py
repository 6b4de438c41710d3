"""Seconds, rates and memory of calls, where a call's time goes, and how benchmarks tell what they found."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity as ACTIVITY

from ldm.io.errors import fault_of
from ldm.io.files import write_json
from ldm.profiling.cost import timed

CPU = torch.device("cpu")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of this process, on Linux

MATRIX, GPU_MATRIX = 2048, 8192  # sides of a matrix product that fills the device for a moment
# By what stands in an operator's name; the first that fits counts.
KINDS = {
    "conv": "convolution",
    "scaled_dot_product": "attention",
    "linear": "linear",
    "addmm": "linear",
    "mm": "linear",
    "norm": "norm",
}


@dataclass(frozen=True)
class Seconds:
    """What one thing took, each time."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the range, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> dict[str, Seconds]:
    """Time every call in turn, `repeats` times round, so that drifts meet all of them; warm them up before."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(timed(call, device)[1])
    return {name: Seconds(tuple(values)) for name, values in taken.items()}


def matrix_product(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Any], int]:
    """A matrix product that fills the device for a moment, and its floating-point operations."""
    side = MATRIX if device.type == "cpu" else GPU_MATRIX
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    times = 2

    def call() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return call, times * 2 * side**3


def shares(call: Callable[[], Any], device: torch.device = CPU) -> dict[str, float]:
    """How the time of call() divides among kinds of operators, on a GPU that of its kernels; they sum to 1."""
    gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ACTIVITY.CPU] + [ACTIVITY.CUDA] * gpu) as profile:
        call()
    spent: dict[str, float] = {kind: 0.0 for kind in (*dict.fromkeys(KINDS.values()), "other")}
    for event in profile.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "other")
        spent[kind] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def peak_memory(call: Callable[[], Any], device: torch.device = CPU) -> int:
    """Most bytes that tensors made during call() held at one time.

    What was there before does not count, nor what libraries allocate past PyTorch.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[ACTIVITY.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def resident(name: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at their peak (VmHWM); Linux only."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What timings depend on."""
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    model = "unknown"
    if (cpu := Path("/proc/cpuinfo")).exists():
        model = next(
            (line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")),
            model,
        )
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    } | gpu


def tell(
    results: Iterable[Mapping[str, Any]], text: Callable[[Any], str], about: Mapping[str, Any], path: str | None
) -> list[Mapping[str, Any]]:
    """Print the text of each result as soon as it is there, and write all that are there into a JSON file, if one is
    named: a later one may fail.

    Args:
        about: what all results depend on, for the file.

    Returns:
        All results.

    Raises:
        SettingError: `json`: the file can't be written.
    """
    found = []
    for result in results:
        found.append(result)
        print(text(result), flush=True)
        if path:
            with fault_of("json", (OSError,)):
                write_json(path, {**about, "results": found})
    return found
