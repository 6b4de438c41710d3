"""PLMS, DPM-Solver and ancestral sampling against recorded runs of the published code."""

from __future__ import annotations

import inspect
from dataclasses import replace
from math import inf

import pytest
import torch

from ldm.models.diffusion.ddim import DDIM, DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.rules import (
    PUBLISHED_BELOW,
    DPMMultistep,
    DPMSinglestep,
    singlestep_nodes,
    singlestep_orders,
)
from ldm.models.diffusion.loop import Rule, State, denoise, prior_noise
from ldm.models.diffusion.plms import PLMS, PLMSSampler, plms_nodes
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import (
    SKIP_TYPES,
    Node,
    NoiseSchedule,
    ddim_levels,
    ddim_nodes,
    ddim_timesteps,
    diffuse,
    log_snr,
    nodes_between,
    noise_ratio,
    predict_x0,
)
from ldm.models.diffusion.solvers.ancestral import Ancestral
from ldm.models.diffusion.solvers.registry import solver
from tests.helpers.golden_sampler import SHAPE, model
from tests.helpers.goldens import assert_golden, load_case

DPM_RULES = ["ms2_eps", "ms2_x0", "ms2_x0_taylor", "ms3_eps", "ms3_x0", "ss2_x0", "ssfixed2_eps", "ssfixed3_eps"]


def sample(sampler, case, tensors, **kwargs):
    return sampler.sample(
        case["S"],
        2,
        SHAPE,
        tensors["c"],
        x_T=tensors["x_T"],
        verbose=False,
        unconditional_guidance_scale=case["cfg_scale"],
        unconditional_conditioning=tensors["uc"],
        **kwargs,
    )


def recorded_rule(case) -> Rule:
    if case.get("sampler") == "PLMSSampler":
        return PLMS(plms_nodes(ddim_levels(model().alphas_cumprod, ddim_timesteps(case["S"]))))
    if case.get("sampler") == "DDIMSampler":
        return DDIM(ddim_nodes(model().alphas_cumprod, ddim_timesteps(case["S"])))
    schedule = NoiseSchedule(model().alphas_cumprod)
    predicts = "x0" if case["predict_x0"] else "eps"
    variant = case.get("solver_type", "dpmsolver")
    if case["method"] == "multistep":
        levels = schedule.levels(case["S"], case["skip_type"])
        return DPMMultistep(nodes_between(levels), predicts, variant, case["order"], PUBLISHED_BELOW)
    fixed = case["method"] == "singlestep_fixed"
    nodes, spans = singlestep_nodes(schedule, case["S"], case["order"], case["skip_type"], fixed)
    return DPMSinglestep(nodes, predicts, variant, spans=spans)


def test_published_plms():
    case, tensors = load_case("sampler_plms_S50_cfg7.5")
    latents, actual = sample(PLMSSampler(model()), case, tensors, log_every_t=10)
    assert_golden(latents, tensors["final"], case)
    for name in ("x_inter", "pred_x0"):  # entry 1 is here of node 0, in the published code of the first step
        assert_golden(torch.stack(actual[name])[[0, 2, 3, 4, 5, 6]], tensors[name][[0, 2, 3, 4, 5, 6]], case)
    rule = recorded_rule(case)
    assert [node.t for node in rule.nodes] == tensors["model_timesteps"].tolist()
    denoiser = model().denoiser(tensors["c"], tensors["uc"], case["cfg_scale"])
    states = denoise(denoiser, rule, load_plan("off", 51), tensors["x_T"])
    _, first = next(states), next(states)
    assert_golden(first.x, tensors["x_inter"][1], case)
    assert_golden(first.x0, tensors["pred_x0"][1], case)


@pytest.mark.parametrize("name", ["default", "vpred"])
def test_published_dpm_sampler(name):
    case, tensors = load_case(f"sampler_dpm_{name}")
    latents, _ = sample(DPMSolverSampler(model(case.get("parameterization", "eps"))), case, tensors)
    assert_golden(latents, tensors["final"], case)


