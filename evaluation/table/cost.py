"""What a row of a table costs: counted from the config alone, and timed one picture at a time."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.cost import read_unet
from evaluation.generate import default_model, make_engine, parse, select_prompts
from evaluation.protocols.protocol import Protocol
from evaluation.table.spec import Row
from ldm.cli.devices import ALONE
from ldm.cli.parser import settings_from
from ldm.cli.setup import ModelSettings, make_setup
from ldm.io.errors import BadInput, blame
from ldm.io.files import atomic_write, parse_json, read_text
from ldm.io.kinds import MAPPING, TEXT, Kind, check, known, number, optional, whole

if TYPE_CHECKING:
    from ldm.models.diffusion.propagation.plan import AnyPlan
    from ldm.profiling.cost import Macs

WARM_UP = 2  # as the released code: two calls before the one that is timed
SECONDS = Kind(
    "a list of numbers >= 0, one or more",
    lambda value: isinstance(value, list) and bool(value) and all(number("", 0).holds(entry) for entry in value),
)
NEEDED = {
    "seconds": SECONDS,
    "seconds_unet": SECONDS,
    "memory": optional(number("a number of bytes", 0)),
    **dict.fromkeys(("precision", "weights", "machine", "date"), TEXT),
    "threads": whole(1),
}
ALSO = {"config": TEXT, "parallel": whole(1), "torch": TEXT, "protocol": MAPPING, "method": MAPPING}


# Counted


@lru_cache
def unit_of(config: Path, size: int, guided: bool, tome: float) -> Macs:
    """MACs of one prediction of a picture, in the paper's count.

    Args:
        size: of the picture, in pixels. guided: the network sees every latent twice. tome: share of tokens merged.
    """
    from ldm.checkpoint import load_config
    from ldm.profiling.cost import unet_macs
    from ldm.sampling.engine import Sizes

    model = load_config(config).model
    (unet, _, tokens), side = read_unet(config), size // Sizes.of(model).factor
    return unet_macs(unet, (side, side), 2 if guided else 1, tokens, tome, "paper")


def plan_of(row: Row, protocol: Protocol, ckpt: Path) -> AnyPlan:
    """The plan of the row's run.

    Args:
        ckpt: the model's weights, which need not be there: calibrations for `auto:K` lie beside them.

    Raises:
        ValueError: a plan, sampler, number of steps or eta that can't be used.
    """
    from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of, load_plan
    from ldm.sampling.engine import Recipe, num_nodes

    usual = protocol.sampling
    recipe = Recipe(
        protocol.size, protocol.size, row.sampler or usual.sampler, row.steps or usual.steps, row.eta or 0.0
    )
    run = RunFacts({"sampler": recipe.sampler}, calibrations_of(ckpt))
    return load_plan(row.plan, num_nodes(recipe), propagate=row.propagate, run=run)


def gflops(row: Row, protocol: Protocol, config: Path, ckpt: Path) -> float | None:
    """GMACs of the UNet for one picture, as the paper counts them; None for a plan that decides on the way.

    Raises:
        ValueError: see `plan_of`; or a config that can't be used, or not with this plan.
    """
    from ldm.models.diffusion.propagation.plan import Plan, check_blocks

    plan = plan_of(row, protocol, ckpt)
    unit = unit_of(config, protocol.size, protocol.guidance != 1, row.tome or 0.0)
    check_blocks(plan, len(unit.outer) - 1)
    return unit.run(plan) / 1e9 if isinstance(plan, Plan) else None


# Timed


def timed(argv: Sequence[str], pictures: int, out: Path) -> dict[str, Any]:
    """Seconds of each picture and peak memory, measured in a process of its own and kept in `out`.

    Args:
        argv: of evaluation/generate.py.
        pictures: how many are timed, one at a time.
    """
    # What earlier rows left in memory must not count.
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            measured = fresh.submit(time_pictures, [*argv], pictures).result()
    except BrokenProcessPool:
        raise BadInput(
            f"--timed: the process that timed pictures for {out} was killed, as systems do that run out of "
            f"memory; what is there stays, and --timed 0 times none"
        ) from None
    with blame("--runs", (OSError,)), atomic_write(out) as temporary:
        temporary.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured


def read_timing(path: Path) -> dict[str, Any] | None:
    """What `timed` kept there, if it did."""
    if not path.is_file():
        return None
    try:
        content = parse_json(read_text(path))
        known("it", content, {*NEEDED}, {*ALSO})
        check("", content, NEEDED | ALSO)
        return content
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"--runs: {path}: not a timing: {error}; without the file it is measured again") from error


def compare_timings(timings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BadInput if rows, by name, were not timed alike."""
    names = list(timings)
    for name in names[1:]:
        for what in ("machine", "threads", "precision"):
            first, other = timings[names[0]][what], timings[name][what]
            if first != other:
                raise BadInput(
                    f"--runs: rows were timed with different {what} ({names[0]}: {first}, {name}: {other}); "
                    f"without their cost-*.json they are timed again"
                )


def time_pictures(argv: Sequence[str], pictures: int) -> dict[str, Any]:
    """Time pictures one by one, after some that are not timed.

    memory: bytes at the peak while pictures are made. On a GPU what PyTorch allocated; on a CPU what the process has
    in memory beyond what it had before the model came; None where that is not known.
    """
    import torch

    from evaluation.runs.folder import make_items
    from ldm.checkpoint import fingerprint
    from ldm.profiling.timing import STATUS, machine, resident

    args, protocol = parse(argv)
    items = make_items([prompt.line() for prompt in select_prompts(args, protocol)], protocol.seed, 1)
    setup = make_setup(settings_from(args, ModelSettings), default_model(protocol), ALONE)
    before = resident("VmRSS") if STATUS.exists() else 0
    engine = make_engine(args, protocol, setup, batch=1)
    for _ in range(WARM_UP):
        engine(items[:1])
    start_peak(setup.device)
    spent = [engine([items[k % len(items)]])[1] for k in range(pictures)]
    gpu = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else None
    memory = (
        torch.cuda.max_memory_allocated(setup.device)
        if gpu
        else (resident("VmHWM") - before if STATUS.exists() else None)
    )
    return {
        "seconds": [s["seconds"] for s in spent],
        "seconds_unet": [s["seconds_unet"] for s in spent],
        "memory": memory,
        "parallel": engine.plan.parallel,
        "precision": engine.settings()["precision"],
        "protocol": protocol.asked(),
        "method": engine.settings(),
        "weights": fingerprint(setup.ckpt),
        "config": fingerprint(setup.config_path),
        "machine": gpu or machine()["processor"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def start_peak(device: Any) -> None:
    """Peaks of memory are of what comes now."""
    import torch

    from ldm.profiling.timing import CLEAR

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def costs(measured: dict[str, Any]) -> dict[str, float]:
    """The columns of a timing: medians, and gigabytes."""
    found = {name: statistics.median(measured[name]) for name in ("seconds", "seconds_unet")}
    return found | ({} if measured["memory"] is None else {"memory": measured["memory"] / 1e9})
