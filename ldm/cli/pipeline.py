"""The run of a sampling script: the model is loaded, the images are made and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ldm.checkpoint import CheckpointError, fingerprint
from ldm.cli.parser import check_outdir
from ldm.cli.refine import Refiner
from ldm.cli.report import MethodRun, OutputSettings, opening, report
from ldm.cli.settings import (
    SamplingSettings,
    best_plan,
    check_memory,
    count_nodes,
    make_plan,
    make_recipe,
    reuse_setting,
    run_facts,
    with_batches,
    with_control,
)
from ldm.cli.setup import ALONE, Processes, Setup, without_weights
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import RunFacts
from ldm.models.diffusion.propagation.plan import AnyPlan, Plan, check_blocks
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.profiling.plan_table import plan_table
from ldm.sampling.engine import Engine, Recipe, Task
from ldm.sampling.generate import Item, Sample, generate
from ldm.sampling.task import unknown_words

BATCH_PIXELS = 2**26  # 256 images of 512 x 512 pixels at a time
SHEET_PIXELS = 80_000_000  # Pillow doubts larger files
CELL = 192  # pixels to which a comparison enlarges small images
SINGLE = "pictures"  # the name of a single method; names of grids depend on it

Methods = Mapping[str, tuple[Recipe, AnyPlan]]


def make_images(
    setup: Setup,
    items: Sequence[Item],
    task: Task,
    size: tuple[int, int],
    sampling: SamplingSettings,
    output: OutputSettings,
    batch: int,
    keep: bool = False,
    refiner: Refiner | None = None,
) -> list[MethodRun]:
    """Load the model, make the images of one method or, to compare, of several; report.

    Args:
        size: height and width of the images.
        batch: most images at a time.
        keep: the caller needs the images of the results.
        refiner: runs the last steps.

    Raises:
        SettingError: a setting can't be used.
    """
    check_outdir(Path(output.outdir))
    check_amount(len(items), size, batch, output.compare)
    output = without_large_grid(output, len(items), size)
    recipe = make_recipe(sampling, size, setup.config)
    check_guidance(recipe, task, setup.processes)
    nodes = count_nodes(recipe, setup, task.start.strength)
    if output.list_plans:
        if setup.processes.leads:
            list_plans(setup, recipe, task, nodes)
        return []
    with fault_of("ckpt", (CheckpointError,)):
        settings = weights_of(setup) | ({} if refiner is None else {"refiner": weights_of(refiner.setup)})
    facts = run_facts(setup, recipe.solver_name, recipe.facts(task.start.strength))
    methods = choose_methods(setup, sampling, recipe, nodes, facts, output.compare, task.network.anew)
    if refiner is not None:
        refiner.check(plan for _, plan in methods.values())
    engines = load_engines(setup, methods, task, output.tile)
    if refiner is not None:
        engines = refiner.finishing(engines)
    check_memory([*engines.values()][-1], min(batch, len(items)), setup.device)
    if setup.processes.leads and (cut := truncated_prompts(items, task, next(iter(engines.values())).model)):
        print(cut)

    with setup.processes.joined(setup.device):
        fitted = partial(
            with_batches, parallel=sampling.parallel, batch=batch, device=setup.device, processes=setup.processes
        )
        engines = {label: fitted(engine) for label, engine in engines.items()}
        if any(engine.plan.measures for engine in engines.values()):
            batch = 1  # an image's record says its own error
        run = ImageRun(setup, engines, items, output, batch, keep or output.compare or output.grid)
        with (
            fault_of("outdir", (OSError,)),
            fault_of(setup.suspect, (ValueError,)),
            fault_of("device", (torch.OutOfMemoryError,)),
        ):
            return run.lead(settings, sampling.plan) if setup.processes.leads else run.follow()


# What is checked before the model is loaded


def sheet_fits(count: int, size: tuple[int, int]) -> bool:
    """Whether one file shows so many images of this height and width."""
    return count * math.prod(size) <= SHEET_PIXELS


def check_amount(count: int, size: tuple[int, int], batch: int, compare: bool = False) -> None:
    """Raise SettingError if this is more at a time than any machine computes, or one file shows."""
    height, width = size
    if min(batch, count) * height * width > BATCH_PIXELS:
        raise SettingError(
            "batch_size",
            f"{min(batch, count)} images of {width} x {height} pixels at a time are more than {BATCH_PIXELS} pixels, "
            f"the most that are computed together",
        )
    if compare and not sheet_fits(3 * count, (max(height, CELL), max(width, CELL))):
        raise SettingError(
            "compare",
            f"{count} images of {width} x {height} pixels, side by side, are more than {SHEET_PIXELS} pixels, the "
            f"most of one file",
        )


def without_large_grid(output: OutputSettings, count: int, size: tuple[int, int]) -> OutputSettings:
    """The settings without a grid if one file can't show so many images; that is printed."""
    if not output.grid or output.compare or sheet_fits(count, size):
        return output
    print(f"no grid: {count} images would be more than {SHEET_PIXELS} pixels, the most of one file")
    return replace(output, grid=False)


