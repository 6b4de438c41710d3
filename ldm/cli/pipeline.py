"""The run of a sampling script: the model is loaded, the images are made, and what they cost is printed.

`make_images` is the whole of it. Below it stand, in the order of a run: what is checked before the model is loaded, the
methods that are compared, the refiner, the images of every method, and what is printed and shown of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import CheckpointError, fingerprint
from ldm.cli.parser import check_outdir
from ldm.cli.settings import OutputSettings, RefinerSettings, SamplingSettings
from ldm.cli.setup import (
    ALONE,
    Processes,
    Setup,
    best_plan,
    check_memory,
    count_nodes,
    make_plan,
    make_recipe,
    model_files,
    read_setup,
    reuse_setting,
    run_facts,
    with_batches,
    with_control,
    without_weights,
)
from ldm.cli.tasks import check_texts, is_framed, is_refiner, is_video, truncated_prompts
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import atomic_write
from ldm.io.images import CELL, find_png, from_pil, grid, open_image, psnr, save_png, side_by_side
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import RunFacts
from ldm.models.diffusion.propagation.plan import AnyPlan, Compute, Plan, check_blocks
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.profiling.plan_table import plan_table
from ldm.sampling.engine import Engine, Recipe, Task, num_nodes
from ldm.sampling.generate import Item, Sample, digest, generate
from ldm.sampling.refined import Refined

BATCH_PIXELS = 2**26  # 256 images of 512 x 512 pixels at a time
SHEET_PIXELS = 80_000_000  # Pillow doubts larger files
SINGLE = "pictures"  # the name of a single method; names of grids depend on it
SHARE = 0.2  # of the steps, which the refiner runs; as published
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
    check_texts(items, task)
    output = without_large_grid(output, len(items), size)
    recipe = make_recipe(sampling, size, setup.config)
    check_guidance(recipe, task, setup.processes)
    nodes = count_nodes(recipe, setup, task.start.strength)
    if output.list_plans:
        if setup.processes.leads:
            list_plans(setup, recipe, task, nodes)
            if refiner is not None:
                print("all of the base model alone, as if it ran the refiner's steps, too")
        return []
    with fault_of("ckpt", (CheckpointError,)):
        settings = weights_of(setup) | ({} if refiner is None else {"refiner": weights_of(refiner.setup)})
    facts = run_facts(setup, recipe.solver_name, recipe.facts(task.start.strength), task.network)
    methods = choose_methods(setup, sampling, recipe, nodes, facts, output.compare, task.network.anew)
    engines = load_engines(setup, methods, task, output.tile, refiner)
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
        if Compute.GATED in plan.levels and not unet.keeps_attention:
            raise ValueError("tgate needs cross-attention as in Stable Diffusion, which this model's network lacks")


def list_plans(setup: Setup, recipe: Recipe, task: Task, nodes: int) -> None:
    """Print what plans would cost this model, which is built without its weights."""
    model = without_weights(setup.config.model)
    with fault_of("config"):
        engine = Engine(model, setup.sizes, recipe, Plan(nodes, (0,)), task)
    with fault_of("tome"):
        unit, kept = engine.unit, engine.kept
    facts = RunFacts({"sampler": recipe.solver_name, **recipe.facts()})
    images = 1 if recipe.scale == 1.0 else 2
    print("\n".join(plan_table(unit, kept, nodes, images=images, run=facts, control=task.network.anew)))


# The methods that are compared


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


def load_engines(
    setup: Setup,
    methods: Methods,
    task: Task,
    tile: int | None = None,
    refiner: Refiner | None = None,
    load: Callable[[Setup], LatentDiffusion] = methodcaller("load"),
) -> dict[str, Engine]:
    """The methods of the run by name, on one model; with a refiner behind each, if there is one."""
    if is_video(setup) and not task.network.videos:
        raise SettingError("config", "a model of videos; expected one of images, or text2video.py --model videofusion")
    if refiner is not None:
        refiner.check(methods)
    model = load(setup)
    for recipe, plan in methods.values():
        check_network(model, recipe, plan)
        check_together(recipe, plan, task, setup.processes)
    build = partial(
        Engine, model, setup.sizes, task=task, autocast=setup.autocast, spread=setup.processes.several, tile=tile
    )
    with fault_of("config"):
        engines = {label: build(*method) for label, method in methods.items()}
    if refiner is not None:
        engines = refiner.finishing(engines, load)
    engines[next(iter(engines))].pack()  # they share the model
    return engines


def weights_of(setup: Setup) -> dict[str, Any]:
    """What is recorded with an image of its model's files."""
    return {
        "ckpt": setup.name,
        "weights": fingerprint(setup.ckpt)[:16],
        "config": fingerprint(setup.config_path)[:16],
        "averaged": setup.weights,
    } | setup.adapters()


