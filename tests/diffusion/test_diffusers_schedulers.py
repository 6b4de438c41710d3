"""Solvers against the schedulers of the diffusers library: whole runs of one nonlinear network, node by node.

diffusers keeps its noise levels, and some of its schedulers the latents of a step, in float32: no more than that
rounding may lie between two runs. Our rules run on its levels; our own levels are held to them beside that. Both
runs begin from the same latents: with 'linspace' the pipelines of diffusers begin from sigma / sqrt(1 + sigma^2)
times the noise (0.998 for Stable Diffusion), ours from the noise, as CompVis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import Noise
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.dpm_solver.rules import PUBLISHED_BELOW, DPMMultistep
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import Level, nodes_between, noise_ratio
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.models.diffusion.solvers.unipc import UniPC
from tests.helpers.toy import ABAR, toy_denoiser, toy_inputs, toy_network

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

BETAS = (1 - ABAR / torch.cat([torch.ones_like(ABAR[:1]), ABAR[:-1]])).tolist()
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}

# Timesteps 999 .. 0, then clean.
SIGMAS = {"timestep_spacing": "linspace", "steps_offset": 0}
EULER = {**SIGMAS, "interpolation_type": "linear", "use_karras_sigmas": False, "final_sigmas_type": "zero"}
HEUN = {**SIGMAS, "use_karras_sigmas": False, "clip_sample": False}
# Timesteps 999 .. 0, rounded; the last step lands on 0.
TIMES = {
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "use_karras_sigmas": False,
    "final_sigmas_type": "sigma_min",
    "lower_order_final": True,
    "thresholding": False,
}
KARRAS = {**TIMES, "use_karras_sigmas": True, "final_sigmas_type": "zero"}
# 'midpoint' is our variant 'dpmsolver', 'heun' is 'taylor'; of order 3 diffusers has the former only.
MULTISTEP = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
UNIPC = {**TIMES, "solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []}


class Pair(NamedTuple):
    """A scheduler of diffusers with the options that make it our rule."""

    kind: str
    options: dict[str, Any]
    rule: Callable[[tuple[Level, ...], Noise], Rule]

    def scheduler(self, steps: int, parameterization: str = "eps") -> Any:
        theirs = getattr(diffusers, f"{self.kind}Scheduler")(
            trained_betas=BETAS, prediction_type=PREDICTION_TYPES[parameterization], **self.options
        )
        assert self.options.items() <= dict(theirs.config).items()  # it ignores an option that it does not know
        theirs.set_timesteps(steps)
        return theirs


def named(name: str) -> Callable[[tuple[Level, ...], Noise], Rule]:
    return lambda levels, noise: SOLVERS[name].rule(levels, 0.0, noise)


def multistep(**settings) -> Callable[[tuple[Level, ...], Noise], Rule]:
    return lambda levels, noise: DPMMultistep(nodes_between(levels), lower_order_below=PUBLISHED_BELOW, **settings)


def unipc(**settings) -> Callable[[tuple[Level, ...], Noise], Rule]:
    return lambda levels, noise: UniPC(nodes_between(levels), **settings)


SOLVER_PAIRS = {
    "euler": Pair("EulerDiscrete", EULER, named("euler")),
    "euler-a": Pair("EulerAncestralDiscrete", SIGMAS, named("euler-a")),
    "heun": Pair("HeunDiscrete", HEUN, named("heun")),
    "dpm-solver++-published": Pair("DPMSolverMultistep", {**TIMES, **MULTISTEP}, named("dpm-solver++-published")),
    "dpm++2m-karras": Pair("DPMSolverMultistep", {**KARRAS, **MULTISTEP}, named("dpm++2m-karras")),
    "unipc": Pair("UniPCMultistep", UNIPC, named("unipc")),
}
SETTINGS = {
    "multistep 2 eps": Pair(
        "DPMSolverMultistep", {**TIMES, **MULTISTEP, "algorithm_type": "dpmsolver"}, multistep(predicts="eps")
    ),
    "multistep 2 taylor": Pair(
        "DPMSolverMultistep", {**TIMES, **MULTISTEP, "solver_type": "heun"}, multistep(variant="taylor")
    ),
    "multistep 3": Pair("DPMSolverMultistep", {**TIMES, **MULTISTEP, "solver_order": 3}, multistep(order=3)),
    "unipc 1": Pair("UniPCMultistep", {**UNIPC, "solver_order": 1}, unipc(order=1)),
    "unipc 3": Pair("UniPCMultistep", {**UNIPC, "solver_order": 3}, unipc(order=3)),
    "unipc 3 eps": Pair(
        "UniPCMultistep", {**UNIPC, "solver_order": 3, "predict_x0": False}, unipc(order=3, predicts="eps")
    ),
}


def levels_of(scheduler: Any) -> tuple[Level, ...]:
    """Where its steps begin and end; Heun's lists have every inner level twice."""
    ts, sigmas = [*scheduler.timesteps.tolist(), 0], scheduler.sigmas.tolist()
    if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        ts, sigmas = [ts[0], *ts[1::2]], [sigmas[0], *sigmas[1::2]]
    return tuple(Level(t, 1 / (1 + sigma**2)) for t, sigma in zip(ts, sigmas, strict=True))


