"""What runs cost: MACs, counted from a model's config alone; seconds and memory, measured image by image."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from evaluation.protocols.protocol import Amount, Protocol
from evaluation.runs.generate import Request, make_items, plan_of, recipe_of
from evaluation.runs.models import ModelFiles, of_protocol, stages_of
from evaluation.table.spec import Row
from ldm.checkpoint import diffusion_params, load_config
from ldm.checkpoint.control import control_params, hint_params, read_control
from ldm.checkpoint.deepfloyd import stage_model
from ldm.cli.deepfloyd import UPSCALER, StageSettings, of_stage
from ldm.cli.setup import find_device, make_plan, make_recipe
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import PROJECT_ROOT, NotNegative, Schema, Text, parse, parse_json, read_text, write_file
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import Compute, Plan, check_blocks
from ldm.modules.diffusionmodules.controlnet import HINT_WIDTHS, ControlNet
from ldm.profiling.cost import CONVENTIONS, Macs, context_tokens, control_macs, unet_macs
from ldm.profiling.timing import CLEAR, STATUS, machine, resident
from ldm.sampling.engine import Sizes, num_nodes
from ldm.sampling.video import Motion

SD_V1 = PROJECT_ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
# Tables 1 and 5, "GFLOPs/image" of Stable Diffusion v1.5, by steps and number of key timesteps.
PUBLISHED = {(50, 50): 37050, (50, 9): 27350, (20, 20): 14821, (20, 7): 11743, (50, 25): 31011, (50, 5): 26370}
PUBLISHED_SIZE, PUBLISHED_BATCH = [64, 64], 2
AGREES = 0.001
NO_CONFIG = (ValueError, OSError, TypeError, KeyError)


def read_unet(path: str | Path) -> tuple[dict[str, Any], int, int | None]:
    """The UNet's config, the side of the latents that the model was trained with, and the tokens of its context.
    `path`: of a config, or the folder of a stage of DeepFloyd-IF, whose weights need not be there."""
    params = stage_model(Path(path))["params"] if Path(path).is_dir() else diffusion_params(path)
    return params["unet_config"], params.get("image_size", 0), context_tokens(params)


def gflops(protocol: Protocol, row: Row, files: ModelFiles) -> tuple[float | None, str]:
    """GMACs of the UNet for what a row makes (an image, a frame, or a whole video), as the paper counts them; and what
    is missing of them, in words. None for a plan that decides during the run. The weights need not be there, see
    `plan_of`. Raises SettingError: a sampler, a number of steps, a plan or a config that can't be used."""
    method = row.method(protocol)
    if protocol.cascade:
        return cascade_gflops(stages_of(protocol, method, files), protocol.size, files.config)
    plan = plan_of(recipe_of(protocol, method), method, files.ckpt, video=protocol.video is True)
    with fault_of("config", NO_CONFIG):
        control = protocol.added().get("control_model")
        unit = unit_of(files.config, protocol.size, 1 if protocol.guidance == 1 else 2, method.tome, control)
    with fault_of("plan"):
        check_blocks(plan, len(unit.outer) - 1)
    if not isinstance(plan, Plan):
        return None, f"{row.plan} decides during a run: its GFLOPs are not known before"
    if protocol.video == "whole":
        return protocol.repeats * unit.run(plan) / 1e9, ""
    first = method.steps - 1 - Motion.of(method.steps).t0 if protocol.video else 0  # of the first frame, alone
    return (unit.run(plan) + first * unit.whole / protocol.repeats) / 1e9, ""


def cascade_gflops(stages: StageSettings, size: int, first: Path) -> tuple[float, str]:
    """GMACs of the stages of DeepFloyd-IF for an image of `size` pixels, and what is missing of them: stage 2, where
    its folder is not here. `first`: a config of stage 1, for where that is not here. Raises SettingError: see `gflops`.
    """
    described = {1: stages.stage1 if Path(stages.stage1).is_dir() else first, 2: stages.stage2, 3: UPSCALER[0]}
    here = [number for number in stages.stages if number != 2 or Path(stages.stage2).is_dir()]
    total = 0.0
    for number in here:
        with of_protocol(), of_stage(number):
            sampling = stages.sampling(number)
            recipe = make_recipe(sampling, (1, 1))
            plan = make_plan(sampling, num_nodes(recipe), RunFacts({"sampler": recipe.solver_name}))
            with fault_of("config", NO_CONFIG):
                unet, side, tokens = read_unet(described[number])
                if number == 3:  # as large as the images of stage 2
                    side = size // Sizes.of(load_config(described[number]).model).factor
                unit = unet_macs(unet, (side, side), 1 if sampling.scale == 1 else 2, tokens, convention="paper")
        total += unit.run(plan) / 1e9
    return total, "" if here == [*stages.stages] else "GFLOPs without stage 2, which is not here"


