"""How the pictures of a run are sampled: solver, steps, guidance, plan, decoder batches."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.cli.arguments import NOISE_WEIGHT
from ldm.cli.setup import Setup
from ldm.io.errors import BadInput, blame, did_you_mean

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    import torch

    from ldm.models.diffusion.propagation.load import RunFacts
    from ldm.models.diffusion.propagation.plan import AnyPlan
    from ldm.sampling.engine import Engine, Recipe

PUBLISHED_SAMPLERS = {"plms": "plms", "dpm": "dpm-solver++"}
CPU_POSITIONS = 16384  # latent positions in one decoder batch of an evaluation on a CPU; last digits depend on it
# The same of the scripts: as many predictions as gain by sharing a batch, 48 of 8 x 8 latents. More take memory only.
FAST_POSITIONS = 3072


def make_recipe(args: argparse.Namespace, size: tuple[int, int], setup: Setup | None = None) -> Recipe:
    """How pictures of this height and width are sampled.

    setup: whose config has a scale, where args has none.
    """
    from ldm.models.diffusion.solvers.registry import SOLVERS
    from ldm.sampling.engine import Recipe, usual_scale

    sampler, eta = sampler_name(args), args.eta
    if eta is None:
        eta = args.default_eta if SOLVERS[sampler].takes_eta else 0.0
    elif eta and not SOLVERS[sampler].takes_eta:
        raise BadInput(
            f"{args.eta_flag}: {sampler} has no choice of it; expected 0, or a sampler that has: "
            f"{', '.join(name for name, solver in SOLVERS.items() if solver.takes_eta)}; got {eta:g}"
        )
    weight = args.noise_weight
    if weight is None:
        weight = 0.0 if args.plan == "off" else NOISE_WEIGHT
    scale = usual_scale(setup.config) if args.scale is None else args.scale
    recipe = Recipe(
        *size,
        sampler,
        args.steps,
        eta,
        scale,
        args.guidance_interval,
        args.guidance_reuse,
        args.tome,
        weight,
        args.noise_below,
        args.noise_order,
    )
    with blame("--guidance-interval"):
        _ = recipe.guidance  # checks it
    return recipe


def sampler_name(args: argparse.Namespace) -> str:
    from ldm.models.diffusion.solvers.registry import SOLVERS

    flag, name = "--sampler", args.sampler
    for published, meant in PUBLISHED_SAMPLERS.items():
        if getattr(args, published):
            flag, name = f"--{published}", meant
    if name not in SOLVERS:
        raise BadInput(
            f"{flag}: there is no solver {name!r}; accepted: {', '.join(SOLVERS)}{did_you_mean(name, SOLVERS)}"
        )
    return name


def count_nodes(recipe: Recipe, setup: Setup, strength: float = 1.0) -> int:
    """How many predictions a run of the last `strength` (0..1) of the steps makes, which is what its plan counts."""
    from ldm.sampling.engine import num_nodes

    timesteps = setup.config.model.params.get("timesteps", 1000)
    with blame("--steps"):
        num_nodes(recipe, timesteps)
    with blame("--strength"):
        return num_nodes(recipe, timesteps, strength)


def uses_autocast(args: argparse.Namespace, device: torch.device) -> bool:
    """Whether the networks run in the device's lower precision, from --precision."""
    return (args.precision or ("autocast" if device.type == "cuda" else "full")) == "autocast"


def run_facts(setup: Setup, sampler: str) -> RunFacts:
    """What plans and calibrations may have been made for."""
    from ldm.checkpoint import fingerprint
    from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of

    return RunFacts({"sampler": sampler, "weights": fingerprint(setup.ckpt)[:16]}, calibrations_of(setup.ckpt))


def make_plan(args: argparse.Namespace, nodes: int, run: RunFacts) -> AnyPlan:
    """The run's plan, with all decoders that can share a batch in one where --parallel is auto.

    See `with_batches` for what a run makes of that.
    """
    from ldm.models.diffusion.propagation.load import load_plan

    with blame("--plan"):
        plan = load_plan(args.plan, nodes, args.parallel or nodes, args.propagate, run)
    if args.compare and plan.plain and not args.tome:
        raise BadInput(
            f"--plan: {args.plan} skips no encoder, so --compare has nothing to compare; "
            f"expected a plan such as faster-diffusion, or --tome"
        )
    if args.guidance_reuse and args.scale != 1.0 and (plan.shallow or plan.refresh):
        raise BadInput(
            f"--guidance-reuse: between key steps it needs the whole decoder and nothing more; {args.plan} "
            f"has shallow or refreshed steps"
        )
    return plan


def best_plan(plan: AnyPlan, nodes: int, run: RunFacts) -> tuple[str, AnyPlan | None]:
    """The name of the calibrated plan at the cost of another, and the plan; or why there is none, and None."""
    from ldm.models.diffusion.propagation.load import load_plan
    from ldm.models.diffusion.propagation.plan import Plan

    if plan.plain:
        return "the plan skips no encoder", None
    if not isinstance(plan, Plan) or plan.shallow or plan.refresh:
        return "calibration chooses key steps alone, and this plan has other steps or decides as it runs", None
    name = f"auto:{len(plan.keys)}"
    try:
        best = load_plan(name, nodes, nodes, run=run)
    except ValueError as error:
        return str(error), None
    if best.keys == plan.keys and best.propagate == plan.propagate:
        return f"the plan is {name} already", None
    return name, best


def with_batches(engine: Engine, parallel: int | None, batch: int, setup: Setup) -> AnyPlan:
    """The engine's plan with decoder batches that are fast here and fit into memory.

    Args:
        parallel: --parallel; None = auto.
        batch: most pictures at a time.

    Several processes share each batch, so they take as many times more.
    """
    from ldm.models.diffusion.propagation.plan import Plan, with_few_sizes
    from ldm.profiling.memory import decoders_that_fit, free_bytes

    latents = batch * (1 if engine.recipe.scale == 1.0 else 2)  # that the UNet gets at one node
    each = engine.decoder_bytes(latents)
    plan, processes, free = engine.plan, setup.processes, free_bytes(setup.device)
    fit = decoders_that_fit(free, each)
    fit = plan.num_nodes if fit is None else fit
    if parallel is None:
        if setup.device.type == "cpu":
            fit = min(fit, FAST_POSITIONS // (latents * math.prod(engine.shape[1:])))
        fit = processes.size * processes.least(max(1, fit))
        if setup.device.type == "cpu" and isinstance(plan, Plan) and not processes.several:
            return with_few_sizes(plan, min(fit, plan.num_nodes))
        return replace(plan, parallel=fit)
    # A GPU that runs out of memory says so, and the batch is halved; a CPU's system kills the process.
    longest = max(len(batch.nodes) for batch in plan.batches()) if isinstance(plan, Plan) else plan.parallel
    share = -(-longest // processes.size)
    if setup.device.type == "cpu" and share > max(1, fit):
        raise BadInput(
            f"--parallel: {share} decoder steps need about {share * each / 1e6:.0f} MB, {free / 1e6:.0f} MB "
            f"are free; expected auto or at most {max(1, fit) * processes.size}"
        )
    return plan
