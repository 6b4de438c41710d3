"""Where a run computes, with which model, and how it samples: all that can be known and checked before the work."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ldm.checkpoint import (
    Bounded,
    CheckpointError,
    check_weights,
    fingerprint,
    load_config,
    load_model,
    read_checkpoint,
)
from ldm.checkpoint.delta import add_words, apply_deltas
from ldm.checkpoint.diagnosis import Facts, facts_of_config, facts_of_weights, fitting, summary
from ldm.checkpoint.embeddings import add_embeddings
from ldm.checkpoint.file import stated_prediction
from ldm.checkpoint.kinds import STATE, TAKES, kinds_in
from ldm.checkpoint.lora import merge_lora
from ldm.checkpoint.model import check_whole
from ldm.checkpoint.published import Published, load_manifest
from ldm.cli.arguments import NOISE_WEIGHT, Files
from ldm.cli.parser import torchrun_ranks
from ldm.cli.settings import ModelSettings, SamplingSettings
from ldm.io.errors import BadInput, SettingError, did_you_mean, fault_of
from ldm.io.files import PROJECT_ROOT, same_place
from ldm.io.images import MOST_PIXELS
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of, level_of, load_plan
from ldm.models.diffusion.propagation.plan import LEVELS, MEASURED, AnyPlan, Compute, Plan, with_few_sizes
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.modules.diffusionmodules.util import Unfilled
from ldm.profiling.cost import decoders_that_fit, free_bytes
from ldm.sampling.engine import Engine, Recipe, Sizes, num_nodes, usual_scale
from ldm.sampling.task import Network
from ldm.util import instantiate_from_config

# A config that does not build a model may fail in any way that a constructor can.
CONSTRUCTION = (ValueError, OSError, TypeError, KeyError)
EXPORT = "python scripts/export_model.py FOLDER --out FILE makes what is used of it"


# Where: the device, and the processes that share the work, as torchrun starts them. The first process leads: it alone
# looks for images, prints and writes, and tells the others what to compute with it.


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    rank:  0..size-1; 0 leads.
    local: rank among those of this machine, which names its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """They can talk to each other inside the block; over NCCL between GPUs, else over gloo."""
        if not self.several:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with fault_of(f"environment variable WORLD_SIZE: {self.size} processes can't meet", (ValueError, RuntimeError)):
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if not self.several:
            return value
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return min(values)

    def tell(self, order: Any) -> None:
        """The leader's order to all others; None = there is nothing more to do."""
        if self.several:
            dist.broadcast_object_list([order])

    def orders(self) -> Iterator[Any]:
        """What the leader tells, until there is nothing more to do."""
        while True:
            order = [None]
            try:
                dist.broadcast_object_list(order)
            except RuntimeError as error:
                raise BadInput(f"process {self.rank}: the leading process has ended ({error})") from error
            if order[0] is None:
                return
            yield order[0]


ALONE = Processes()


def find_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of that name, or the best one for auto.

    Raises:
        SettingError: it is not on this machine.
    """
    if processes.several:
        return _own_device(name, processes)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise SettingError("device", f"{name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def _own_device(name: str, processes: Processes) -> torch.device:
    """This process's, where there are several: the CPU for all, or a GPU for each."""
    if name not in ("auto", "cuda", "cpu"):
        raise SettingError(
            "device", f"{name} is one device, and there are {processes.size} processes; accepted: auto, cuda, cpu"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and gpus == 0):
        return torch.device("cpu")
    if processes.local >= gpus:
        raise SettingError("device", f"process {processes.rank} has no GPU of its own; this machine has {gpus}")
    return torch.device("cuda", processes.local)


# With which model