@lru_cache
def unit_of(config: Path, size: int, batch: int, tome: float, control: tuple[Path, ...] | None) -> Macs:
    """MACs of one prediction for an image of `size` pixels, `batch` latents at a time, in the paper's count; with the
    control network of a file, or where it is not there with a published one's."""
    (unet, _, tokens), side = read_unet(config), size // Sizes.of(load_config(config).model).factor
    unit = unet_macs(unet, (side, side), batch, tokens, tome, "paper")
    if not control:
        return unit
    hint = hint_params(read_control(control[0])) if control[0].exists() else (3, HINT_WIDTHS)
    with torch.device("meta"):
        network = ControlNet(**control_params(unet["params"], *hint))
    return unit.with_control(control_macs(network, (side, side), batch, tokens, "paper"))


# The report of evaluation/cost.py


def report(
    config: str | Path, plans: Sequence[str], steps: Sequence[int], size: Sequence[int] | None, batch: int, tokens: int
) -> Iterator[str]:
    """Lines: what each kind of node costs, and what whole runs cost.

    Args:
        plans: as `load_plan` takes them; steps: network evaluations of a run; each plan is run with each number.
        size: height and width of the latents; None = the config's.
        batch: latents per evaluation.
        tokens: of the context; None = what the config's encoder reads.

    Raises SettingError: `plan`, `config` or `size` can't be used.
    """
    with fault_of("plan"):
        runs = {f"{spec}, {number} steps": load_plan(spec, number) for number in steps for spec in plans}
    for label, plan in runs.items():
        if not isinstance(plan, Plan):
            raise SettingError("plan", f"{label.split(',')[0]} decides during a run; its cost is not known before")
    with fault_of("config"):
        unet, side, usual = read_unet(config)
    size, tokens = size or [side, side], usual and (tokens or usual)
    with fault_of("size", NO_CONFIG):
        units = counts(unet, size, batch, tokens)
    yield f"{config}: UNet on {batch} latents of {size[0]} x {size[1]}" + (f", {tokens} tokens" if tokens else "")
    yield f"\n{'one evaluation, GMAC':<34}" + "".join(f"{name:>12}" for name in units)
    for label, macs in node_costs(units, runs.values()).items():
        yield f"{label:<34}" + "".join(f"{value / 1e9:>12.2f}" for value in macs)
    names = "".join(f"{name:>12}{'share':>8}" for name in units)
    yield f"\n{'run, GMAC':<26}{'keys':>5}{names}{'critical path':>15}{'in the paper':>14}"
    for label, plan in runs.items():
        whole = {name: (unit.run(plan), unit.plain(plan.num_nodes)) for name, unit in units.items()}
        cells = "".join(f"{run / 1e9:>12.1f}{run / plain:>8.1%}" for run, plain in whole.values())
        path = units["exact"].critical_path(plan)
        paper = published(unet, size, batch, plan)
        off = paper and whole["paper"][0] / 1e9 / paper - 1
        differs = f"{paper:>14}  {off:+.2%}" + ("" if abs(off) < AGREES else " DIFFERS") if paper else ""
        yield f"{label:<26}{len(plan.keys):>5}{cells}{path / 1e9:>15.1f}{differs}"
    yield (
        "\nshare: of a run with every node in full. Critical path: exact count. Every decoder counts in full, also the "
        "part that\nis computed once for all nodes with the same features."
    )


def counts(unet: Mapping[str, Any], size: Sequence[int], batch: int, tokens: int | None) -> dict[str, Macs]:
    """MACs of one evaluation, by convention."""
    return {name: unet_macs(unet, size, batch, tokens, convention=name) for name in CONVENTIONS}


def published(unet: Mapping[str, Any], size: Sequence[int], batch: int, plan: Plan) -> int | None:
    """The paper's GMACs for this run, if it has such a row."""
    same = (unet, list(size), batch) == (read_unet(SD_V1)[0], PUBLISHED_SIZE, PUBLISHED_BATCH)
    known = same and not plan.refresh and plan.levels <= {Compute.DECODER}
    return PUBLISHED.get((plan.num_nodes, len(plan.keys))) if known else None


