"""Every rule on data that is Gaussian, where the optimal prediction and the ODE's solution are formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from math import log, log2, sqrt

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.dpm_solver.rules import DPMMultistep, DPMSinglestep, singlestep_nodes
from ldm.models.diffusion.loop import Rule, State
from ldm.models.diffusion.plms import PLMS, plms_nodes
from ldm.models.diffusion.schedule import (
    CLEAN,
    Level,
    Node,
    NoiseSchedule,
    ddim_levels,
    ddim_timesteps,
    karras_levels,
    nodes_between,
    noise_ratio,
    sigma_levels,
)
from ldm.models.diffusion.solvers.ancestral import Ancestral
from ldm.models.diffusion.solvers.heun import Heun, heun_nodes
from ldm.models.diffusion.solvers.registry import SOLVERS, solver
from ldm.models.diffusion.solvers.unipc import UniPC
from tests.helpers.toy import ABAR

MEAN, STD = 0.7, 0.4
SCHEDULE = NoiseSchedule(ABAR)


def spread(abar: float) -> float:
    """Standard deviation of the latents at a level."""
    return sqrt(abar * STD**2 + 1 - abar)


def optimal_eps(x: Tensor, node: Node) -> Tensor:
    return sqrt(1 - node.abar) * (x - sqrt(node.abar) * MEAN) / spread(node.abar) ** 2


def exact(x: Tensor, abar: float, abar_next: float) -> Tensor:
    """The sampling ODE's solution: latents keep their number of standard deviations from the mean."""
    return sqrt(abar_next) * MEAN + spread(abar_next) / spread(abar) * (x - sqrt(abar) * MEAN)


def run(rule: Rule, x: Tensor, exact_steps: int = 0) -> Tensor:
    """The sample of a run whose first steps are replaced by the exact ones."""
    begin, state = rule.nodes[0].abar, State(x)
    for i, node in enumerate(rule.nodes):
        state = rule.step(state, i, optimal_eps(state.x, node))
        if i < exact_steps:
            state = replace(state, x=exact(x, begin, node.abar_next))
    return state.x


def levels(steps: int) -> tuple[Level, ...]:
    """Well inside the trained range, where steps of equal time are small in every measure."""
    return tuple(map(SCHEDULE.level, SCHEDULE.times(steps, begin=0.9, end=0.4)))


def multistep(steps: int, **settings) -> DPMMultistep:
    return DPMMultistep(nodes_between(levels(steps)), lower_order_below=0, **settings)


def singlestep(steps: int, order: int, skip_type: str = "logSNR", **settings) -> DPMSinglestep:
    nodes, spans = singlestep_nodes(SCHEDULE, steps, order, skip_type, fixed=True)
    return DPMSinglestep(nodes, spans=spans, **settings)


def unipc(steps: int, **settings) -> UniPC:
    return UniPC(nodes_between(levels(steps)), lower_order_final=False, **settings)


BOTH = ("eps", "x0")
VARIANTS = ("dpmsolver", "taylor")
# name: (rule of a number of steps, its order, first steps that are made exact because theirs is lower)
ORDERS: dict[str, tuple[Callable[[int], Rule], int, int]] = {
    "ddim": (lambda n: DDIM(nodes_between(levels(n))), 1, 0),
    "plms": (lambda n: PLMS(plms_nodes(levels(n))), 2, 0),
    "heun": (lambda n: Heun(heun_nodes(levels(n))), 2, 0),
    **{
        f"multistep {k} {p} {v}": (partial(multistep, order=k, predicts=p, variant=v), k, k - 1)
        for k, p, v in product((1, 2, 3), BOTH, VARIANTS)
        if (k, v) != (3, "dpmsolver")
    },
    **{
        f"singlestep {k} {p} {v}": (partial(singlestep, order=k, predicts=p, variant=v), k, 0)
        for k, p, v in product((1, 2, 3), BOTH, VARIANTS)
    },
    # One more than the predictor's order; at 3 the first step's error is what remains.
    **{f"unipc {k} {p}": (partial(unipc, order=k, predicts=p), min(k + 1, 3), 0) for k, p in product((1, 2, 3), BOTH)},
}


