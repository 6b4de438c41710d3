"""What the sampling scripts share: the checks before a slow load, the run, its report.

A script says what is pictured: a list of items and a `Task`. Everything else is here or below.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.arguments import NOISE_WEIGHT, Files
from ldm.class_names import Names, read_names
from ldm.cli import BadInput, blame
from ldm.processes import ALONE, Processes

# The library, and with it PyTorch, is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from ldm.generate import Item, Made
    from ldm.models.diffusion.plan import AnyPlan
    from ldm.models.diffusion.plans import RunFacts
    from ldm.sampling.engine import Engine, Recipe, Sizes, Task

PUBLISHED_SAMPLERS = {"plms": "plms", "dpm": "dpm-solver++"}
CPU_POSITIONS = 16384   # latent positions in one decoder batch on a CPU, where memory soon outweighs speed
GO_ON = "stopped; the same command goes on from here"


# From arguments to what they name

def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [args.prompt]
    if args.from_file is not None:
        with blame("--from-file"):
            lines = Path(args.from_file).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise BadInput(f"--from-file: {args.from_file} is empty; expected one prompt per line")
    return [prompt for prompt in prompts for _ in range(args.repeat)]


def text_items(args: argparse.Namespace, extra: dict[str, Any] | None = None) -> list[Item]:
    """The pictures that `text_arguments` ask for; `extra` is what else of each is to be remembered."""
    from ldm.generate import subject_items

    # As published: a batch is n_samples pictures of the prompt, or n_samples lines of the file.
    per_iteration = 1 if args.from_file else args.n_samples
    subjects = [{"prompt": prompt} | (extra or {}) for prompt in read_prompts(args)]
    return subject_items(subjects, per_iteration * args.n_iter, args.seed,
                         share_start=per_iteration if args.fixed_code else None)


def given_names(args: argparse.Namespace, default: Path | None = None) -> Names:
    """The names in --class-names, else in the default file; none without either."""
    path = args.class_names or default
    with blame("--class-names"):
        return {} if path is None else read_names(path)


def find_device(name: str, processes: Processes = ALONE) -> torch.device:
    import torch

    if processes.several:
        return _own_device(name, processes)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise BadInput(f"--device: {name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def _own_device(name: str, processes: Processes) -> torch.device:
    """This process's, where there are several: the CPU for all, or a GPU for each."""
    import torch

    if name not in ("auto", "cuda", "cpu"):
        raise BadInput(f"--device: {name} is one device, and there are {processes.size} processes; accepted: auto, "
                       f"cuda, cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if processes.local >= gpus:
        raise BadInput(f"--device: process {processes.rank} has no GPU of its own; this machine has {gpus}")
    return torch.device("cuda", processes.local)


def model_files(args: argparse.Namespace, default: Files | None) -> Files:
    if (args.config is None) != (args.ckpt is None):
        given, other = ("--config", "--ckpt") if args.ckpt is None else ("--ckpt", "--config")
        without = f"; without both the model is {default[1].parent.name}" if default else ""
        raise BadInput(f"{other}: needed together with {given}{without}")
    if args.config is None and default is None:
        raise BadInput("--config: needed, together with --ckpt: the files of the model")
    config, ckpt = (Path(args.config), Path(args.ckpt)) if args.config else default
    if not config.is_file():
        raise BadInput(f"--config: {config}: no such file")
    if not ckpt.exists():
        raise BadInput(f"--ckpt: {ckpt}: no such file, nor a diffusers folder")
    return config, ckpt


def check_outdir(outdir: Path) -> None:
    """It must be possible to write there; nothing is left behind by finding out."""
    place = next(p for p in (outdir, *outdir.absolute().parents) if p.exists())
    if not place.is_dir():
        raise BadInput(f"--outdir: {place} is a file; expected a directory")
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise BadInput(f"--outdir: can't write to {outdir}: {error.strerror}") from error


def picture_size(args: argparse.Namespace, sizes: Sizes, default: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the pictures, from --H and --W."""
    height, width = args.H or default[0], args.W or default[1]
    for flag, value in (("--H", height), ("--W", width)):
        if value % sizes.multiple:
            raise BadInput(f"{flag}: must be a multiple of {sizes.multiple} for this model; got {value}")
    return height, width


def from_picture(args: argparse.Namespace, default: Files) -> tuple[Tensor, list[Item], Setup]:
    """What `picture_arguments` ask for: the picture in the size of the results, (3, H, W); these; the model."""
    from ldm.images import fit, from_pil, open_picture

    with blame("--init-img"):
        image = open_picture(args.init_img)
        items = text_items(args, named(args.init_img, "init_img"))
    setup = make_setup(args, default)
    step = setup.sizes.multiple
    height, width = (max(step, side // step * step) for side in (image.height, image.width))
    return from_pil(fit(image, *picture_size(args, setup.sizes, (height, width)))), items, setup


def conditioner(setup: Setup) -> nn.Module:
    """The model's conditioner without its weights, to see what it takes."""
    config = setup.config.model.params.get("cond_stage_config")
    if isinstance(config, str):
        raise BadInput(f"--config: a model without a conditioner of its own: its cond_stage_config is {config}")
    return without_weights(config)


def without_weights(config: Any) -> nn.Module:
    """A part of the model, built from its part of the config."""
    import torch

    from ldm.util import instantiate_from_config

    with blame("--config", (ValueError, OSError, TypeError, KeyError)), torch.device("meta"):
        return instantiate_from_config(config)


def stacked(pictures: Mapping[str, Tensor]) -> Tensor:
    """Pictures (..., H, W) by name as a batch.

    Raises:
        ValueError: they are not of one size.
    """
    import torch

    (first, one), *others = pictures.items()
    for name, other in others:
        if other.shape != one.shape:
            raise ValueError(f"{name} has {pixels(other)}, {first} {pixels(one)}; expected one size, so run each "
                             f"size by itself")
    return torch.stack(list(pictures.values()))


def pixels(picture: Tensor) -> str:
    return f"{picture.shape[-1]} x {picture.shape[-2]} pixels"


def named(path: str | Path, role: str) -> dict[str, str]:
    """How a picture remembers an input file: by name and content."""
    from ldm.checkpoint import fingerprint

    return {role: Path(path).name, f"{role}_sha256": fingerprint(path)[:16]}


def sampler_name(args: argparse.Namespace) -> str:
    from ldm.models.diffusion.solvers import SOLVERS

    flag, name = "--sampler", args.sampler
    for published, meant in PUBLISHED_SAMPLERS.items():
        if getattr(args, published):
            flag, name = f"--{published}", meant
    if name not in SOLVERS:
        raise BadInput(f"{flag}: there is no solver {name!r}; accepted: {', '.join(SOLVERS)}")
    return name


@dataclass(frozen=True)
class Setup:
    """The model to use, from its files' names and its config: all that can be known before it is loaded."""

    config_path: Path
    ckpt: Path
    config: Any
    sizes: Sizes
    device: torch.device
    processes: Processes


def make_setup(args: argparse.Namespace, default: Files | None = None, processes: Processes | None = None) -> Setup:
    """What is quick to check comes before what is slow to load.

    processes: that make each picture together; None = those that torchrun has started.
    """
    config_path, ckpt = model_files(args, default)
    check_outdir(Path(args.outdir))
    processes = Processes.of_run() if processes is None else processes
    device = find_device(args.device, processes)
    if processes.several and args.guidance_reuse:
        raise BadInput("--guidance-reuse: needs the key step's guidance at every later step, so it does not go with "
                       "several processes")

    from ldm.checkpoint import load_config
    from ldm.diagnosis import stated_prediction
    from ldm.sampling.engine import Sizes

    with blame("--config"):
        config = load_config(config_path)
        sizes = Sizes.of(config.model)
    says, stated = config.model.params.get("parameterization", "eps"), stated_prediction(ckpt)
    if stated not in (None, says):
        raise BadInput(f"--config: its parameterization is {says}; the network in {ckpt} predicts {stated}, its "
                       f"scheduler says")
    for flag, given, real in (("--C", args.C, sizes.channels), ("--f", args.f, sizes.factor)):
        if given not in (None, real):
            raise BadInput(f"{flag}: this model's is {real}; got {given}")
    return Setup(config_path, ckpt, config, sizes, device, processes)


def make_recipe(args: argparse.Namespace, size: tuple[int, int], setup: Setup) -> Recipe:
    """How pictures of this height and width are sampled."""
    from ldm.models.diffusion.solvers import SOLVERS
    from ldm.sampling.engine import Recipe

    sampler, eta = sampler_name(args), args.eta
    if eta is None:
        eta = args.default_eta if SOLVERS[sampler].takes_eta else 0.0
    weight = args.noise_weight
    if weight is None:
        weight = 0.0 if args.plan == "off" else NOISE_WEIGHT
    scale = setup.config.get("sampling", {}).get("scale", 7.5) if args.scale is None else args.scale
    with blame("--guidance-interval"):
        return Recipe(*size, sampler, args.steps, eta, scale, args.guidance_interval, args.guidance_reuse,
                      args.tome, weight, args.noise_below, args.noise_order)


def run_facts(setup: Setup, sampler: str) -> RunFacts:
    """What plans and calibrations may have been made for."""
    from ldm.checkpoint import fingerprint
    from ldm.models.diffusion.plans import RunFacts

    folder = setup.ckpt if setup.ckpt.is_dir() else setup.ckpt.parent
    return RunFacts({"sampler": sampler, "weights": fingerprint(setup.ckpt)[:16]}, folder / "calibration")


def make_plan(args: argparse.Namespace, nodes: int, run: RunFacts) -> AnyPlan:
    """The run's plan, with all decoders that can share a batch in one where --parallel is auto."""
    from ldm.models.diffusion.plans import load_plan

    with blame("--plan"):
        plan = load_plan(args.plan, nodes, args.parallel or nodes, args.propagate, run)
    if args.compare and plan.plain and not args.tome:
        raise BadInput(f"--plan: {args.plan} skips no encoder, so --compare has nothing to compare; "
                       f"expected a plan such as faster-diffusion, or --tome")
    return plan


def with_memory(plan: AnyPlan, parallel: int | None, each: int, positions: int, setup: Setup) -> AnyPlan:
    """The plan with decoder batches that this machine has memory for.

    Args:
        plan: as asked for.
        parallel: --parallel; None = auto.
        each: bytes that one decoder node needs.
        positions: of all latents that the UNet gets at one node.

    Several processes share each batch, so they take as many times more.
    """
    from ldm.memory import decoders_that_fit, free_bytes
    from ldm.models.diffusion.plan import Plan

    processes, free = setup.processes, free_bytes(setup.device)
    fit = decoders_that_fit(free, each)
    fit = plan.num_nodes if fit is None else fit
    if parallel is None:
        if setup.device.type == "cpu":
            fit = min(fit, CPU_POSITIONS // positions)
        return replace(plan, parallel=processes.size * processes.least(max(1, fit)))
    # A GPU that runs out of memory says so, and the batch is halved; a CPU's system kills the process.
    longest = max(len(batch.nodes) for batch in plan.batches()) if isinstance(plan, Plan) else plan.parallel
    share = -(-longest // processes.size)
    if setup.device.type == "cpu" and share > max(1, fit):
        raise BadInput(f"--parallel: {share} decoder steps need about {share * each / 1e6:.0f} MB, {free / 1e6:.0f} MB "
                       f"are free; expected auto or at most {max(1, fit) * processes.size}")
    return plan


# Making and showing

@dataclass
class Result:
    """What one method made, or found made by an earlier run.

    settings: what all of it depends on beside the items.
    images: kept only where a grid or a comparison needs them.
    fresh, spent_macs: of what this run made.
    count, seconds, seconds_unet, macs: of all.
    """

    label: str
    settings: dict[str, Any]
    images: list[Image.Image] = field(default_factory=list)
    fresh: int = 0
    count: int = 0
    seconds: float = 0.0
    seconds_unet: float = 0.0
    macs: int = 0
    spent_macs: int = 0

    def add(self, made: Made, keep: bool) -> None:
        self.images += [made.image] if keep else []
        self.fresh, self.count = self.fresh + made.fresh, self.count + 1
        self.spent_macs += made.run["unet_macs"] if made.fresh else 0
        self.seconds += made.run["seconds"]
        self.seconds_unet += made.run["seconds_unet"]
        self.macs += made.run["unet_macs"]

    def __str__(self) -> str:
        """The cost of one picture."""
        return (f"{self.seconds / self.count:.2f} s, {self.seconds_unet / self.count:.2f} s of it UNet, "
                f"{self.macs / self.count / 1e9:.2f} GMAC of the UNet")


def make_all(label: str, engine: Engine, items: Sequence[Item], settings: dict[str, Any],
             args: argparse.Namespace, batch: int, keep: bool, processes: Processes) -> Result:
    """All pictures of one method, with progress over images and steps; other processes are told to help."""
    from tqdm import tqdm

    from ldm.generate import generate

    result, nodes = Result(label, settings | engine.settings()), engine.plan.num_nodes
    with (tqdm(total=len(items), desc=label, unit="image", disable=None) as images,
          tqdm(total=nodes, desc="steps", unit="step", leave=False, disable=None) as steps):
        def on_node() -> None:
            if steps.n >= nodes:
                steps.reset()
            steps.update()

        def make(chunk: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
            processes.tell((label, chunk))
            return engine(chunk)

        engine.on_node = on_node
        outdir = None if args.skip_save else args.outdir
        for made in generate(items, make, result.settings, outdir, batch):
            result.add(made, keep)
            images.update()
    return result


def save_sheet(kind: str, sheet: Image.Image, items: Sequence[Item], settings: dict[str, Any],
               args: argparse.Namespace) -> Path:
    """Save a sheet of pictures under a name from all that it depends on; one that is there is kept."""
    from ldm.generate import digest
    from ldm.images import read_png, save_png

    settings = settings | {"sheet": kind, "items": [item.settings() for item in items]}
    path = Path(args.outdir) / f"{kind}-{args.seed}-{digest(settings)}.png"
    if (found := read_png(path)) is None or found[1] != settings:
        save_png(path, sheet, settings)
    return path


def report(results: Sequence[Result], items: Sequence[Item], settings: dict[str, Any],
           args: argparse.Namespace, batch: int) -> None:
    """Save and announce what shows the pictures together, and say what each cost."""
    if args.compare:
        compare(*results, items, settings, args)
        return
    print(f"each picture: {results[0]}")
    if not args.skip_grid:
        from ldm.images import grid

        columns = args.n_rows or batch
        sheet = grid(results[0].images, columns)
        print(f"grid: {save_sheet('grid', sheet, items, settings | {'columns': columns}, args)}")


def compare(plain: Result, fast: Result, items: Sequence[Item], settings: dict[str, Any],
            args: argparse.Namespace) -> None:
    """Plain and accelerated pictures side by side, with cost and distance."""
    import torch

    from ldm.images import from_pil, psnr, side_by_side

    distance = psnr(*(torch.stack([from_pil(image) for image in r.images]) for r in (plain, fast)))
    columns = {f"{r.label}: {r.seconds / r.count:.2f} s": r.images for r in (plain, fast)}
    sheet = side_by_side(columns, [f"{d:.1f} dB  {i.caption}" for d, i in zip(distance, items, strict=True)])
    path = save_sheet("compare", sheet, items, settings, args)
    for result in (plain, fast):
        print(f"{result.label}, each picture: {result}")
    print(f"plain / {fast.label}: time {plain.seconds / fast.seconds:.2f}, UNet time "
          f"{plain.seconds_unet / fast.seconds_unet:.2f}, UNet MACs {plain.macs / fast.macs:.2f}")
    print(f"PSNR between the two: mean {distance.mean():.1f} dB, lowest {distance.min():.1f} dB")
    print(f"side by side: {path}")


def list_plans(setup: Setup, recipe: Recipe, task: Task, nodes: int) -> None:
    """Print what plans would cost this model, which is built without its weights."""
    import torch

    from ldm.models.diffusion.plan import Plan
    from ldm.plan_table import plan_table
    from ldm.sampling.engine import Engine
    from ldm.util import instantiate_from_config

    with blame("--config", (ValueError, OSError, TypeError, KeyError)):
        with torch.device("meta"):
            model = instantiate_from_config(setup.config.model)
        engine = Engine(model, setup.sizes, recipe, Plan(nodes, (0,)), task)
    with blame("--tome"):
        unit = engine.unit
    print("\n".join(plan_table(unit, nodes)))


def make_pictures(args: argparse.Namespace, setup: Setup, items: Sequence[Item], task: Task,
                  size: tuple[int, int], batch: int, keep: bool = False) -> list[Result]:
    """Load the model, make the pictures of one method or, to compare, two; report.

    Args:
        size: height and width of the pictures.
        batch: most pictures at a time.
        keep: the caller needs the pictures of the results.
    """
    import torch

    from ldm.checkpoint import CheckpointError, fingerprint, load_model
    from ldm.models.diffusion.plan import Plan, check_blocks
    from ldm.sampling.engine import Engine, num_nodes

    sizes, recipe = setup.sizes, make_recipe(args, size, setup)
    timesteps = setup.config.model.params.get("timesteps", 1000)
    with blame("--steps"):
        num_nodes(recipe, timesteps)
    with blame("--strength"):
        nodes = num_nodes(recipe, timesteps, task.canvas.strength)
    if args.plan == "list":
        if setup.processes.rank == 0:
            list_plans(setup, recipe, task, nodes)
        return []
    latents = batch * (1 if recipe.scale == 1.0 else 2)
    positions = math.prod(sizes.whole(side) // sizes.factor for side in size)
    with blame("--ckpt", (CheckpointError,)):
        settings = {"ckpt": f"{setup.ckpt.parent.name}/{setup.ckpt.name}", "weights": fingerprint(setup.ckpt)[:16],
                    "config": fingerprint(setup.config_path)[:16], "averaged": args.weights}
    plan = make_plan(args, nodes, run_facts(setup, recipe.sampler))
    # A config that does not build a model may fail in any way that a constructor can.
    with blame("--config", (ValueError, OSError, TypeError, KeyError)), blame("--ckpt", (CheckpointError,)):
        model = load_model(setup.config_path, setup.ckpt, setup.device, args.weights)
    with blame("--tome"):
        model.model.diffusion_model.check_merging(recipe.tome)

    with blame("--plan"):
        check_blocks(plan, len(model.model.diffusion_model.output_blocks))
    precision = args.precision or ("autocast" if setup.device.type == "cuda" else "full")
    build = partial(Engine, model, sizes, task=task, autocast=precision == "autocast", warm_up=args.compare,
                    spread=setup.processes.several)
    methods = {"accelerated" if args.compare else "pictures": (recipe, plan)}
    if args.compare:
        plain = replace(recipe, noise_weight=0.0, guidance_interval=None, guidance_reuse=False, tome=0.0)
        methods = {"plain": (plain, Plan(nodes, tuple(range(nodes)))), **methods}
    with blame("--config"):
        engines = {label: build(*method) for label, method in methods.items()}
    engines[next(iter(engines))].pack()     # they share the model

    with setup.processes.joined(setup.device):
        for engine in engines.values():
            if not engine.plan.plain and engine.plan.parallel > 1:
                engine.plan = with_memory(engine.plan, args.parallel, engine.decoder_bytes(latents),
                                          latents * positions, setup)
        suspect = "--precision" if precision == "autocast" else "--ckpt"
        with (blame("--outdir", (OSError,)), blame(suspect, (ValueError,)),
              blame("--device", (torch.OutOfMemoryError,))):
            if setup.processes.rank > 0:
                for label, chunk in setup.processes.orders():
                    engines[label].latents(chunk)
                return []
            return lead(args, setup, items, engines, settings, batch, keep)


def lead(args: argparse.Namespace, setup: Setup, items: Sequence[Item], engines: Mapping[str, Engine],
         settings: dict[str, Any], batch: int, keep: bool) -> list[Result]:
    """Make, save and report the pictures of every engine; the other processes follow."""
    began = time.perf_counter()
    keep = keep or args.compare or not args.skip_grid
    results = [make_all(label, engine, items, settings, args, batch, keep, setup.processes)
               for label, engine in engines.items()]
    setup.processes.tell(None)
    report(results, items, settings | {label: e.settings() for label, e in engines.items()}, args, batch)
    fresh, total = (sum(getattr(r, name) for r in results) for name in ("fresh", "count"))
    where = "not saved" if args.skip_save else f"in {Path(args.outdir) / 'samples'}"
    print(f"{total} picture{'s' * (total != 1)} ({fresh} made, {total - fresh} found) {where}; "
          f"spent {time.perf_counter() - began:.1f} s, {sum(r.spent_macs for r in results) / 1e9:.1f} GMAC")
    return results
