"""Seconds and memory of a row, measured one image at a time in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from evaluation.protocols.protocol import Amount
from evaluation.runs.folder import make_items
from evaluation.runs.generate import Request, load_engine
from ldm.cli.devices import find_device
from ldm.io.errors import SettingError
from ldm.io.files import atomic_write, parse_json, read_text
from ldm.io.schema import NotNegative, Schema, Text, parse
from ldm.profiling.timing import CLEAR, STATUS, machine, resident

WARM_UP = 2  # as the released code: two calls before the one that is timed
Seconds = Annotated[list[NotNegative], Field(min_length=1)]


class Timing(Schema):
    """What was measured, and on what.

    seconds, seconds_unet: of each image: in all, and of the UNet's sampling.
    memory:  bytes at the peak while images are made. On a GPU what PyTorch allocated; on a CPU what the process has in
             memory beyond what it had before the model was loaded; None = not known.
    machine: GPU or processor; threads: of the process.
    """

    seconds: Seconds
    seconds_unet: Seconds
    memory: Annotated[int, Field(ge=0)] | None
    precision: Text
    weights: Text
    machine: Text
    threads: Amount
    date: Text
    config: Text | None = None
    parallel: Amount | None = None
    torch: Text | None = None
    protocol: dict[str, Any] = {}
    method: dict[str, Any] = {}


def timed(request: Request, device: str, count: int, out: Path) -> Timing:
    """Time the first images of a request, one at a time, and keep what was measured in the file `out`.

    Args:
        device: name of a device.
        count: how many images.

    Raises SettingError: `timed`: the process was killed.
    """
    try:  # in a process of its own: what earlier rows left in memory must not count
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            measured = fresh.submit(time_images, request, device, count).result()
    except BrokenProcessPool:
        raise SettingError(
            "timed",
            f"the process that timed images for {out} was killed, as systems do that run out of memory; what is "
            f"there stays, and --timed 0 times none",
        ) from None
    with atomic_write(out) as temporary:
        temporary.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return measured


def time_images(request: Request, device: str, count: int) -> Timing:
    """Time images one by one, after some that are not timed."""
    place = find_device(device)
    prompts = request.prompts[: max(count, 1)]
    items = make_items([prompt.line() for prompt in prompts], request.protocol.seed, 1)
    before = resident("VmRSS") if STATUS.exists() else 0
    engine = load_engine(request, place, batch=1)
    for _ in range(WARM_UP):
        engine(items[:1])
    start_peak(place)
    costs = [engine([items[k % len(items)]])[1] for k in range(count)]
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    if gpu:
        memory = torch.cuda.max_memory_allocated(place)
    else:
        memory = resident("VmHWM") - before if STATUS.exists() else None
    settings = engine.settings()
    return Timing(
        seconds=[cost["seconds"] for cost in costs],
        seconds_unet=[cost["seconds_unet"] for cost in costs],
        memory=memory,
        parallel=engine.plan.parallel,
        precision=settings["precision"],
        protocol=request.protocol.asked(),
        method=settings,
        **request.model.sha256,
        machine=gpu or machine()["processor"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
    )


def start_peak(device: torch.device) -> None:
    """Peaks of memory are measured from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def read_timing(path: Path) -> Timing | None:
    """What `timed` kept there; None if there is no such file. Raises SettingError: `runs`: the file is damaged."""
    if not path.is_file():
        return None
    try:
        return parse(Timing, parse_json(read_text(path)))
    except (OSError, ValueError) as error:
        problem = f"{path}: not a timing: {error}; without the file it is measured again"
        raise SettingError("runs", problem) from error


def compare_timings(timings: Mapping[str, Timing]) -> None:
    """Check that rows, by name, were timed alike. Raises SettingError: `runs`: they were not."""
    names = list(timings)
    for name in names[1:]:
        for what in ("machine", "threads", "precision"):
            first, other = (getattr(timings[row], what) for row in (names[0], name))
            if first != other:
                raise SettingError(
                    "runs",
                    f"rows were timed with different {what} ({names[0]}: {first}, {name}: {other}); "
                    f"without their cost-*.json they are timed again",
                )


def cost_values(timing: Timing) -> dict[str, float]:
    """The columns of a timing: medians, and gigabytes."""
    found = {name: statistics.median(getattr(timing, name)) for name in ("seconds", "seconds_unet")}
    return found | ({} if timing.memory is None else {"memory": timing.memory / 1e9})