def measured_order(build: Callable[[int], Rule], exact_steps: int) -> float:
    """How fast the error falls from 96 to 192 steps."""
    x = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64)
    errors = []
    for rule in (build(96), build(192)):
        expected = exact(x, rule.nodes[0].abar, rule.nodes[-1].abar_next)
        errors.append(float((run(rule, x, exact_steps) - expected).abs().max()))
    return log2(errors[0] / errors[1])


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name):
    build, order, exact_steps = ORDERS[name]
    assert measured_order(build, exact_steps) > order - 0.2


@pytest.mark.parametrize("predicts", BOTH)
def test_published_third_order_multistep_is_of_second_order(predicts):
    assert 1.8 < measured_order(partial(multistep, order=3, predicts=predicts), 2) < 2.2


def unit_noise(i: int, x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=x.dtype)


@pytest.mark.parametrize(
    "rule",
    [
        Ancestral(nodes_between(ddim_levels(ABAR, ddim_timesteps(500), CLEAN)), unit_noise),
        Ancestral(nodes_between(sigma_levels(ABAR, 500)), unit_noise),
        DDIM(nodes_between(ddim_levels(ABAR, ddim_timesteps(500))), 1.0, unit_noise),
        DDIM(nodes_between(ddim_levels(ABAR, ddim_timesteps(500))), 0.5, unit_noise),
    ],
    ids=["ddpm", "euler-a", "ddim eta 1", "ddim eta 0.5"],
)
def test_stochastic_rules_sample_the_data(rule):
    begin = rule.nodes[0].abar
    x = sqrt(begin) * MEAN + spread(begin) * unit_noise(10_000, torch.empty(50_000, dtype=torch.float64))
    samples = run(rule, x)
    assert abs(float(samples.mean()) - MEAN) < 0.01
    assert abs(float(samples.std()) / STD - 1) < 0.03