@pytest.mark.parametrize("name", DPM_RULES)
def test_published_dpm_rules(name):
    case, tensors = load_case(f"sampler_dpm_{name}")
    rule = recorded_rule(case)
    torch.testing.assert_close(torch.tensor([n.t for n in rule.nodes]), tensors["unet_t"], rtol=1e-5, atol=1e-3)
    denoiser = model().denoiser(tensors["c"], tensors["uc"], case["cfg_scale"])
    states = list(denoise(denoiser, rule, load_plan("off", len(rule.nodes)), tensors["x_T"]))
    latents = [tensors["x_T"], *(state.x for state in states)]
    at_calls = torch.stack([latents[i] for i in tensors["x_at_calls_idx"]])
    assert_golden(at_calls, tensors["x_at_calls"], case)
    assert_golden(latents[-1], tensors["final"], case)


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_ms2_x0", "dpm_ms3_eps", "dpm_ss2_x0"])
def test_published_samples_of_a_network_that_depends_on_the_time(name):
    case, tensors = load_case(f"sampler_time_{name}")
    rule = recorded_rule(case)
    torch.testing.assert_close(torch.tensor([float(n.t) for n in rule.nodes]), tensors["unet_t"], rtol=1e-5, atol=1e-3)
    timed = model(network="sampler_time_dpm_ms2_x0")
    denoiser = timed.denoiser(tensors["c"], tensors["uc"], case["cfg_scale"])
    *_, last = denoise(denoiser, rule, load_plan("off", len(rule.nodes)), tensors["x_T"])
    assert_golden(last.x, tensors["final"], case)
    sampler = {"ddim": DDIMSampler, "plms": PLMSSampler}.get(name)
    if sampler:
        assert_golden(sample(sampler(timed), case, tensors)[0], tensors["final"], case)