def their_run(scheduler: Any, denoiser: Denoiser, x: Tensor) -> list[Tensor]:
    """The latents after every call of the network, divided by their scale where they are x / alpha."""
    exploding = scheduler.init_noise_sigma != 1
    sigmas = scheduler.sigmas.double()
    scales = (1 + sigmas**2).sqrt() if exploding else torch.ones_like(sigmas)
    x, states = scales[0] * x, []
    for t, scale in zip(scheduler.timesteps, scales[1:], strict=True):
        features = denoiser.encode(scheduler.scale_model_input(x, t), float(t))
        (prediction,) = denoiser.decode([features], [float(t)])
        x = scheduler.step(prediction.out, t, x).prev_sample
        states.append(x / scale)
    return states


@pytest.mark.parametrize("parameterization", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [10, 25])  # below 15 the last steps of some are of lower order
@pytest.mark.parametrize("name", [*SOLVER_PAIRS, *SETTINGS])
def test_the_runs_of_diffusers(name, steps, parameterization):
    pair = {**SOLVER_PAIRS, **SETTINGS}[name]
    x, cond, uncond = toy_inputs(2)
    denoiser = toy_denoiser(toy_network(), cond, uncond, 2.0, parameterization)
    scheduler = pair.scheduler(steps, parameterization)
    rule = pair.rule(levels_of(scheduler), lambda i, x: torch.randn_like(x))
    torch.manual_seed(11)
    theirs = torch.stack(their_run(scheduler, denoiser, x))
    torch.manual_seed(11)
    ours = torch.stack([state.x for state in denoise(denoiser, rule, load_plan("off", len(rule.nodes)), x)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


# UniPC and DPM-Solver++ have timesteps between the trained ones, which diffusers rounds: at 9 and 27 steps all are
# whole. Of Karras levels it rounds the timestep that the network is told, but not the level. In a single step of
# Euler or Heun it begins at timestep 0, we at 999.
@pytest.mark.parametrize(
    "name, counts, off_by",
    [
        ("euler", (2, 10, 25), 1e-4),
        ("euler-a", (2, 10, 25), 1e-4),
        ("heun", (2, 10, 25), 1e-4),
        ("dpm-solver++-published", (1, 9, 27), 1e-9),
        ("unipc", (1, 9, 27), 1e-9),
        ("dpm++2m-karras", (10, 25), 0.5),
    ],
)
def test_the_levels_of_diffusers(name, counts, off_by):
    for steps in counts:
        ours, theirs = SOLVERS[name].spacings.levels(ABAR, steps), levels_of(SOLVER_PAIRS[name].scheduler(steps))
        assert [level.t for level in ours] == pytest.approx([level.t for level in theirs], abs=off_by)
        assert [noise_ratio(level.abar) for level in ours] == pytest.approx(
            [noise_ratio(level.abar) for level in theirs], rel=5e-5
        )
