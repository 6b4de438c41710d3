"""Seconds, rates and memory of calls, and where a call's time goes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of this process, on Linux

MATRIX = 2048
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


def alternate(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
    """Time every call in turn, `repeats` times round, so that drifts meet all of them; warm them up before."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            taken[name].append(seconds_of(call))
    return {name: Seconds(tuple(values)) for name, values in taken.items()}


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def matrix_product() -> tuple[Callable[[], Any], int]:
    """A float32 matrix product that fills the machine for a moment, and its floating-point operations."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    times = 2

    def call() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return call, times * 2 * MATRIX**3


def shares(call: Callable[[], Any]) -> dict[str, float]:
    """How the time of call() divides among kinds of operators; they sum to 1."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    spent: dict[str, float] = {kind: 0.0 for kind in (*dict.fromkeys(KINDS.values()), "other")}
    for event in profile.key_averages():
        kind = next((kind for part, kind in KINDS.items() if part in event.key), "other")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that tensors made during call() held at one time.

    What was there before does not count, nor what libraries allocate past PyTorch.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def resident(name: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at their peak (VmHWM); Linux only."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, Any]:
    """What timings depend on."""
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
    }