def test_published_noise_schedule():
    case, tensors = load_case("dpm_noise_schedule")
    schedule = NoiseSchedule(tensors["alphas_cumprod"])
    abars = [schedule.level(float(time)).abar for time in tensors["t"]]
    lambdas = [log_snr(abar) for abar in abars]
    abar = torch.tensor(abars)
    assert_golden(abar.log() / 2, tensors["log_alpha"], case)
    assert_golden(abar.sqrt(), tensors["alpha"], case)
    assert_golden((1 - abar).sqrt(), tensors["sigma"], case)
    # Here 1 - alpha^2 loses half of float32's digits in the published code.
    torch.testing.assert_close(torch.tensor(lambdas), tensors["lambda"], rtol=0, atol=2e-4)
    inverse = [schedule.time_of(float(lam)) for lam in tensors["lambda"]]
    assert_golden(torch.tensor(inverse), tensors["inverse_lambda"], case)
    there_and_back = [schedule.time_of(lam) for lam in lambdas]
    torch.testing.assert_close(torch.tensor(there_and_back), tensors["t"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_published_posterior(t):
    """The ancestral step without noise is the posterior's mean; the noise has its variance."""
    case, tensors = load_case("ddpm_posterior")
    abar = model().alphas_cumprod
    node = Node(t, float(abar[t]), float(abar[t - 1]) if t else 1.0)
    denoiser = model().denoiser(tensors["c"])
    x = tensors["x"]
    with torch.no_grad():
        eps = denoiser.decode([denoiser.encode(x, t)], [t])[0].out
    for clip in (False, True):
        mean = Ancestral((node,), lambda i, x: 0 * x, clip).step(State(x), 0, eps).x
        assert_golden(mean, tensors[f"t{t}.clip{clip:d}.mean"], case)
        noisy = Ancestral((node,), lambda i, x: torch.ones_like(x), clip).step(State(x), 0, eps).x
        variance = (noisy - mean).double().square()
        torch.testing.assert_close(variance, tensors[f"t{t}.var"].double().expand_as(x), rtol=2e-2, atol=1e-9)
    assert_golden(diffuse(tensors["x0"], x, node.abar), tensors[f"t{t}.q_sample_x0"], case)
    assert_golden(predict_x0(tensors["x0"], x, node.abar), tensors[f"t{t}.x0_from_noise"], case)


@pytest.mark.parametrize("sampler", [PLMSSampler, DPMSolverSampler])
def test_published_signature(sampler):
    """All of the DDIM class but its newest argument, in the same order with the same defaults."""

    def published(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert published(sampler.sample) == published(DDIMSampler.sample)[:-1]
    assert published(sampler.__init__) == published(DDIMSampler.__init__)


@pytest.mark.parametrize("sampler", [PLMSSampler, DPMSolverSampler])
def test_plan_mask_and_edits_reach_the_loop(sampler):
    _, tensors = load_case("sampler_ddim_eta0_cfg1")
    x_T, keep = tensors["x_T"], torch.zeros(2, 1, 8, 8)
    keep[..., :4] = 1
    run = {"conditioning": tensors["c"], "x_T": x_T, "verbose": False}

    def made(**kwargs):
        return sampler(model()).sample(10, 2, SHAPE, **run, **kwargs)[0]

    plain = made()
    for change in ({"plan": "uniform:2", "parallel": 2}, {"edits": [prior_noise(x_T)]}):
        assert (made(**change) - plain).abs().max() > 1e-3
    kept = made(mask=keep, x0=torch.full((2, *SHAPE), 0.5))
    # The kept region is not put back after the last step, where this random network predicts anything.
    assert (kept - 0.5)[..., :4].abs().mean() < 0.05 * (plain - 0.5)[..., :4].abs().mean()
    assert (kept - 0.5)[..., 4:].abs().mean() > 0.5 * (plain - 0.5)[..., 4:].abs().mean()


@pytest.mark.parametrize(
    "arguments, why",
    [
        ({"eta": 0.5}, "eta is not supported"),
        ({"normals_sequence": [1]}, "normals_sequence"),
        ({"quantize_x0": True}, "quantize_x0"),
        ({"score_corrector": object()}, "score_corrector"),
        ({"dynamic_threshold": 0.9}, "dynamic_threshold"),
        ({"mask": torch.ones(1)}, "mask and x0 belong together"),
        ({"S": 0}, "steps must be 1..1000"),
        ({"S": 1001}, "steps must be 1..1000"),
    ],
)
@pytest.mark.parametrize("sampler", [PLMSSampler, DPMSolverSampler])
def test_bad_arguments_say_why(sampler, arguments, why):
    ddpm = model()
    usual = {
        "S": 5,
        "batch_size": 2,
        "shape": SHAPE,
        "verbose": False,
        "conditioning": torch.zeros(2, 5, ddpm.model.diffusion_model.context_dim),
    }
    with pytest.raises(ValueError, match=why):
        sampler(ddpm).sample(**usual | arguments)


NODES = (Node(500, 0.3, 0.6), Node(200, 0.6, 0.9))


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: DPMMultistep(NODES, predicts="v"), "predicts must be one of eps, x0"),
        (lambda: DPMMultistep(NODES, variant="heun"), "variant must be one of dpmsolver, taylor"),
        (lambda: DPMMultistep(NODES, order=4), "order must be 1, 2 or 3"),
        (lambda: DPMSinglestep(NODES), "spans must be one per node"),
        (lambda: singlestep_nodes(schedule(), 10, 4), "order must be 1, 2 or 3"),
        (lambda: singlestep_nodes(schedule(), 0, 3), "steps must be 1..1000"),
        (lambda: singlestep_nodes(schedule(), 2, 3, fixed=True), "at least the order 3"),
        (
            lambda: schedule().levels(10, "cosine"),
            "skip_type must be one of time_uniform, logSNR, time_quadratic, karras",
        ),
        (lambda: Ancestral(NODES, None), "needs noise"),
    ],
)
def test_bad_rules_say_why(build, why):
    with pytest.raises(ValueError, match=why):
        build()


