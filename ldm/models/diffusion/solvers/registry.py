"""Solvers by name: what a command line offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ldm.models.diffusion.ddim import DDIM, Noise
from ldm.models.diffusion.dpm_solver.rules import (
    DPMMultistep,
    DPMSinglestep,
    singlestep_nodes,
    singlestep_orders,
    singlestep_spans,
)
from ldm.models.diffusion.loop import Rule
from ldm.models.diffusion.plms import PLMS, plms_nodes
from ldm.models.diffusion.schedule import (
    CLEAN,
    Level,
    NoiseSchedule,
    ddim_levels,
    ddim_timesteps,
    karras_levels,
    nodes_between,
    sigma_levels,
)
from ldm.models.diffusion.solvers.ancestral import Ancestral
from ldm.models.diffusion.solvers.exponential import Predicts
from ldm.models.diffusion.solvers.heun import Heun, heun_nodes
from ldm.models.diffusion.solvers.unipc import UniPC

Levels = tuple[Level, ...]


class Solver(NamedTuple):
    """A grid of noise levels and a rule on it.

    levels:    (alphas_cumprod, steps) -> where the steps begin and end, noisiest first.
    rule:      (levels, eta, noise) -> the rule.
    takes_eta: whether the amount of fresh noise can be chosen.
    """

    levels: Callable[[Tensor, int], Levels]
    rule: Callable[[Levels, float, Noise | None], Rule]
    takes_eta: bool = False


def _ddim_levels(alphas_cumprod: Tensor, steps: int, end: Level | None = None) -> Levels:
    return ddim_levels(alphas_cumprod, ddim_timesteps(steps, len(alphas_cumprod)), end)


def _clean_ddim_levels(alphas_cumprod: Tensor, steps: int) -> Levels:
    return _ddim_levels(alphas_cumprod, steps, CLEAN)


def _time_levels(alphas_cumprod: Tensor, steps: int) -> Levels:
    return NoiseSchedule(alphas_cumprod).levels(steps)


def _ddim(levels: Levels, eta: float, noise: Noise | None) -> DDIM:
    return DDIM(nodes_between(levels), eta, noise)


def _ancestral(levels: Levels, eta: float, noise: Noise | None) -> Ancestral:
    return Ancestral(nodes_between(levels), noise)


def _dpm_solver_pp(levels: Levels, eta: float, noise: Noise | None) -> DPMMultistep:
    return DPMMultistep(nodes_between(levels))


def _singlestep(order: int, predicts: Predicts) -> Solver:
    """DPM-Solver with as many nodes in a step as its order; a grid of levels, one for each node."""

    def levels(alphas_cumprod: Tensor, steps: int) -> Levels:
        nodes, _ = singlestep_nodes(NoiseSchedule(alphas_cumprod), steps, order)
        return (*(Level(node.t, node.abar) for node in nodes), Level(0, nodes[-1].abar_next))

    def rule(levels: Levels, eta: float, noise: Noise | None) -> DPMSinglestep:
        spans = singlestep_spans(singlestep_orders(len(levels) - 1, order))
        return DPMSinglestep(nodes_between(levels), predicts, spans=spans)

    return Solver(levels, rule)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(_ddim_levels, _ddim, takes_eta=True),
    "plms": Solver(_ddim_levels, lambda levels, eta, noise: PLMS(plms_nodes(levels))),
    "ddpm": Solver(_clean_ddim_levels, _ancestral),
    "dpm-solver": Solver(  # multistep of order 2, as dpm-solver++, which is the published sampler class
        _time_levels, lambda levels, eta, noise: DPMMultistep(nodes_between(levels), predicts="eps")
    ),
    "dpm-solver++": Solver(_time_levels, _dpm_solver_pp),
    "dpm-solver++2s": _singlestep(2, "x0"),
    "dpm-solver-3s": _singlestep(3, "eps"),  # steps are predictions, as in all solvers here; three make one step
    "dpm-solver++3m": Solver(
        _time_levels, lambda levels, eta, noise: DPMMultistep(nodes_between(levels), variant="taylor", order=3)
    ),
    "euler": Solver(sigma_levels, _ddim),  # Euler's step over noise_ratio is DDIM's
    "euler-a": Solver(sigma_levels, _ancestral),
    "heun": Solver(sigma_levels, lambda levels, eta, noise: Heun(heun_nodes(levels))),
    "dpm++2m-karras": Solver(karras_levels, _dpm_solver_pp),
    "unipc": Solver(_time_levels, lambda levels, eta, noise: UniPC(nodes_between(levels))),
}


def num_steps(name: str, alphas_cumprod: Tensor, steps: int) -> int:
    """How many steps a solver makes of so many requested; ddim's grid may have more, see `ddim_timesteps`.

    Raises:
        ValueError: unknown name, or steps out of range.
    """
    return len(_named(name).levels(alphas_cumprod, steps)) - 1


def solver(
    name: str, alphas_cumprod: Tensor, steps: int, eta: float = 0.0, noise: Noise | None = None, skip: int = 0
) -> Rule:
    """The update rule of a run.

    Args:
        name: one of SOLVERS.
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        steps: requested steps; the rule's `nodes` are what a plan counts, and may be more.
        eta: 0 = deterministic, 1 = ancestral; only ddim has the choice.
        noise: (i, x) -> unit normal noise of node i, for eta > 0 and for ddpm and euler-a.
        skip: leave out so many steps at the noisy end, for a run that begins with an image brought to the
            noise level nodes[0].abar.

    Raises:
        ValueError: unknown name, or a value that the solver does not take.
    """
    chosen = _named(name)
    if eta and not chosen.takes_eta:
        raise ValueError(f"eta must be 0 for {name}, which has no choice of it; got {eta}")
    levels = chosen.levels(alphas_cumprod, steps)
    if not 0 <= skip < len(levels) - 1:
        raise ValueError(f"skip must leave at least one of {len(levels) - 1} steps; got {skip}")
    return chosen.rule(levels[skip:], eta, noise)


def _named(name: str) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {name!r}")
    return SOLVERS[name]