# The model that finishes the images of SDXL


@dataclass(frozen=True)
class Refiner:
    """The model that finishes the images, and the share of the steps, the last ones, that it runs."""

    setup: Setup
    share: float = SHARE

    def check(self, methods: Methods) -> None:
        """Raise SettingError for a size that the refiner can't make, a plan that a run with one can't have, or too few
        steps for its share."""
        multiple = self.setup.sizes.multiple
        for recipe, plan in methods.values():
            for name, value in (("H", recipe.height), ("W", recipe.width)):
                if value % multiple:
                    raise SettingError(name, f"must be a multiple of {multiple} with this refiner; got {value}")
            if not isinstance(plan, Plan):
                raise SettingError("plan", "a plan that decides during a run, or measures, does not go with a refiner")
            with fault_of("refiner_share"):
                num_nodes(recipe, self.setup.config.model.params.get("timesteps", 1000), self.share)

    def finishing(self, engines: Mapping[str, Engine], load: Callable[[Setup], LatentDiffusion]) -> dict[str, Engine]:
        """The engines with the refiner behind each; `load` gives its model.

        Raises:
            SettingError: the files do not make a model, or it does not go with the number of steps.
        """
        with _named("refiner"):
            model = load(self.setup)
        with fault_of("refiner_share"):
            return {label: Refined(engine, model, self.share) for label, engine in engines.items()}


def make_refiner(settings: RefinerSettings, base: Setup) -> Refiner | None:
    """The refiner that is asked for, on the base model's device.

    Raises:
        SettingError: its files are not there, or are not those of a refiner of that base model.
    """
    given = replace(settings, refiner=None)
    if settings.refiner is None:
        for name, value in vars(given).items():
            if value is not None:
                raise SettingError(name, "only with a refiner")
        return None
    with _named("refiner"):
        config, ckpt = model_files(settings.refiner_config, settings.refiner)
        setup = read_setup(config, ckpt, base.device, base.processes, base.weights, base.autocast)
    if not is_refiner(setup):
        raise SettingError(
            "refiner", f"{config} is not the config of a refiner, which is conditioned on an aesthetic score"
        )
    if not is_framed(base) or (setup.sizes.channels, setup.sizes.factor) != (base.sizes.channels, base.sizes.factor):
        raise SettingError("refiner", f"finishes images of a base model of SDXL; {base.config_path} is another model")
    return Refiner(setup, SHARE if settings.refiner_share is None else settings.refiner_share)


@contextmanager
def _named(setting: str) -> Iterator[None]:
    """A SettingError inside the block becomes one of this setting: the refiner's files have flags of their own."""
    try:
        yield
    except SettingError as error:
        raise error.moved(setting) from error


# The images of every method