def distribution(rule_of: Callable[[Callable[[int, Tensor], Tensor]], Rule]) -> tuple[float, float]:
    """Mean and standard deviation of the samples, without drawing any: on Gaussian data the sample is a linear
    function of the starting latents and of each node's noise.

    Args:
        rule_of: the rule with a source of noise.
    """

    def sample(start: float, noisy: int = -1) -> float:
        noise = lambda i, x: torch.full_like(x, float(i == noisy))  # noqa: E731
        return float(run(rule_of(noise), torch.tensor([start], dtype=torch.float64)))

    nodes = len(rule_of(unit_noise).nodes)
    begin = rule_of(unit_noise).nodes[0].abar
    mean = sample(sqrt(begin) * MEAN)
    shares = [sample(sqrt(begin) * MEAN + spread(begin)) - mean]
    shares += [sample(sqrt(begin) * MEAN, i) - mean for i in range(nodes)]
    return mean, sqrt(sum(share**2 for share in shares))


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("euler-a", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_more_steps_of_a_stochastic_rule_come_closer_to_the_distribution_of_the_data(name, eta):
    """A single image has no fine run to come closer to: another number of steps draws other noise."""
    errors = []
    for steps in (5, 10, 20, 50):
        mean, std = distribution(lambda noise, steps=steps: solver(name, ABAR, steps, eta, noise))
        end = 1.0 if SOLVERS[name].spacings.clean else float(ABAR[0])
        errors.append(max(abs(mean - sqrt(end) * MEAN), abs(std - spread(end))))
    assert all(after < before / 1.3 for before, after in pairwise(errors)), errors


def test_ancestral_is_ddim_with_eta_1():
    nodes = nodes_between(sigma_levels(ABAR, 20))
    x = unit_noise(99, torch.empty(8, dtype=torch.float64))
    expected = run(DDIM(nodes, 1.0, unit_noise), x)
    torch.testing.assert_close(run(Ancestral(nodes, unit_noise), x), expected, rtol=0, atol=1e-12)


def euler(sigma, down, x, denoised, memory, again):
    return x + (down - sigma) * (x - denoised) / sigma


def heun(sigma, down, x, denoised, memory, again):
    slope = (x - denoised) / sigma
    trial = x + (down - sigma) * slope
    return trial if down == 0 else x + (down - sigma) * (slope + (trial - again(trial, down)) / down) / 2


def dpmpp_2m(sigma, down, x, denoised, memory, again):
    if not memory or down == 0:
        return down / sigma * x + (1 - down / sigma) * denoised
    before, denoised_before = memory[-1]
    ratio = 2 * log(before / sigma) / log(sigma / down)
    return down / sigma * x + (1 - down / sigma) * ((1 + 1 / ratio) * denoised - denoised_before / ratio)


@pytest.mark.parametrize(
    "name, update, ancestral",
    [("euler", euler, False), ("euler-a", euler, True), ("heun", heun, False), ("dpm++2m-karras", dpmpp_2m, False)],
)
def test_rules_are_those_of_the_variance_exploding_literature(name, update, ancestral):
    """Their formulas are for x / alpha over sigma, the noise in it."""

    def denoised(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * optimal_eps(x / sqrt(1 + sigma**2), Node(0, 1 / (1 + sigma**2), 1.0))

    grid = karras_levels(ABAR, 12) if "karras" in name else sigma_levels(ABAR, 12)
    sigmas = [noise_ratio(level.abar) for level in grid]
    start = unit_noise(99, torch.empty(8, dtype=torch.float64))
    x, memory = sigmas[0] * start, []
    for i, (sigma, landing) in enumerate(pairwise(sigmas)):
        up = sqrt(landing**2 * (sigma**2 - landing**2) / sigma**2) if ancestral else 0.0
        clean = denoised(x, sigma)
        x = update(sigma, sqrt(landing**2 - up**2), x, clean, memory, denoised) + up * unit_noise(i, x)
        memory.append((sigma, clean))
    rule = solver(name, ABAR, 12, noise=unit_noise)
    actual = run(rule, sqrt(rule.nodes[0].abar) * sigmas[0] * start)
    torch.testing.assert_close(actual, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_karras_grid(steps):
    grid = karras_levels(ABAR, steps)
    roots = torch.tensor([noise_ratio(level.abar) ** (1 / 7) for level in grid[:-1]], dtype=torch.float64)
    assert len(grid) == steps + 1 and grid[-1] == CLEAN
    assert grid[0].t == 999 and grid[0].abar == pytest.approx(float(ABAR[-1]))
    if steps > 1:
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(steps - 1))
        assert grid[-2].t == pytest.approx(0, abs=1e-9) and grid[-2].abar == pytest.approx(float(ABAR[0]))


def test_sigma_grid_goes_through_the_trained_levels():
    for t, abar in sigma_levels(ABAR, 1000)[:-1]:
        assert abar == pytest.approx(float(ABAR[round(t)]))


@pytest.mark.parametrize(
    "rule",
    [PLMS(plms_nodes(levels(6))), Heun(heun_nodes(levels(6))), singlestep(9, 3, predicts="eps")],
    ids=["plms", "heun", "singlestep"],
)
def test_an_edit_inside_a_step_stays_in_the_latents(rule):
    """Where no noise is predicted, latents and what is added to them only scale with alpha."""
    for edited, node in enumerate(rule.nodes):
        state = State(torch.zeros(1, dtype=torch.float64))
        for i in range(len(rule.nodes)):
            if i == edited:
                state = replace(state, x=state.x + 1)
            state = rule.step(state, i, torch.zeros_like(state.x))
        assert float(state.x) == pytest.approx(sqrt(rule.nodes[-1].abar_next / node.abar))