@dataclass(frozen=True)
class Setup:
    """The model to use, from its files' names and its config: all that can be known before it is loaded.

    weights:  averaged or last, as `load_model` takes them.
    autocast: run the networks in the device's lower precision.
    lora: files that change the weights, and how strongly.
    embedding: files of new tokens.
    delta: files of Custom Diffusion.
    """

    config_path: Path
    ckpt: Path
    config: Any
    sizes: Sizes
    device: torch.device
    processes: Processes = ALONE
    weights: str = "auto"
    autocast: bool = False
    lora: Sequence[tuple[str, float]] = ()
    embedding: Sequence[str] = ()
    delta: Sequence[str] = ()

    def load(self) -> LatentDiffusion:
        """The model on the run's device.

        Raises:
            SettingError: the files do not make a model.
        """
        with fault_of("config", CONSTRUCTION), fault_of_file("ckpt", [self.ckpt], (CheckpointError,)):
            model = load_model(self.config, self.ckpt, self.device, self.weights, free_bytes(self.device))
        if self.delta:
            with fault_of_file("delta", self.delta):
                deltas = apply_deltas(model, self.delta)
            for path, delta in zip(self.delta, deltas, strict=True):
                if delta.tokens and not delta.named:
                    print(f"--delta: {path}: its words have no names; here they are {', '.join(delta.tokens)}")
        for path, weight in self.lora:
            with fault_of_file("lora", [path]):
                if unmatched := merge_lora(model, path, weight):
                    print(f"warning: --lora: {path}: not in this model: {', '.join(unmatched)}", file=sys.stderr)
        self.read_embeddings(model.cond_stage_model)
        return model

    def read_embeddings(self, encoder: nn.Module | None) -> None:
        """Give the model's text encoder the new tokens."""
        for path in self.embedding:
            with fault_of_file("embedding", [path]):
                add_embeddings(encoder, path)

    def read_words(self, encoder: nn.Module) -> None:
        """Give a text encoder all new tokens, without the weights that come with them."""
        if self.delta:
            with fault_of_file("delta", self.delta):
                add_words(encoder, self.delta)
        self.read_embeddings(encoder)

    def adapters(self) -> dict[str, list[Any]]:
        """What is recorded with an image of the files beside the model's own; nothing where there are none."""
        lora_files = [path for path, _ in self.lora]
        for name, paths in (("lora", lora_files), ("embedding", self.embedding), ("delta", self.delta)):
            with fault_of(name, (OSError,)):  # a name that no file can have
                if missing := [path for path in paths if not Path(path).is_file()]:
                    raise SettingError(name, f"{missing[0]}: no such file")
        lora = [[Path(path).name, fingerprint(path)[:16], weight] for path, weight in self.lora]
        embedding, delta = (
            [[Path(path).name, fingerprint(path)[:16]] for path in paths] for paths in (self.embedding, self.delta)
        )
        return {name: files for name, files in (("lora", lora), ("embedding", embedding), ("delta", delta)) if files}

    @property
    def name(self) -> str:
        """The weights' file, with the folder that it is in."""
        return Path(*self.ckpt.parts[-2:]).as_posix()

    @property
    def suspect(self) -> str:
        """The argument at fault if the networks compute NaN or infinite numbers."""
        return "precision" if self.autocast else "ckpt"


@contextmanager
def fault_of_file(
    setting: str, paths: Sequence[str | Path], errors: tuple[type[Exception], ...] = (CheckpointError, OSError)
) -> Iterator[None]:
    """Such errors of files of weights become a SettingError; of a file for another setting it names that one."""
    try:
        with fault_of(setting, errors):
            yield
    except SettingError:
        refuse_other_kinds(setting, paths)
        raise


def refuse_other_kinds(setting: str, paths: Sequence[str | Path]) -> None:
    """Raise SettingError for a file of weights that is clearly for another setting, or for none."""
    for path in paths:
        if (held := kinds_in(path)) and TAKES[setting] not in held:
            right = [name for name, kind in TAKES.items() if kind in held][:1]
            what = f"{TAKES[right[0]]}, which {{{right[0]}}} takes" if right else f"{STATE}; {EXPORT}"
            raise SettingError(setting, f"{path}: this is {what}", *right)


def make_setup(settings: ModelSettings, default: Files | None = None, processes: Processes | None = None) -> Setup:
    """What is quick to check comes before what is slow to load.

    Args:
        default: config and weights of the model that needs no argument.
        processes: that make each image together; None = those that torchrun has started.

    Raises:
        SettingError: the files are not there, or are not those of such a model; or there is no such device.
    """
    config_path, ckpt = model_files(settings.config, settings.ckpt, default)
    processes = Processes(*torchrun_ranks()) if processes is None else processes
    device = find_device(settings.device, processes)
    autocast = uses_autocast(settings.precision, device)
    setup = read_setup(config_path, ckpt, device, processes, settings.weights, autocast)
    setup = replace(setup, lora=tuple(settings.lora), embedding=tuple(settings.embedding), delta=tuple(settings.delta))
    setup.adapters()  # reads the files
    for name, given, real in (
        ("channels", settings.channels, setup.sizes.channels),
        ("factor", settings.factor, setup.sizes.factor),
    ):
        if given not in (None, real):
            raise SettingError(name, f"this model's is {real}; got {given}")
    return setup


