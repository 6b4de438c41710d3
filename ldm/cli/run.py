"""The run of a sampling script: the model is loaded, the pictures are made and reported."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.processes import Processes
from ldm.cli.report import Result, opening, report
from ldm.cli.settings import best_plan, count_nodes, make_plan, make_recipe, run_facts, uses_autocast, with_batches
from ldm.cli.setup import Setup, without_weights
from ldm.io.errors import BadInput, blame

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.propagation.load import RunFacts
    from ldm.models.diffusion.propagation.plan import AnyPlan
    from ldm.sampling.engine import Engine, Recipe, Task
    from ldm.sampling.generate import Item, Sample

BATCH_PIXELS = 2**26  # 256 images of 512 x 512 pixels at a time
SHEET_PIXELS = 80_000_000  # Pillow doubts larger files
CELL = 192  # pixels to which a comparison enlarges small images
GO_ON = "stopped; the same command goes on from here"


def make_pictures(
    args: argparse.Namespace,
    setup: Setup,
    items: Sequence[Item],
    task: Task,
    size: tuple[int, int],
    batch: int,
    keep: bool = False,
) -> list[Result]:
    """Load the model, make the pictures of one method or, to compare, of several; report.

    Args:
        size: height and width of the pictures.
        batch: most pictures at a time.
        keep: the caller needs the pictures of the results.
    """
    import torch

    from ldm.checkpoint import CheckpointError

    check_amount(args, len(items), size, batch)
    if not (args.skip_grid or args.compare or sheet_fits(len(items), size)):
        args = argparse.Namespace(**vars(args) | {"skip_grid": True})
        print(f"no grid: {len(items)} images would be more than {SHEET_PIXELS} pixels, the most of one file")
    recipe = make_recipe(args, size, setup)
    check_guidance(recipe, task)
    nodes = count_nodes(recipe, setup, task.start.strength)
    if args.list_plans:
        if setup.processes.rank == 0:
            list_plans(setup, recipe, task, nodes)
        return []
    with blame("--ckpt", (CheckpointError,)):
        settings = weights_of(setup, args.weights)
    facts = run_facts(setup, recipe.sampler)
    plan = make_plan(args, nodes, facts)
    methods = compared(args, recipe, plan, facts, setup.processes) if args.compare else {"pictures": (recipe, plan)}
    engines = load_engines(args, setup, methods, task)
    if setup.processes.rank == 0 and (cut := what_is_cut(items, task, next(iter(engines.values())).model)):
        print(cut)

    with setup.processes.joined(setup.device):
        for engine in engines.values():
            if not engine.plan.plain and engine.plan.parallel > 1:
                engine.plan = with_batches(engine, args.parallel, batch, setup)
        suspect = "--precision" if uses_autocast(args, setup.device) else "--ckpt"
        with blame("--outdir", (OSError,)), blame(suspect, (ValueError,)), blame("--device", (torch.OutOfMemoryError,)):
            if setup.processes.rank > 0:
                follow(engines, setup.processes)
                return []
            return lead(args, setup, items, engines, settings, batch, keep)


def sheet_fits(count: int, size: tuple[int, int]) -> bool:
    """Whether one file shows so many images of this height and width."""
    return count * math.prod(size) <= SHEET_PIXELS


def check_amount(args: argparse.Namespace, count: int, size: tuple[int, int], batch: int) -> None:
    """Raise BadInput if this is more at a time than any machine computes, or one file shows."""
    height, width = size
    if min(batch, count) * height * width > BATCH_PIXELS:
        flag = "--batch_size" if hasattr(args, "batch_size") else "--n_samples"
        raise BadInput(
            f"{flag}: {min(batch, count)} images of {width} x {height} pixels at a time are more than "
            f"{BATCH_PIXELS} pixels, the most that are computed together"
        )
    if args.compare and not sheet_fits(3 * count, (max(height, CELL), max(width, CELL))):
        raise BadInput(
            f"--compare: {count} images of {width} x {height} pixels, beside each other, are more than "
            f"{SHEET_PIXELS} pixels, the most of one file"
        )


def what_is_cut(items: Sequence[Item], task: Task, model: LatentDiffusion) -> str | None:
    """How many texts, the negative prompt among them, the model does not read to their end; None if it reads all."""
    from ldm.sampling.conditions import prompts_cut

    texts = [*(item.inputs for item in items), task.condition.settings()]
    prompts = {of[name] for of in texts for name in ("prompt", "negative_prompt") if name in of}
    cut = prompts_cut(model, [*prompts])
    return (
        (f"{cut} of {len(prompts)} prompts longer than the text encoder reads: what is past its last token is left out")
        if cut
        else None
    )


def check_guidance(recipe: Recipe, task: Task) -> None:
    """Raise BadInput if what guidance leads away from is given, and there is none."""
    if recipe.scale == 1.0 and "negative_prompt" in task.condition.settings():
        raise BadInput("--negative_prompt: needs guidance, and the scale is 1; give --scale another value")


def weights_of(setup: Setup, which: str) -> dict[str, str]:
    """What a picture remembers of its model's files."""
    from ldm.checkpoint import fingerprint

    return {
        "ckpt": f"{setup.ckpt.parent.name}/{setup.ckpt.name}",
        "weights": fingerprint(setup.ckpt)[:16],
        "config": fingerprint(setup.config_path)[:16],
        "averaged": which,
    }


