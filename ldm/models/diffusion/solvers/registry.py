"""Solvers by name: what a command line offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import NamedTuple

from torch import Tensor

from ldm.models.diffusion.ddim import DDIM, Noise
from ldm.models.diffusion.dpm_solver.rules import (
    PUBLISHED_BELOW,
    DPMMultistep,
    DPMSinglestep,
    singlestep_nodes,
    singlestep_orders,
    singlestep_spans,
)
from ldm.models.diffusion.loop import Rule
from ldm.models.diffusion.plms import PLMS, plms_nodes
from ldm.models.diffusion.schedule import (
    OF_DDIM,
    OF_DDPM,
    OF_DPM_SOLVER,
    OF_EULER,
    OF_LEARNED_VARIANCE,
    ONLY_KARRAS,
    ONLY_TRAILING,
    SKIP_TYPE_OF,
    Level,
    Levels,
    NoiseSchedule,
    Spacings,
    nodes_between,
)
from ldm.models.diffusion.solvers.ancestral import Ancestral, LearnedVariance
from ldm.models.diffusion.solvers.exponential import Predicts
from ldm.models.diffusion.solvers.heun import Heun, heun_nodes
from ldm.models.diffusion.solvers.unipc import UniPC

MakeRule = Callable[[Levels, float, Noise | None], Rule]


class Solver(NamedTuple):
    """Grids of noise levels and a rule on them.

    rule:      (levels, eta, noise) -> the rule.
    spacings:  where the steps can begin and end.
    spacing:   the spacing that is used unless another is asked for; None = the published one.
    takes_eta: whether the amount of fresh noise can be chosen.
    takes_variance: whether it needs the variance that the network predicts beside the noise.
    """

    rule: MakeRule
    spacings: Spacings
    spacing: str | None = None
    takes_eta: bool = False
    takes_variance: bool = False

    def chosen(self, spacing: str | None, timesteps_at: Sequence[int] | None) -> str | None:
        """The spacing of a run: the one asked for, else the solver's; None beside timesteps of one's own."""
        return spacing or (self.spacing if timesteps_at is None else None)


def _ddim(levels: Levels, eta: float, noise: Noise | None) -> DDIM:
    return DDIM(nodes_between(levels), eta, noise)


def _ancestral(levels: Levels, eta: float, noise: Noise | None) -> Ancestral:
    return Ancestral(nodes_between(levels), noise)


def _learned(levels: Levels, eta: float, noise: Noise | None) -> LearnedVariance:
    return LearnedVariance(nodes_between(levels), noise)


def _multistep(lower_order_below: float = inf, **settings: str | int) -> MakeRule:
    def rule(levels: Levels, eta: float, noise: Noise | None) -> DPMMultistep:
        return DPMMultistep(nodes_between(levels), lower_order_below=lower_order_below, **settings)

    return rule


def _singlestep(order: int, predicts: Predicts) -> Solver:
    """DPM-Solver with as many nodes in a step as its order; a grid of levels, one for each node."""

    def levels(alphas_cumprod: Tensor, steps: int, spacing: str) -> Levels:
        nodes, _ = singlestep_nodes(NoiseSchedule(alphas_cumprod), steps, order, SKIP_TYPE_OF[spacing])
        return (*(Level(node.t, node.abar) for node in nodes), Level(0, nodes[-1].abar_next))

    def rule(levels: Levels, eta: float, noise: Noise | None) -> DPMSinglestep:
        spans = singlestep_spans(singlestep_orders(len(levels) - 1, order))
        return DPMSinglestep(nodes_between(levels), predicts, spans=spans)

    names = sorted(SKIP_TYPE_OF, key=lambda name: name != "logsnr")  # the published one first
    return Solver(rule, Spacings({name: partial(levels, spacing=name) for name in names}))


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(_ddim, OF_DDIM, takes_eta=True),
    "plms": Solver(lambda levels, eta, noise: PLMS(plms_nodes(levels)), OF_DDIM),
    "ddpm": Solver(_ancestral, OF_DDPM),
    "ddpm-learned": Solver(_learned, OF_LEARNED_VARIANCE, takes_variance=True),
    "dpm-solver": Solver(_multistep(predicts="eps"), OF_DPM_SOLVER, "quad"),  # multistep of order 2, as dpm-solver++
    "dpm-solver++": Solver(_multistep(), OF_DPM_SOLVER, "quad"),
    "dpm-solver++2s": _singlestep(2, "x0"),
    "dpm-solver-3s": _singlestep(3, "eps"),  # steps are predictions, as in all solvers here; three make one step
    "dpm-solver++3m": Solver(_multistep(variant="taylor", order=3), OF_DPM_SOLVER, "quad"),
    "dpm-solver-published": Solver(_multistep(PUBLISHED_BELOW, predicts="eps"), OF_DPM_SOLVER),
    "dpm-solver++-published": Solver(_multistep(PUBLISHED_BELOW), OF_DPM_SOLVER),  # the published sampler class
    "dpm-solver++3m-published": Solver(_multistep(PUBLISHED_BELOW, variant="taylor", order=3), OF_DPM_SOLVER),
    "euler": Solver(_ddim, OF_EULER),  # Euler's step over noise_ratio is DDIM's
    "euler-trailing": Solver(_ddim, ONLY_TRAILING),  # as SDXL is published
    "euler-a": Solver(_ancestral, OF_EULER),
    "heun": Solver(lambda levels, eta, noise: Heun(heun_nodes(levels)), OF_EULER),
    "dpm++2m-karras": Solver(_multistep(), ONLY_KARRAS),
    "unipc": Solver(lambda levels, eta, noise: UniPC(nodes_between(levels)), OF_DPM_SOLVER, "quad"),
}


def levels_of(
    name: str, alphas_cumprod: Tensor, steps: int, spacing: str | None = None, timesteps_at: Sequence[int] | None = None
) -> Levels:
    """Where a solver's steps begin and end, noisiest first; ddim's published grid may have more steps than asked for.

    Args:
        name: one of SOLVERS.
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        steps, spacing, timesteps_at: see `Spacings.levels`; None and None = the solver's default spacing.

    Raises:
        ValueError: unknown name; steps, a spacing or timesteps that the solver does not take.
    """
    chosen = _named(name)
    spacing = chosen.chosen(spacing, timesteps_at)
    return chosen.spacings.levels(alphas_cumprod, steps, spacing, timesteps_at)


def solver(
    name: str,
    alphas_cumprod: Tensor,
    steps: int,
    eta: float = 0.0,
    noise: Noise | None = None,
    skip: int = 0,
    *,
    spacing: str | None = None,
    timesteps_at: Sequence[int] | None = None,
) -> Rule:
    """The update rule of a run.

    Args:
        name: one of SOLVERS.
        alphas_cumprod: alpha-bar of every training timestep, (T,).
        steps: requested steps; the rule's `nodes` are what a plan counts, and may be more.
        eta: 0 = deterministic, 1 = ancestral; only ddim has the choice.
        noise: (i, x) -> unit normal noise of node i, for eta > 0 and for ddpm, ddpm-learned and euler-a.
        skip: leave out so many steps at the noisy end, for a run that begins with an image brought to the
            noise level nodes[0].abar.
        spacing, timesteps_at: where the steps begin, see `levels_of`.

    Raises:
        ValueError: unknown name, or a value that the solver does not take.
    """
    chosen = _named(name)
    if eta and not chosen.takes_eta:
        raise ValueError(f"eta must be 0 for {name}, which has no choice of it; got {eta}")
    levels = levels_of(name, alphas_cumprod, steps, spacing, timesteps_at)
    if not 0 <= skip < len(levels) - 1:
        raise ValueError(f"skip must leave at least one of {len(levels) - 1} steps; got {skip}")
    return chosen.rule(levels[skip:], eta, noise)


def _named(name: str) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; got {name!r}")
    return SOLVERS[name]