def read_setup(
    config_path: Path,
    ckpt: Path,
    device: torch.device,
    processes: Processes = ALONE,
    weights: str = "auto",
    autocast: bool = False,
) -> Setup:
    """What the files say.

    Raises:
        SettingError: they are not those of a latent diffusion model.
    """
    with fault_of("config"):
        config = load_config(config_path)
        sizes = Sizes.of(config.model)
    says, stated = config.model.params.get("parameterization", "eps"), stated_prediction(ckpt)
    if stated not in (None, says):
        raise SettingError(
            "config", f"its parameterization is {says}; the network in {ckpt} predicts {stated}, its scheduler says"
        )
    with fault_of("ckpt"):
        check_weights(ckpt)
    return Setup(config_path, ckpt, config, sizes, device, processes, weights, autocast)


def uses_autocast(precision: str | None, device: torch.device) -> bool:
    """Whether the networks run in the device's lower precision; None = where that is usual, on a GPU of NVIDIA."""
    return (precision or ("autocast" if device.type == "cuda" else "full")) == "autocast"


def image_size(
    sizes: Sizes, height: int | None, width: int | None, default: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width of the images in pixels, as given or by default, which is the model's.

    Raises:
        SettingError: the model can't make images of that height or width, or nothing can.
    """
    usual = default or (sizes.default, sizes.default)
    height, width = height or usual[0], width or usual[1]
    for name, value in (("H", height), ("W", width)):
        if value % sizes.multiple:
            raise SettingError(name, f"must be a multiple of {sizes.multiple} for this model; got {value}")
    if height * width > MOST_PIXELS:  # said here, before an image is enlarged to that size
        raise SettingError("H", f"{width} x {height} pixels are more than {MOST_PIXELS}, the most of one image")
    return height, width


def conditioner(setup: Setup) -> nn.Module:
    """The model's conditioner without its weights, to see what it takes."""
    config = setup.config.model.params.get("cond_stage_config")
    if isinstance(config, str):
        raise SettingError("config", f"a model without a conditioner of its own: its cond_stage_config is {config}")
    return without_weights(config)


def without_weights(config: Any) -> nn.Module:
    """The model, or a part of it, built from its part of the config."""
    with fault_of("config", CONSTRUCTION), torch.device("meta"), Bounded(), Unfilled():
        return instantiate_from_config(config)


# The model's files: those given, one of them found from the other, or the script's own


def model_files(config: str | Path | None, ckpt: str | Path | None, default: Files | None = None) -> Files:
    """Config and weights; where neither is given the default. Both may be the folder of a run of main.py.

    Raises:
        SettingError: a file is not there, or there is not exactly one that belongs to the one given.
    """
    if config is None and ckpt is None:
        if default is None:
            raise SettingError("config", "needed, together with ckpt: the files of the model")
        config, ckpt = default
    config, ckpt = in_run(config, "config.yaml"), in_run(ckpt, "last.ckpt")
    with fault_of("config", (OSError,)):  # a name that no file can have
        if config is not None and not Path(config).is_file():
            raise SettingError("config", f"{config}: no such file")
    ckpt = weights_for(Path(config)) if ckpt is None else Path(ckpt)
    with fault_of("ckpt", (OSError,)):
        found = ckpt.exists()
    if not found:
        raise SettingError("ckpt", f"{ckpt}: no such file, nor a diffusers folder{download_hint(ckpt)}")
    return config_for(ckpt) if config is None else Path(config), ckpt


def in_run(path: str | Path | None, file: str) -> str | Path | None:
    """The file in the folder of a run of main.py, or the path as it is if it is none."""
    with fault_of("config" if file.endswith(".yaml") else "ckpt", (OSError,)):
        found = path is not None and (Path(path) / "last.ckpt").is_file()
    return Path(path) / file if found else path


def download_hint(ckpt: Path) -> str:
    """The end of an error message about weights that are not here: what fetches them, if they are published."""
    models = list(_published())
    if names := [model.name for model in models if same_place(model.file(), ckpt)]:
        return f"; python scripts/download_models.py {names[0]} fetches it"
    if names := [model.name for model in models if same_place(model.file().parent, ckpt)]:
        return f"; python scripts/download_models.py {' '.join(names)} fetches its files"
    beside = [model for model in models if same_place(model.file().parent, ckpt.parent)]
    if len(beside) != 1:
        return ""
    name, file, about = beside[0].name, beside[0].file().name, beside[0].about
    return f"; python scripts/download_models.py {name} fetches {file} ({about})"


def weights_for(config: Path) -> Path:
    """The weights beside a config, or where the one published checkpoint lies, or is to lie, that belongs to it."""
    if (beside := config.with_name("model.safetensors")).is_file():
        return beside
    models = [model for model in _published() if same_place(PROJECT_ROOT / model.config, config)]
    if len(models) != 1:
        names = ", ".join(model.name for model in models)
        nothing = "there is no model.safetensors beside it, and no published model has it"
        why = f"several published models have it: {names}" if models else nothing
        raise SettingError("ckpt", f"needed together with config {config}, since {why}")
    return models[0].file()


def config_for(ckpt: Path) -> Path:
    """config.yaml beside the weights, or the one published config that states what they are."""
    beside = (ckpt if ckpt.is_dir() else ckpt.parent) / "config.yaml"
    if beside.is_file():
        return beside
    with fault_of("ckpt", (CheckpointError, ValueError, OSError)):
        state = read_checkpoint(ckpt)
        check_whole(ckpt, state)
    facts = facts_of_weights(state)
    found = fitting_configs(facts)
    refuse_other_kinds("ckpt", [] if found else [ckpt])
    if len(found) == 1:
        return PROJECT_ROOT / found[0]
    fits = " and ".join(found) if found else f"no published config; it is: {summary(facts)}"
    raise SettingError("config", f"needed together with ckpt {ckpt}, which fits {fits}")


def fitting_configs(weights: Facts) -> Sequence[str]:
    """Published configs that state what a checkpoint is, as paths in the project."""
    paths = dict.fromkeys(model.config for model in _published())
    return fitting(weights, [(path, facts_of_config(load_config(PROJECT_ROOT / path).model)) for path in paths])


def _published() -> Sequence[Published]:
    with fault_of("models/published.yaml"):
        return [*load_manifest().values()]


# How it samples: solver, steps, guidance, plan, decoder batches

MODELS_OWN = Network()
CPU_POSITIONS = 16384  # latent positions in one decoder batch of an evaluation on a CPU; last digits depend on it
# The same of the scripts: as many predictions as gain by sharing a batch, 48 of 8 x 8 latents. More take memory only.
FAST_POSITIONS = 3072
SMALL_PIXELS = 2**18  # at a time, one image of 512 x 512: always fit, so nothing is counted


def make_recipe(settings: SamplingSettings, size: tuple[int, int], config: Mapping[str, Any] | None = None) -> Recipe:
    """How images of this height and width are sampled.

    Args:
        config: of the model, which recommends a guidance scale where the settings have none.

    Raises:
        SettingError: there is no such solver, it has no choice of eta, it does not take the spacing, the steps are not
            as many as the timesteps, or the guidance interval is empty.
    """
    sampler = settings.sampler
    if sampler not in SOLVERS:
        names = ", ".join(SOLVERS)
        raise SettingError(
            "sampler", f"there is no solver {sampler!r}; accepted: {names}{did_you_mean(sampler, SOLVERS)}"
        )
    with fault_of("spacing"):
        SOLVERS[sampler].spacings.check(settings.spacing, settings.timesteps_at)
    weight = settings.noise_weight
    if weight is None:
        with fault_of("plan"):  # it makes up for features that are held
            weight = 0.0 if settings.plan == "off" or level_of(settings.plan) in ("skip", "tgate") else NOISE_WEIGHT
    recipe = Recipe(
        *size,
        sampler,
        steps=_steps(settings),
        eta=_eta(settings),
        scale=usual_scale(config or {}) if settings.scale is None else settings.scale,
        guidance_interval=settings.guidance_interval,
        guidance_reuse=settings.guidance_reuse,
        tome=settings.tome,
        noise_weight=weight,
        noise_below=settings.noise_below,
        noise_order=settings.noise_order,
        spacing=settings.spacing,
        timesteps_at=settings.timesteps_at,
    )
    with fault_of("guidance_interval"):
        _ = recipe.guidance  # checks it
    return recipe


def _steps(settings: SamplingSettings) -> int | None:
    if settings.timesteps_at is None:
        return settings.steps
    count = len(settings.timesteps_at)
    if settings.steps not in (count, settings.default_steps):
        raise SettingError(
            "timesteps_at", f"{count} timesteps are {count} steps; got {settings.steps} steps beside them"
        )
    return count


def _eta(settings: SamplingSettings) -> float:
    takes_eta = SOLVERS[settings.sampler].takes_eta
    if settings.eta is None:
        return settings.default_eta if takes_eta else 0.0
    if settings.eta and not takes_eta:
        names = ", ".join(name for name, solver in SOLVERS.items() if solver.takes_eta)
        raise SettingError(
            "eta",
            f"{settings.sampler} has no choice of it; expected 0, or a sampler that has: {names}; got {settings.eta:g}",
        )
    return settings.eta


def count_nodes(recipe: Recipe, setup: Setup, strength: float = 1.0) -> int:
    """How many predictions a run of the last `strength` (0..1) of the steps makes, which is what its plan counts."""
    timesteps = setup.config.model.params.get("timesteps", 1000)
    with fault_of("steps" if recipe.timesteps_at is None else "timesteps_at"):
        num_nodes(recipe, timesteps)
    with fault_of("strength"):
        return num_nodes(recipe, timesteps, strength)


def run_facts(
    setup: Setup, sampler: str, more: Mapping[str, Any] = MappingProxyType({}), network: Network = MODELS_OWN
) -> RunFacts:
    """What plans and calibrations may have been made for; more: see `Recipe.facts`; network: of the task."""
    weights, files = fingerprint(setup.ckpt)[:16], setup.adapters()
    additions = [" ".join([name, *map(str, file)]) for name in ("lora", "delta") for file in files.get(name, [])]
    facts = {"sampler": sampler, "weights": weights, **more}
    if additions := [*additions, *network.settings()]:
        facts["additions"] = ", ".join(additions)
    return RunFacts(facts, calibrations_of(setup.ckpt))


def reuse_setting(reuse: bool | str) -> str:
    """What a command line calls the guidance reuse of `Guidance`: held, or forecast."""
    return "guidance_forecast" if isinstance(reuse, str) else "guidance_reuse"


def make_plan(settings: SamplingSettings, nodes: int, run: RunFacts) -> AnyPlan:
    """The run's plan, with all decoders that can share a batch in one where the settings leave that open.

    See `with_batches` for what a run makes of that.

    Raises:
        SettingError: there is no such plan for so many nodes, or it does not go with the guidance.
    """
    with fault_of("plan"):
        plan = load_plan(settings.plan, nodes, settings.parallel or nodes, run=run)
    if settings.propagate is not None:
        with fault_of("forecast"):
            plan = load_plan(settings.plan, nodes, settings.parallel or nodes, settings.propagate, run)
    if settings.guidance_reuse and settings.scale != 1.0 and (Compute.SHALLOW in plan.levels or plan.waits):
        raise SettingError(
            reuse_setting(settings.guidance_reuse),
            f"between key timesteps it needs steps of the decoder alone; {settings.plan} has other steps",
        )
    if settings.error_budget is None:
        return plan
    with fault_of("error_budget"):
        return BudgetPlan(plan, settings.error_budget, plan.parallel)


def with_control(plan: AnyPlan, settings: SamplingSettings) -> AnyPlan:
    """The plan with control networks at every step.

    Raises:
        SettingError: it has steps without the decoder, forecasts, or decides on the way; or the guidance is used again.
    """
    if settings.guidance_reuse:
        raise SettingError("control_at", f"every does not go with {reuse_setting(settings.guidance_reuse)}")
    if not isinstance(plan, Plan):
        raise SettingError("control_at", "every needs key timesteps that are known before the run")
    with fault_of("control_at"):
        return replace(plan, control=True)


def best_plan(plan: AnyPlan, nodes: int, run: RunFacts) -> tuple[str, AnyPlan | None]:
    """The name of the calibrated plan at the cost of another, and the plan; or why there is none, and None."""
    if plan.plain:
        return "the plan skips no encoder", None
    if not isinstance(plan, Plan) or len(plan.levels) > 1 or plan.waits or plan.branch > 1:
        return "calibration is for plans of one level, and this plan has several or decides during the run", None
    (level,) = (name for name, compute in LEVELS.items() if compute in plan.levels)
    if level not in MEASURED:
        return f"calibration measures the levels {', '.join(MEASURED)}, and this plan has {level}", None
    name = f"{'' if level == 'encoder' else f'{level}:'}auto:{len(plan.keys)}"
    try:
        best = load_plan(name, nodes, nodes, run=run)
    except ValueError as error:
        return str(error), None
    if best.keys == plan.keys and best.propagate == plan.propagate:
        return f"the plan is {name} already", None
    return name, best


def check_memory(engine: Engine, images: int, device: torch.device) -> None:
    """Raise SettingError if so many images at a time clearly need more memory than is free.

    Each may have more pixels than any model was trained with, and a CPU's system kills a process that has too little.
    """
    free, (height, width) = free_bytes(device), (engine.recipe.height, engine.recipe.width)
    if free is None or images * height * width <= SMALL_PIXELS:
        return
    # Of the lower precision, numbers have half the size.
    need = engine.sampling_bytes(images) // (2 if engine.autocast else 1)
    if need > free:
        raise SettingError(
            "batch_size",
            f"{images} image{'s' * (images > 1)} of {width} x {height} pixels at a time need at least "
            f"{need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; expected fewer or smaller images",
        )


def with_fixed_batches(engine: Engine, parallel: int | None, batch: int) -> Engine:
    """The engine with decoder batches that on a CPU go by the size of the latents alone, since last digits depend on
    them; unless so many decoder steps in one batch (`parallel`) are asked for."""
    if parallel is not None or engine.model.device.type != "cpu":
        return engine
    positions = batch * (1 if engine.recipe.scale == 1.0 else 2) * math.prod(engine.shape[1:])
    return engine.with_plan(replace(engine.plan, parallel=max(1, CPU_POSITIONS // positions)))


def with_batches(
    engine: Engine, parallel: int | None, batch: int, device: torch.device, processes: Processes = ALONE
) -> Engine:
    """The engine with decoder batches that are fast here and fit into memory.

    Args:
        parallel: most decoder steps in one batch, as asked for; None = to be chosen here.
        batch: most images at a time.
        processes: that share each batch, so they take as many times more.

    Raises:
        SettingError: what was asked for does not fit into the memory of a CPU.
    """
    plan = engine.plan
    if plan.plain or plan.parallel <= 1:
        return engine
    latents = batch * (1 if engine.recipe.scale == 1.0 else 2)  # that the UNet gets at one node
    each, free = engine.decoder_bytes(latents), free_bytes(device)
    fit = decoders_that_fit(free, each, engine.shared_bytes())
    fit = plan.num_nodes if fit is None else fit
    if parallel is None:
        if device.type == "cpu":
            fit = min(fit, FAST_POSITIONS // (latents * math.prod(engine.shape[1:])))
        fit = processes.size * processes.least(max(1, fit))
        if device.type == "cpu" and isinstance(plan, Plan) and not processes.several:
            return engine.with_plan(with_few_sizes(plan, min(fit, plan.num_nodes)))
        return engine.with_plan(replace(plan, parallel=fit))
    # A GPU that runs out of memory says so, and the batch is halved; a CPU's system kills the process.
    longest = max(len(part.nodes) for part in plan.batches()) if isinstance(plan, Plan) else plan.parallel
    share = -(-longest // processes.size)
    if device.type == "cpu" and share > max(1, fit):
        raise SettingError(
            "parallel",
            f"{share} decoder steps need about {share * each / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; "
            f"expected auto or at most {max(1, fit) * processes.size}",
        )
    return engine