def check_guidance(recipe: Recipe, task: Task, processes: Processes = ALONE) -> None:
    """Raise SettingError for settings of guidance without guidance, or that several processes can't follow."""
    reuse = reuse_setting(recipe.guidance_reuse)
    guiding = {
        "negative_prompt": "negative_prompt" in task.condition.settings(),
        "guidance_interval": recipe.guidance_interval,
        reuse: recipe.guidance_reuse,
    }
    for name, given in guiding.items():
        if given and recipe.scale == 1.0:
            raise SettingError(name, "needs guidance, and the scale is 1; expected another scale")
    if processes.several and recipe.guidance_reuse:
        raise SettingError(
            reuse, "every later step needs the guidance of the key timestep, so it does not go with several processes"
        )


def check_together(recipe: Recipe, plan: AnyPlan, task: Task, processes: Processes) -> None:
    """Raise SettingError for what does not go with images that take attention from each other."""
    if task.condition.together == 1:
        return
    if plan.per_image:
        raise SettingError("plan", "what runs must not depend on the image, since the edits are made with their source")
    if recipe.tome:
        raise SettingError("tome", "merged tokens can't take attention from another image; expected 0")
    if processes.several:
        raise SettingError("device", "edits and their source are made by one process; run it without torchrun")


def check_network(model: LatentDiffusion, recipe: Recipe, plan: AnyPlan) -> None:
    """Raise SettingError if what is asked for is more than the model's network has."""
    unet = model.model.diffusion_model
    if SOLVERS[recipe.sampler].takes_variance and not model.predicts_variance:
        raise SettingError(
            "sampler", f"{recipe.sampler} needs a network that predicts a variance, which this model's does not"
        )
    with fault_of("tome"):
        unet.check_merging(recipe.tome)
    with fault_of("plan"):
        check_blocks(plan, len(unet.output_blocks))


def truncated_prompts(items: Sequence[Item], task: Task, model: LatentDiffusion) -> str | None:
    """What the model does not read of the texts, the negative prompt among them; None if it reads all.

    That is the ends of long ones, and words such as <new1> that it was not given.
    """
    texts = [*(item.inputs for item in items), task.condition.settings()]
    prompts = {text[name] for text in texts for name in ("prompt", "negative_prompt") if name in text}
    said = []
    if unknown := unknown_words(model, [*prompts]):
        said.append(
            f"{', '.join(unknown)}: no word of this model, which reads the letters; --embedding or --delta brings it"
        )
    if cut := task.condition.cut(model, [*prompts]):
        said.append(
            f"{cut} of {len(prompts)} prompts longer than the text encoder reads: what is past its last token is left "
            f"out"
        )
    return "; ".join(said) or None


def list_plans(setup: Setup, recipe: Recipe, task: Task, nodes: int) -> None:
    """Print what plans would cost this model, which is built without its weights."""
    model = without_weights(setup.config.model)
    with fault_of("config"):
        engine = Engine(model, setup.sizes, recipe, Plan(nodes, (0,)), task)
    with fault_of("tome"):
        unit, kept = engine.unit, engine.kept
    print("\n".join(plan_table(unit, kept, nodes, images=1 if recipe.scale == 1.0 else 2)))


# Methods


def choose_methods(
    setup: Setup,
    sampling: SamplingSettings,
    recipe: Recipe,
    nodes: int,
    facts: RunFacts,
    compare: bool,
    anew: bool = False,
) -> Methods:
    """The methods of the run by name: the one asked for, or those of a comparison.

    anew: control networks run at every step.
    """
    plan = make_plan(sampling, nodes, facts)
    plan = with_control(plan, sampling) if anew else plan
    if not compare:
        return {SINGLE: (recipe, plan)}
    if plan.plain and not recipe.tome:
        raise SettingError(
            "plan",
            f"{sampling.plan} skips no encoder, so there is nothing to compare; expected a plan such as "
            f"faster-diffusion, or token merging",
        )
    methods, missing = compared(Path(sampling.plan).name, recipe, plan, facts)
    if missing and setup.processes.leads:
        print(f"no third column: {missing}")
    return methods


def compared(name: str, recipe: Recipe, plan: AnyPlan, facts: RunFacts) -> tuple[Methods, str]:
    """Plain, the method of that name, and the best calibrated plan at its cost; or why there is no such plan."""
    plain = replace(recipe, noise_weight=0.0, guidance_interval=None, guidance_reuse=False, tome=0.0)
    methods = {"plain": (plain, Plan(plan.num_nodes, tuple(range(plan.num_nodes)))), name: (recipe, plan)}
    best_name, best = best_plan(plan, plan.num_nodes, facts)
    if best is None:
        return methods, best_name
    return {**methods, best_name: (replace(recipe, noise_weight=0.0), best)}, ""