def schedule() -> NoiseSchedule:
    return NoiseSchedule(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_skip_types_are_even_in_their_own_measure(skip_type):
    measure = {
        "time_uniform": lambda time: time,
        "logSNR": lambda time: log_snr(schedule().level(time).abar),
        "time_quadratic": lambda time: time**0.5,
        "karras": lambda time: noise_ratio(schedule().level(time).abar) ** (1 / 7),
    }[skip_type]
    times = schedule().times(7, skip_type)
    assert len(times) == 8 and times[0] == 1.0 and times[-1] == 0.001
    gaps = torch.tensor([measure(time) for time in times], dtype=torch.float64).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "steps, order, orders",
    [
        (9, 3, [3, 3, 2, 1]),
        (10, 3, [3, 3, 3, 1]),
        (11, 3, [3, 3, 3, 2]),
        (3, 3, [2, 1]),
        (2, 3, [2]),
        (5, 2, [2, 2, 1]),
        (6, 2, [2, 2, 2]),
        (3, 1, [1, 1, 1]),
    ],
)
@pytest.mark.parametrize("skip_type", SKIP_TYPES)
def test_singlestep_nodes_are_as_many_as_asked_for(steps, order, orders, skip_type):
    assert singlestep_orders(steps, order) == orders
    nodes, spans = singlestep_nodes(schedule(), steps, order, skip_type)
    assert len(nodes) == len(spans) == steps
    assert [len(span) for i, span in enumerate(spans) if i == span.start] == orders
    assert all(a.abar_next == b.abar for a, b in zip(nodes, nodes[1:], strict=False))


@pytest.mark.parametrize("below, falls_at", [(inf, (1, 2, 3, 14, 15)), (PUBLISHED_BELOW, (1, 2, 3, 14)), (0, ())])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15])
def test_lower_order_at_the_end_for_any_order_and_few_steps(order, steps, below, falls_at):
    """The published code stops with an error for order 3 and for fewer steps than the order."""
    rule = DPMMultistep(nodes_between(schedule().levels(steps)), order=order, lower_order_below=below)
    ups = [min(order, i + 1) for i in range(steps)]
    falling = [min(up, steps - i) for i, up in enumerate(ups)]
    assert [rule.order_at(i) for i in range(steps)] == (falling if steps in falls_at else ups)
    state = State(torch.randn(1, *SHAPE))
    for i in range(steps):
        state = rule.step(state, i, torch.randn(1, *SHAPE))
    assert torch.isfinite(state.x).all()


@pytest.mark.parametrize("name", ["dpm-solver", "dpm-solver++", "dpm-solver++3m"])
def test_solvers_end_with_lower_order_and_the_published_rule_has_a_name(name):
    abar = model().alphas_cumprod
    rule, published = (solver(f"{name}{end}", abar, 20, spacing="time") for end in ("", "-published"))
    assert rule.order_at(19) == 1 and published.order_at(19) == rule.order
    assert replace(rule, lower_order_below=PUBLISHED_BELOW) == published
    # With few steps, and by default, the named one is all as published.
    nodes = nodes_between(NoiseSchedule(abar).levels(14))
    assert solver(f"{name}-published", abar, 14).nodes == nodes
    assert [published.order_at(i) for i in range(20)] == [min(rule.order, i + 1) for i in range(20)]


def test_the_published_sampler_class_has_the_published_rule_at_every_number_of_steps():
    x_T, c = (load_case("sampler_dpm_default")[1][name] for name in ("x_T", "c"))
    given = {"batch_size": 2, "shape": SHAPE, "conditioning": c, "x_T": x_T, "verbose": False}
    made, _ = DPMSolverSampler(model()).sample(16, **given)
    rule = solver(DPMSolverSampler.solver, model().alphas_cumprod, 16)
    *_, last = denoise(model().denoiser(c), rule, load_plan("off", 16), x_T)
    assert torch.equal(made, last.x) and rule.order_at(15) == 2


@pytest.mark.parametrize("name, order, predicts", [("dpm-solver++2s", 2, "x0"), ("dpm-solver-3s", 3, "eps")])
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_singlestep_solvers_by_name(name, order, predicts, steps):
    abar = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    nodes, spans = singlestep_nodes(NoiseSchedule(abar), steps, order)
    assert solver(name, abar, steps) == DPMSinglestep(nodes, predicts, spans=spans)
    for skip in range(steps):  # image to image leaves out the noisiest nodes; the steps are cut anew
        rest = solver(name, abar, steps, skip=skip)
        assert rest.nodes == nodes[skip:] and max(map(len, rest.spans)) <= order
