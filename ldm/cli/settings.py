"""How the images of a run are sampled: solver, steps, guidance, plan, decoder batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ldm.checkpoint import fingerprint
from ldm.cli.arguments import NOISE_WEIGHT
from ldm.cli.setup import ALONE, Processes, Setup
from ldm.io.errors import SettingError, did_you_mean, fault_of
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of, level_of, load_plan
from ldm.models.diffusion.propagation.plan import LEVELS, AnyPlan, Compute, Plan, with_few_sizes
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.profiling.cost import decoders_that_fit, free_bytes
from ldm.sampling.engine import Engine, Recipe, num_nodes, usual_scale

CPU_POSITIONS = 16384  # latent positions in one decoder batch of an evaluation on a CPU; last digits depend on it
# The same of the scripts: as many predictions as gain by sharing a batch, 48 of 8 x 8 latents. More take memory only.
FAST_POSITIONS = 3072
SMALL_PIXELS = 2**18  # at a time, one image of 512 x 512: always fit, so nothing is counted


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled; see `ldm.cli.arguments`.

    eta: None = default_eta, where the solver has a choice of it.
    scale: None = what the model's config recommends.
    plan, propagate: as `load_plan` takes them.
    error_budget: largest relative error of a forecast, see `BudgetPlan`; None = any.
    parallel: most decoder steps in one batch; None = as many as are fast and fit into memory.
    noise_weight: of prior noise injection; None = usual with a plan that skips encoders and not whole predictions.
    spacing: of the steps; None = the solver's default, or none with timesteps_at.
    timesteps_at: where the steps begin, in place of steps and spacing; other steps than the default must agree.
    """

    sampler: str = "ddim"
    steps: int | None = 50
    eta: float | None = None
    default_eta: float | None = 0.0
    scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: bool | str = False
    plan: str = "off"
    propagate: str | None = None
    error_budget: float | None = None
    parallel: int | None = None
    tome: float = 0.0
    noise_weight: float | None = None
    noise_below: float = 500.0
    noise_order: str = "before"
    spacing: str | None = None
    timesteps_at: tuple[int, ...] | None = None
    default_steps: int | None = 50


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
            weight = 0.0 if settings.plan == "off" or level_of(settings.plan) == "skip" else NOISE_WEIGHT
    recipe = Recipe(
        *size,
        sampler,
        _steps(settings),
        _eta(settings),
        usual_scale(config or {}) if settings.scale is None else settings.scale,
        settings.guidance_interval,
        settings.guidance_reuse,
        settings.tome,
        weight,
        settings.noise_below,
        settings.noise_order,
        settings.spacing,
        settings.timesteps_at,
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


def run_facts(setup: Setup, sampler: str, more: Mapping[str, Any] = MappingProxyType({})) -> RunFacts:
    """What plans and calibrations may have been made for; more: see `Recipe.facts`."""
    weights = fingerprint(setup.ckpt)[:16]
    return RunFacts({"sampler": sampler, "weights": weights, **more}, calibrations_of(setup.ckpt))


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