def compared(
    args: argparse.Namespace, recipe: Recipe, plan: AnyPlan, facts: RunFacts, processes: Processes
) -> dict[str, tuple[Recipe, AnyPlan]]:
    """The methods of a comparison by name: plain, the one asked for, and the best calibrated plan at its cost."""
    from ldm.models.diffusion.propagation.plan import Plan

    plain = replace(recipe, noise_weight=0.0, guidance_interval=None, guidance_reuse=False, tome=0.0)
    methods = {
        "plain": (plain, Plan(plan.num_nodes, tuple(range(plan.num_nodes)))),
        Path(args.plan).name: (recipe, plan),
    }
    name, best = best_plan(plan, plan.num_nodes, facts)
    if best is not None:
        return {**methods, name: (replace(recipe, noise_weight=0.0), best)}
    if processes.rank == 0:
        print(f"no third column: {name}")
    return methods


def load_engines(
    args: argparse.Namespace, setup: Setup, methods: Mapping[str, tuple[Recipe, AnyPlan]], task: Task
) -> dict[str, Engine]:
    """The methods of the run by name, on one model."""
    from ldm.sampling.engine import Engine

    model = setup.load(args.weights)
    for recipe, plan in methods.values():
        check_network(model, recipe, plan)
    build = partial(
        Engine,
        model,
        setup.sizes,
        task=task,
        autocast=uses_autocast(args, setup.device),
        spread=setup.processes.several,
    )
    with blame("--config"):
        engines = {label: build(*method) for label, method in methods.items()}
    engines[next(iter(engines))].pack()  # they share the model
    return engines


def check_network(model: LatentDiffusion, recipe: Recipe, plan: AnyPlan) -> None:
    """Raise BadInput if what is asked for is more than the model's network has."""
    from ldm.models.diffusion.propagation.plan import check_blocks

    unet = model.model.diffusion_model
    with blame("--tome"):
        unet.check_merging(recipe.tome)
    with blame("--plan"):
        check_blocks(plan, len(unet.output_blocks))


def follow(engines: Mapping[str, Engine], processes: Processes) -> None:
    """Compute with the leading process what it says."""
    for label, chunk, warm_up in processes.orders():
        if warm_up:
            engines[label].warm_up(chunk, {})
        else:
            engines[label].latents(chunk)