@dataclass
class MethodRun:
    """The images of one method, made now or by an earlier run, and what they cost.

    settings: what all of it depends on beside the items.
    first_calls: seconds per image that the first batch of a process takes longer; None = not measured.
    count, macs: of all.
    replaced: images made in the place of files that were damaged or changed.
    fresh, spent_macs, seconds, seconds_unet: of what this run made.
    files: of the images that are saved, by prompt_index and sample.
    """

    label: str
    settings: dict[str, Any]
    first_calls: float | None = None
    replaced: int = 0
    count: int = 0
    macs: int = 0
    fresh: int = 0
    spent_macs: int = 0
    seconds: float = 0.0
    seconds_unet: float = 0.0
    files: dict[tuple[int, int], Path] = field(default_factory=dict)
    _kept: dict[tuple[int, int], Image.Image] = field(default_factory=dict)

    def add(self, made: Sample, keep: bool) -> None:
        """One more; keep: its image is needed for a grid or a comparison."""
        place = made.item.prompt_index, made.item.sample
        if keep:
            self._kept[place] = made.image
        if made.path is not None:
            self.files[place] = made.path
        self.count, self.macs = self.count + 1, self.macs + made.run["unet_macs"]
        if made.fresh:
            self.replaced += made.replaced
            self.fresh, self.spent_macs = self.fresh + 1, self.spent_macs + made.run["unet_macs"]
            self.seconds += made.run["seconds"]
            self.seconds_unet += made.run["seconds_unet"]

    @property
    def images(self) -> list[Image.Image]:
        """Those kept, in the order of the items: what is found comes before what is made."""
        return [self._kept[place] for place in sorted(self._kept)]

    def each(self) -> Iterator[tuple[int, Image.Image]]:
        """All images, kept or saved, one after the other, in the order of the items; each with its prompt_index.

        Raises:
            SettingError: one that was saved can no longer be read.
        """
        for place in sorted(self._kept | self.files):
            with fault_of("outdir"):
                image = self._kept[place] if place in self._kept else open_image(self.files[place])
            yield place[0], image

    @property
    def gmac(self) -> float:
        """Billions of MACs of the UNet for one image."""
        return self.macs / self.count / 1e9

    def __str__(self) -> str:
        """The cost of one image."""
        time = (
            "reused, not timed"
            if self.fresh == 0
            else (f"{self.seconds / self.fresh:.2f} s, {self.seconds_unet / self.fresh:.2f} s of it UNet")
        )
        return f"{time}, {self.gmac:.2f} GMAC of the UNet"


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


# What is printed, and shown of them together


def opening(plan: str, setup: Setup, engine: Engine) -> str:
    """What the run is to do, in one line: plan, sampler, parallel decoders, device, model."""
    recipe, nodes, parallel = engine.recipe, engine.plan.num_nodes, engine.plan.parallel
    keys = f"{len(engine.plan.keys)} key timesteps of {nodes}" if isinstance(engine.plan, Plan) else f"{nodes} steps"
    count = torch.get_num_threads()
    threads = f" ({count} thread{'s' * (count != 1)})" if setup.device.type == "cpu" else ""
    return (
        f"plan {plan} ({keys}), sampler {recipe.sampler}, scale {recipe.scale:g}, parallel {parallel}, "
        f"device {setup.device}{threads}, model {setup.name}"
    )


def report(
    runs: Sequence[MethodRun], items: Sequence[Item], settings: Mapping[str, Any], output: OutputSettings, batch: int
) -> None:
    """Save and announce what shows the images together, and print what each cost.

    Args:
        settings: what the images of all methods depend on.
    """
    if output.compare:
        compare(runs, items, settings, output.outdir, batch)
        return
    print(f"each image: {runs[0]}")
    if output.grid:
        columns = output.columns or batch
        sheet = grid(runs[0].images, columns, [item.caption for item in items])
        print(f"grid: {save_sheet('grid', sheet, items, {**settings, 'columns': columns}, output.outdir)}")