def load_engines(setup: Setup, methods: Methods, task: Task, tile: int | None = None) -> dict[str, Engine]:
    """The methods of the run by name, on one model."""
    model = setup.load()
    for recipe, plan in methods.values():
        check_network(model, recipe, plan)
        check_together(recipe, plan, task, setup.processes)
    build = partial(
        Engine, model, setup.sizes, task=task, autocast=setup.autocast, spread=setup.processes.several, tile=tile
    )
    with fault_of("config"):
        engines = {label: build(*method) for label, method in methods.items()}
    engines[next(iter(engines))].pack()  # they share the model
    return engines


def weights_of(setup: Setup) -> dict[str, Any]:
    """What is recorded with an image of its model's files."""
    return {
        "ckpt": f"{setup.ckpt.parent.name}/{setup.ckpt.name}",
        "weights": fingerprint(setup.ckpt)[:16],
        "config": fingerprint(setup.config_path)[:16],
        "averaged": setup.weights,
    } | setup.adapters()


@dataclass(frozen=True)
class ImageRun:
    """The images of some methods, made by all processes of the run together.

    items, batch: the images of each method, and at most how many at a time.
    keep: the images are needed when all of them are made.
    """

    setup: Setup
    engines: Mapping[str, Engine]
    items: Sequence[Item]
    output: OutputSettings
    batch: int
    keep: bool

    def follow(self) -> list[MethodRun]:
        """Compute with the leading process what it says."""
        for label, chunk, warm_up in self.setup.processes.orders():
            if warm_up:
                self.engines[label].warm_up(chunk, {})
            else:
                self.engines[label].latents(chunk)
        return []

    def lead(self, settings: Mapping[str, Any], plan: str) -> list[MethodRun]:
        """Make, save and report the images of every engine; the other processes follow.

        Args:
            settings: what all images depend on.
            plan: its name, to be printed.
        """
        began = time.perf_counter()
        print(opening(plan, self.setup, [*self.engines.values()][1 if self.output.compare else 0]), flush=True)
        own = {label: engine.settings() for label, engine in self.engines.items()}
        runs = {label: MethodRun(label, {**settings, **own[label]}) for label in self.engines}
        self._make_all(runs)
        self.setup.processes.tell(None)
        report([*runs.values()], self.items, {**settings, **own}, self.output, self.batch)
        print(summary([*runs.values()], self.output, time.perf_counter() - began))
        return [*runs.values()]

    def _make_all(self, runs: Mapping[str, MethodRun]) -> None:
        """All images of all methods, with progress over images and steps; other processes are told to help.

        The methods take turns, a batch each, so that what else the machine does meets all of them. To compare them,
        all are warmed up before the first.
        """
        nodes = next(iter(self.engines.values())).plan.num_nodes
        with (
            tqdm(total=len(self.items) * len(runs), unit="image", disable=None) as images,
            tqdm(total=nodes, desc="steps", unit="step", leave=False, disable=None) as steps,
        ):

            def on_node() -> None:
                if steps.n >= nodes:
                    steps.reset()
                steps.update()

            def before() -> None:
                if self.output.compare and any(run.first_calls is None for run in runs.values()):
                    self._warm_up(runs)

            streams = [(run, self._stream(run, before, on_node)) for run in runs.values()]
            for _ in range(0, len(self.items), self.batch):
                for run, stream in streams:
                    for made in islice(stream, self.batch):
                        run.add(made, self.keep)
                        images.update()

    def _stream(self, run: MethodRun, before: Callable[[], None], on_node: Callable[[], None]) -> Iterator[Sample]:
        """The images of one method, made as they are asked for; before() is called ahead of each batch."""

        def make(chunk: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
            before()
            self.setup.processes.tell((run.label, chunk, False))
            return self.engines[run.label](chunk, on_node)

        outdir = self.output.outdir if self.output.save else None
        return generate(self.items, make, run.settings, outdir, self.batch, again=self.output.again)

    def _warm_up(self, runs: Mapping[str, MethodRun]) -> None:
        """Call every engine for every size of its batches, and note what first calls cost."""
        items, batch = self.items, self.batch
        first_calls: dict[Hashable, float] = {}
        chunks = {len(chunk): chunk for chunk in (items[len(items) // batch * batch :], items[:batch]) if chunk}
        for label, engine in self.engines.items():
            for chunk in chunks.values():
                self.setup.processes.tell((label, chunk, True))
                # Of the last chunk, which is the first of the run.
                runs[label].first_calls = engine.warm_up(chunk, first_calls) / len(chunk)


def summary(runs: Sequence[MethodRun], output: OutputSettings, seconds: float) -> str:
    """The last lines of a run: how many images there are, where, and what they cost."""
    fresh, total = (sum(getattr(run, name) for run in runs) for name in ("fresh", "count"))
    replaced = sum(run.replaced for run in runs)
    again = f"{replaced} of the images that were there had been damaged or changed, or had no proof; made again\n"
    where = f"in {Path(output.outdir) / 'samples'}" if output.save else "not saved"
    return (
        f"{again if replaced else ''}{total} image{'s' * (total != 1)} ({fresh} made, {total - fresh} found) {where}; "
        f"spent {seconds:.1f} s, {sum(run.spent_macs for run in runs) / 1e9:.1f} GMAC"
    )