def lead(
    args: argparse.Namespace,
    setup: Setup,
    items: Sequence[Item],
    engines: Mapping[str, Engine],
    settings: dict[str, Any],
    batch: int,
    keep: bool,
) -> list[Result]:
    """Make, save and report the pictures of every engine; the other processes follow."""
    began = time.perf_counter()
    print(opening(args, setup, [*engines.values()][1 if args.compare else 0]), flush=True)
    keep = keep or args.compare or not args.skip_grid
    results = {label: Result(label, settings | engine.settings()) for label, engine in engines.items()}
    make_all(results, engines, items, args, batch, keep, setup.processes)
    setup.processes.tell(None)
    report([*results.values()], items, settings | {label: e.settings() for label, e in engines.items()}, args, batch)
    fresh, total = (sum(getattr(r, name) for r in results.values()) for name in ("fresh", "count"))
    if replaced := sum(r.replaced for r in results.values()):
        print(f"{replaced} of the pictures that were there had been damaged or changed, or had no proof; made again")
    where = "not saved" if args.skip_save else f"in {Path(args.outdir) / 'samples'}"
    print(
        f"{total} picture{'s' * (total != 1)} ({fresh} made, {total - fresh} found) {where}; "
        f"spent {time.perf_counter() - began:.1f} s, {sum(r.spent_macs for r in results.values()) / 1e9:.1f} GMAC"
    )
    return [*results.values()]


def make_all(
    results: Mapping[str, Result],
    engines: Mapping[str, Engine],
    items: Sequence[Item],
    args: argparse.Namespace,
    batch: int,
    keep: bool,
    processes: Processes,
) -> None:
    """All pictures of all methods, with progress over images and steps; other processes are told to help.

    The methods take turns, a batch each, so that what else the machine does meets all of them. To compare them, all
    are warmed up before the first.
    """
    from tqdm import tqdm

    nodes = next(iter(engines.values())).plan.num_nodes
    with (
        tqdm(total=len(items) * len(engines), unit="image", disable=None) as images,
        tqdm(total=nodes, desc="steps", unit="step", leave=False, disable=None) as steps,
    ):

        def on_node() -> None:
            if steps.n >= nodes:
                steps.reset()
            steps.update()

        def first_make() -> None:
            if args.compare and any(result.first_calls is None for result in results.values()):
                warm_up(results, engines, items, batch, processes)

        streams = {}
        for label, engine in engines.items():
            engine.on_node = on_node
            streams[label] = stream(results[label], engine, items, args, batch, processes, first_make)
        for _ in range(0, len(items), batch):
            for label, pictures in streams.items():
                for made in islice(pictures, batch):
                    results[label].add(made, keep)
                    images.update()


def stream(
    result: Result,
    engine: Engine,
    items: Sequence[Item],
    args: argparse.Namespace,
    batch: int,
    processes: Processes,
    before: Callable[[], None],
) -> Iterator[Sample]:
    """The pictures of one method, made as they are asked for; before() is called ahead of each batch."""
    from ldm.sampling.generate import generate

    def make(chunk: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
        before()
        processes.tell((result.label, chunk, False))
        return engine(chunk)

    return generate(items, make, result.settings, None if args.skip_save else args.outdir, batch, again=args.again)


def warm_up(
    results: Mapping[str, Result],
    engines: Mapping[str, Engine],
    items: Sequence[Item],
    batch: int,
    processes: Processes,
) -> None:
    """Call every engine for every size of its batches, and note what first calls cost."""
    first_calls: dict[Hashable, float] = {}
    chunks = {len(chunk): chunk for chunk in (items[len(items) // batch * batch :], items[:batch]) if chunk}
    for label, engine in engines.items():
        for chunk in chunks.values():
            processes.tell((label, chunk, True))
            # Of the last chunk, which is the first of the run.
            results[label].first_calls = engine.warm_up(chunk, first_calls) / len(chunk)


def list_plans(setup: Setup, recipe: Recipe, task: Task, nodes: int) -> None:
    """Print what plans would cost this model, which is built without its weights."""
    from ldm.models.diffusion.propagation.plan import Plan
    from ldm.profiling.plan_table import plan_table
    from ldm.sampling.engine import Engine

    model = without_weights(setup.config.model)
    with blame("--config"):
        engine = Engine(model, setup.sizes, recipe, Plan(nodes, (0,)), task)
    with blame("--tome"):
        unit = engine.unit
    print("\n".join(plan_table(unit, nodes, images=1 if recipe.scale == 1.0 else 2)))