def save_sheet(
    kind: str, sheet: Image.Image, items: Sequence[Item], settings: Mapping[str, Any], outdir: str | Path
) -> Path:
    """Save a sheet of images under a name from all that it depends on; one that is there is kept."""
    settings = {**settings, "sheet": kind, "items": [item.settings() for item in items]}
    path = Path(outdir) / f"{kind}-{items[0].seed[0]}-{digest(settings)}.png"
    if find_png(path, settings) is None:
        save_png(path, sheet, settings)
    return path


def save_array(run: MethodRun, items: Sequence[Item], outdir: str | Path) -> Path:
    """Save all images as `arr_0`, (N, H, W, 3) uint8, under a name from all that they depend on.

    Raises:
        SettingError: it can't be written.
    """
    shape = "x".join(map(str, (len(items), run.settings["height"], run.settings["width"], 3)))
    path = Path(outdir) / f"{shape}-{items[0].seed[0]}-{digest(run.settings)}.npz"
    with fault_of("outdir", (OSError,)), atomic_write(path) as temporary:
        np.savez(temporary, np.stack([np.asarray(image) for image in run.images]))
    return path


def compare(
    runs: Sequence[MethodRun], items: Sequence[Item], settings: Mapping[str, Any], outdir: str | Path, batch: int
) -> None:
    """Plain and accelerated images side by side, with cost and distance; the first run is the plain one."""
    plain, *others = (torch.stack([from_pil(image) for image in run.images]) for run in runs)
    distances = [psnr(plain, other) for other in others]
    captions = [
        f"{' | '.join(f'{d:.1f}' for d in each)} dB  {item.caption}"
        for *each, item in zip(*distances, items, strict=True)
    ]
    sheet = side_by_side({f"{run.label}: {run.gmac:.1f} GMAC": run.images for run in runs}, captions)
    path = save_sheet("compare", sheet, items, settings, outdir)
    print("\n".join(comparison(runs, distances, min(batch, len(items)))))
    print(f"side by side: {path}")


def comparison(runs: Sequence[MethodRun], distances: Sequence[Tensor], batch: int) -> Iterator[str]:
    """The lines of a comparison: what each method costs, and the plain one as a multiple of the others.

    Args:
        runs: the plain one first.
        distances: PSNR of each image of the others to the plain one, in dB.
        batch: images in the first batch.
    """
    plain, *others = runs
    names = [*(run.label for run in runs), *(f"{plain.label} / {run.label}" for run in others)]
    width = max(map(len, names)) + 2
    first = "first" if batch == 1 else f"first {batch}"
    columns = "".join(f"{name:>10}" for name in (first, "further", "UNet", "GMAC"))
    yield f"{'seconds per image':{width}}{columns}  PSNR to plain: mean, lowest"
    for name, run, distance in zip(names, runs, (None, *distances), strict=False):
        found = "reused, not timed"
        times = f"{found:>30}" if run.fresh == 0 else "".join(f"{decimals(s, 3):>10}" for s in times_of(run))
        quality = "" if distance is None else f"  {distance.mean():.1f} dB, {distance.min():.1f} dB"
        yield f"{name:{width}}{times}{run.gmac:>10.2f}{quality}"
    for name, other in zip(names[len(runs) :], others, strict=True):
        ratios = [*map(ratio, times_of(plain), times_of(other)), plain.gmac / other.gmac]
        yield f"{name:{width}}" + "".join(f"{decimals(r, 2):>10}" for r in ratios)
    if any(run.fresh < run.count for run in runs):
        yield "images of an earlier run are reused and not timed; --again makes them again"


def decimals(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def times_of(run: MethodRun) -> tuple[float | None, float | None, float | None]:
    """Seconds per image: of the first batch of a process, of a further one, of its UNet; None = not measured."""
    if run.fresh == 0:
        return None, None, None
    further = run.seconds / run.fresh
    first = None if run.first_calls is None else further + run.first_calls
    return first, further, run.seconds_unet / run.fresh


def ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


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
