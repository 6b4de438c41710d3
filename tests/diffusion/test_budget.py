"""An error budget: forecasts that miss by more are made again, those that pass do not."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.denoiser import Guidance
from ldm.models.diffusion.loop import State, denoise
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Compute, Forecast, Plan
from ldm.models.diffusion.propagation.predict import Forecaster, relative_error
from tests.helpers.toy import EXACT, any_rule, final, toy_denoiser, toy_inputs, toy_network, toy_rule

LEVELS = ("encoder:5", "deepcache:5", "skip:5")


def states(spec: str, budget: float, parallel: int = 1, rule=None, guidance=2.0, **inputs) -> list[State]:
    """The states of a run of 10 nodes whose last one is no key node of the plan."""
    rule = rule or toy_rule(10)
    x, cond, uncond = toy_inputs(1)
    model = toy_denoiser(toy_network(), cond, uncond, guidance)
    plan = load_plan(spec, len(rule.nodes), propagate="linear")
    return list(denoise(model, rule, BudgetPlan(plan, budget, parallel), x, **inputs))


def plain(rule, guidance=2.0) -> torch.Tensor:
    x, cond, uncond = toy_inputs(1)
    return final(toy_denoiser(toy_network(), cond, uncond, guidance), rule, load_plan("off", len(rule.nodes)), x)


def keys_of(run: list[State]) -> tuple[int, ...]:
    """The key nodes of what counted in the end."""
    last = {state.node: state.compute for state in run}
    return tuple(i for i, compute in sorted(last.items()) if compute is Compute.FULL)


@pytest.mark.parametrize("spec", LEVELS)
def test_a_large_budget_changes_nothing(spec):
    run = states(spec, 1e9)
    assert [state.node for state in run] == list(range(len(run))) and keys_of(run) == (0, 5, 9)
    plan = load_plan(f"{spec.partition(':')[0]}:0,5,9", len(run), propagate="linear")
    x, cond, uncond = toy_inputs(1)
    expected = final(toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10), plan, x)
    torch.testing.assert_close(run[-1].x, expected, **EXACT)
    assert run[-1].error > 0


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spec", LEVELS)
def test_a_budget_that_no_forecast_meets_gives_the_plain_run(spec, eta):
    rule = toy_rule(10, eta)
    run = states(spec, 1e-12, rule=rule)
    assert keys_of(run) == tuple(range(10)) and len(run) > 10
    torch.testing.assert_close(run[-1].x, plain(rule), **EXACT)
    assert run[-1].error == 0, "no forecast is left"


@pytest.mark.parametrize("spec", LEVELS)
@pytest.mark.parametrize("parallel", [1, 3])
def test_what_passes_is_within_the_budget_and_what_does_not_is_redone(spec, parallel):
    budget = 0.8 * states(spec, 1e9)[-1].error
    run = states(spec, budget, parallel)
    assert 0 < run[-1].error <= budget
    assert 3 < len(keys_of(run)) < 10 < len(run)
    shared = Plan(10, keys_of(run), propagate="linear")
    if spec.startswith("encoder"):  # nothing of the way there is left in the result
        x, cond, uncond = toy_inputs(1)
        torch.testing.assert_close(
            run[-1].x, final(toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10), shared, x), **EXACT
        )


def test_the_error_is_that_of_the_forecast_at_the_key_node():
    """By hand: predictions at nodes 0 and 5 held against that of node 9."""
    x, cond, uncond = toy_inputs(1)
    rule, model = toy_rule(10), toy_denoiser(toy_network(), cond, uncond, 2.0)
    state, values, errors = State(x), {}, []
    forecaster = Forecaster.of(Forecast("linear"), rule.nodes)
    for i, node in enumerate(rule.nodes):
        known = [*values][-2:]
        guess = sum(w * values[k] for w, k in zip(forecaster.weights(known, i), known, strict=True)) if known else None
        if i in (0, 5, 9):
            values[i] = model.decode([model.encode(state.x, node.t)], [node.t])[0].out
            errors += [] if guess is None else [float((guess - values[i]).norm() / values[i].norm())]
        state = rule.step(state, i, values[i] if i in values else guess)
    assert states("skip:5", 1e9)[-1].error == pytest.approx(max(errors))


@pytest.mark.parametrize("name", ["heun", "plms", "dpm-solver++", "unipc", "euler-a"])
def test_a_solver_s_memory_goes_back_with_the_run(name):
    rule = any_rule(name, 6)
    run = states("skip:4", 1e-12, rule=rule)
    torch.testing.assert_close(run[-1].x, plain(rule), **EXACT)


def test_where_guidance_begins_nothing_is_compared():
    rule = toy_rule(10)
    guidance = Guidance(3.0, (0, rule.nodes[5].t))
    run = states("skip:5", 1e-12, guidance=guidance)
    assert {*range(5, 10)} <= {*keys_of(run)} and keys_of(run)[:2] == (0, 5)


def test_an_error_of_large_features_in_half_precision_is_a_number():
    value = torch.full((1, 8, 100, 100), 300.0, dtype=torch.float16)
    assert relative_error(1.5 * value, value) == pytest.approx(0.5)
    assert relative_error(0 * value, 0 * value) == 0


def test_a_run_that_measures_nothing_says_nothing():
    x, cond, uncond = toy_inputs(1)
    *_, last = denoise(toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(4), load_plan("skip:2", 4), x)
    assert last.error is None


@pytest.mark.parametrize(
    "plan, budget, why",
    [
        ("skip:2", 0.0, "must be above 0 and finite; got 0"),
        ("skip:2", float("nan"), "must be above 0 and finite; got nan"),
        ("off", 0.1, "needs forecasts to compare; this plan makes none"),
        ("uniform:1", 0.1, "needs forecasts to compare"),
        ("online:0.1", 0.1, "an online plan has none"),
    ],
)
def test_budgets_without_use_say_why(plan, budget, why):
    with pytest.raises(ValueError, match=why):
        BudgetPlan(load_plan(plan, 6), budget)


def test_two_images_do_not_share_a_budget():
    x, cond, uncond = toy_inputs(2)
    with pytest.raises(ValueError, match="one image at a time; got a batch of 2"):
        final(toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(5), BudgetPlan(load_plan("skip:2", 5), 0.1), x)