def node_costs(units: Mapping[str, Macs], plans: Iterable[Plan]) -> dict[str, list[int]]:
    """MACs of one evaluation at each kind of node that the plans have, and of what is computed once, by convention."""
    found = {}
    for plan in plans:
        for kind in dict.fromkeys(plan.computes()):
            depth = plan.branch or plan.refresh if kind in (Compute.SHALLOW, Compute.DECODER) else 0
            label = f"{kind.value} node" + (f", {depth} outer blocks" if depth else "")
            found.setdefault(label, [unit.node(kind, plan) for unit in units.values()])
    if any(unit.once for unit in units.values()):
        found["keys and values of the text, once"] = [unit.once for unit in units.values()]
    return found | {"of a decoder, once a key timestep": [unit.shared for unit in units.values()]}


# Seconds and memory of a row

WARM_UP = 2  # as the released code: two calls before the one that is timed
Seconds = Annotated[list[NotNegative], Field(min_length=1)]


class Timing(Schema):
    """What was measured, and on what.

    memory: bytes at the peak while images are made. On a GPU what PyTorch allocated; on a CPU what the process has in
            memory beyond what it had before the model was loaded; None = not known.
    """

    seconds: Seconds  # of each image
    seconds_unet: Seconds  # of the UNet's sampling alone
    memory: Annotated[int, Field(ge=0)] | None
    precision: Text
    weights: Text
    machine: Text  # GPU or processor
    threads: Amount
    date: Text
    config: Text | None = None
    parallel: Amount | None = None
    torch: Text | None = None
    protocol: dict[str, Any] = {}
    method: dict[str, Any] = {}


def timed(request: Request, device: str, count: int, out: Path) -> Timing:
    """Time the first images of a request, one at a time, and keep what was measured in the file `out`. `device`: name
    of a device. `count`: how many images. Raises SettingError: `timed`: the process was killed."""
    try:  # in a process of its own: what earlier rows left in memory must not count
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            measured = fresh.submit(time_images, request, device, count).result()
    except BrokenProcessPool:
        killed = f"the process that timed images for {out} was killed, as systems do that run out of memory"
        raise SettingError("timed", f"{killed}; what is there stays, and {{timed}} 0 times none", "timed") from None
    write_file(out, measured.model_dump_json(indent=1) + "\n")
    return measured


def time_images(request: Request, device: str, count: int) -> Timing:
    """Time images one by one, or videos, after some that are not timed."""
    place = find_device(device)
    prompts = request.prompts[: max(count, 1)]
    frames = request.protocol.repeats if request.protocol.video else 1
    items = make_items([prompt.line() for prompt in prompts], request.protocol.seed, frames)
    batches = [items[k : k + frames] for k in range(0, len(items), frames)]
    cuda, linux = place.type == "cuda", STATUS.exists()
    before = resident("VmRSS") if linux else 0
    engine = request.way.load(request, place, batch=frames)
    for _ in range(WARM_UP):
        engine(batches[0])
    if cuda:  # the peak of memory is measured from here on
        torch.cuda.reset_peak_memory_stats(place)
    elif CLEAR.exists():
        CLEAR.write_text("5")
    costs = [engine(batches[k % len(batches)])[1] for k in range(count)]
    memory = max(0, resident("VmHWM") - before) if linux else None
    settings = engine.settings()
    return Timing(
        seconds=[cost["seconds"] for cost in costs],
        seconds_unet=[cost["seconds_unet"] for cost in costs],
        memory=torch.cuda.max_memory_allocated(place) if cuda else memory,
        parallel=engine.parallel,
        precision=settings["precision"],
        protocol=request.protocol.asked(),
        method=settings,
        **request.model.sha256,
        machine=torch.cuda.get_device_name(place) if cuda else machine()["processor"],
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
    )


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
                differ = f"rows were timed with different {what} ({names[0]}: {first}, {name}: {other})"
                raise SettingError("runs", f"{differ}; without their cost-*.json they are timed again")


def cost_values(timing: Timing) -> dict[str, float]:
    """The columns of a timing: medians, and gigabytes."""
    found = {name: statistics.median(getattr(timing, name)) for name in ("seconds", "seconds_unet")}
    return found | ({} if timing.memory is None else {"memory": timing.memory / 1e9})
