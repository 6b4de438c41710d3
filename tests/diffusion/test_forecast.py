"""Forecasters: the published formulas, what each is exact for, and how any of them serves every level of reuse."""

from __future__ import annotations

from dataclasses import replace
from math import comb, factorial, log, sqrt

import numpy as np
import pytest
import torch

from ldm.models.diffusion.denoiser import FROM_EPS, TO_EPS, Guidance, Prediction
from ldm.models.diffusion.loop import State, denoise, prior_noise
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import AXES, METHODS, QUANTITIES, Forecast, Plan
from ldm.models.diffusion.propagation.predict import Forecaster, History
from ldm.models.diffusion.schedule import Node, eps_weight, predict_x0
from ldm.models.diffusion.solvers.registry import SOLVERS
from ldm.modules.diffusionmodules.util import Features, weighted_sum
from tests.helpers.toy import EXACT, OF_NOISE, any_rule, final, toy_denoiser, toy_inputs, toy_network, toy_rule

UNEVEN = [0.0, 1.0, 3.0, 4.0, 8.0, 13.0]
EVEN = [0.0, 4.0, 8.0, 12.0, 16.0, 20.0]


def row(name: str, times: list[float], t: float, span: tuple[float, float] = (0.0, 50.0)) -> np.ndarray:
    """The weights of a forecaster's last values at these times, in the value at t."""
    kept = times[-METHODS[name].keep :]
    return np.array(METHODS[name].weigh(kept, t, span))


def forecast(name: str, signal, times: list[float], t: float) -> float:
    kept = times[-METHODS[name].keep :]
    return float(row(name, times, t) @ [signal(time) for time in kept])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("zeros", "chebyshev", "spectrum")])
def test_constants_are_met_exactly(name):
    for times in (UNEVEN, EVEN[:3], UNEVEN[:2], UNEVEN[:1]):
        assert row(name, times, times[-1] + 2.5).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["chebyshev", "spectrum"])
def test_the_ridge_of_spectrum_shrinks_constants(name):
    """As published: the ridge weighs on the constant too."""
    sums = [row(name, EVEN[:n], EVEN[n - 1] + 2).sum() for n in (2, 3, 6)]
    assert all(0.85 < total < 0.97 for total in sums)
    assert row(name, [0.0], 3).tolist() == [1.0]


@pytest.mark.parametrize(
    "name, times, degree",
    [("linear", UNEVEN, 1), ("quadratic", UNEVEN, 2), ("cubic", UNEVEN, 3), ("taylor1", UNEVEN, 1)]
    + [("quadratic", UNEVEN[:2], 1), ("cubic", UNEVEN[:3], 2), ("cubic", UNEVEN[:1], 0)],  # fewer keys, lower degree
)
def test_polynomials_of_its_degree_are_met_exactly(name, times, degree):
    def signal(t: float) -> float:
        return sum((k + 1) * (t / 10 - 0.3) ** k for k in range(degree + 1))

    for t in (13.5, 17.0, 40.0):
        assert forecast(name, signal, times, t) == pytest.approx(signal(t), rel=1e-9)
        assert degree == 3 or forecast(name, lambda t: signal(t) + t ** (degree + 1), times, t) != pytest.approx(
            signal(t) + t ** (degree + 1), rel=1e-3
        )


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ab_cache_continues_evenly_spaced_values_by_one_distance(order):
    """(AB-Cache) 2 f_0 - f_1, and the binomial row of higher orders; the same at every distance."""
    weights = row(f"ab{order}", EVEN, 24.0)
    assert weights.tolist() == [(-1) ** (j + 1) * comb(order, j) for j in range(order, 0, -1)]
    assert weights.tolist() == row(f"ab{order}", EVEN, 21.0).tolist()
    assert forecast(f"ab{order}", lambda t: t ** (order - 1), EVEN, 24.0) == pytest.approx(24.0 ** (order - 1))
    assert row("ab2", EVEN, 1.0).tolist() == [-1, 2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylorseer_sums_differences_over_factorials(order):
    """(TaylorSeer) sum_i D^i F k^i / (i! N^i), D^i the i-th backward difference over keys N steps apart."""
    values = [3.0, -1.0, 4.0, 1.5, -2.0, 0.7]
    k, expected = 3.0, 0.0
    for i in range(order + 1):
        difference = sum((-1) ** j * comb(i, j) * values[-1 - j] for j in range(i + 1))
        expected += difference * k**i / (factorial(i) * 4.0**i)
    assert row(f"taylor{order}", EVEN, EVEN[-1] + k) @ values[-order - 1 :] == pytest.approx(expected)


def test_taylorseer_divides_each_difference_by_the_last_distance():
    """Keys at 0, 1, 3: the slope at 3 is (f3 - f1) / 2, that at 1 is f1 - f0, the bend at 3 their difference / 2."""
    f0, f1, f3 = 2.0, 5.0, 4.0
    slope, bend = (f3 - f1) / 2, ((f3 - f1) / 2 - (f1 - f0)) / 2
    assert row("taylor2", [0.0, 1.0, 3.0], 5.0) @ [f0, f1, f3] == pytest.approx(f3 + 2 * slope + 4 / 2 * bend)


def test_spectrum_is_ridge_regression_of_chebyshev_polynomials():
    """(Spectrum) least |T c - f|^2 + 0.1 |c|^2 with T_0..T_4 of steps 0..50 mapped to -1..1, then T(t) c."""
    steps, values = np.array([0.0, 1, 2, 3, 4, 6, 9, 13]), np.cos(np.arange(8.0))

    def basis(t: np.ndarray) -> np.ndarray:
        tau = t / 25 - 1
        return np.stack([np.ones_like(tau), tau, 2 * tau**2 - 1, 4 * tau**3 - 3 * tau, 8 * tau**4 - 8 * tau**2 + 1], -1)

    # Ridge regression is least squares with a row sqrt(lambda) e_i for each coefficient.
    stacked = np.vstack([basis(steps), np.sqrt(0.1) * np.eye(5)])
    coefficients = np.linalg.lstsq(stacked, np.concatenate([values, np.zeros(5)]), rcond=None)[0]
    fitted = float(basis(np.array(15.0)) @ coefficients)
    assert row("chebyshev", [*steps], 15.0) @ values == pytest.approx(fitted)
    line = values[-1] + (15 - 13) / (13 - 9) * (values[-1] - values[-2])
    assert row("spectrum", [*steps], 15.0) @ values == pytest.approx((fitted + line) / 2)


NODES = tuple(Node(float(t), abar, 0.0) for t, abar in ((900, 0.1), (600, 0.3), (500, 0.4), (200, 0.8), (50, 0.95)))


def test_axes_are_timestep_log_snr_and_step():
    on = {axis: Forecaster.of(Forecast("linear", axis), NODES) for axis in AXES}
    assert on["timestep"].times == (900, 600, 500, 200, 50) and on["timestep"].span == (900, 50)
    assert on["logsnr"].times == pytest.approx([0.5 * log(node.abar / (1 - node.abar)) for node in NODES])
    assert on["step"].times == (0, 1, 2, 3, 4) and on["step"].span == (0, 5)
    assert on["step"].weights([0, 1], 3) == [-2, 3] and on["timestep"].weights([1, 2], 3) == [-3, 4]
    clean = (*NODES, Node(0.0, 1.0, 1.0))
    assert Forecaster.of(Forecast("linear", "step"), clean)
    with pytest.raises(ValueError, match="log-SNR .* infinite; the axis must be timestep or step"):
        Forecaster.of(Forecast("linear", "logsnr"), clean)


def history(name: str, axis: str = "step", nodes: tuple[Node, ...] = NODES) -> History[torch.Tensor]:
    return History(Forecaster.of(Forecast(name, axis), nodes), weighted_sum)


def test_a_history_keeps_what_its_method_takes():
    values = [torch.full((2, 1), float(i**2), dtype=torch.float64) for i in range(5)]
    kept = history("quadratic")
    for i in range(4):
        kept = kept.key(i, values[i])
        assert kept.at(i) is values[i], "where a value was computed, exactly that"
    assert [i for i, _ in kept.keys] == [1, 2, 3]
    torch.testing.assert_close(kept.at(4), values[4], **EXACT)
    assert history("hold").key(0, values[0]).key(1, values[1]).at(4) is values[1]
    assert history("zeros").key(0, values[3]).at(1).abs().sum() == 0
    assert len(kept.key(4, torch.zeros(4, 1)).keys) == 1, "another batch: guidance has begun"
    twice = (NODES[0], NODES[1], NODES[1], NODES[2])
    came_back = history("linear", "timestep", twice).key(0, values[0]).key(1, values[1]).key(2, values[2])
    assert [i for i, _ in came_back.keys] == [0, 2], "a solver that comes back to a timestep replaces its value"


def test_features_are_forecast_tensor_by_tensor():
    def features(t: float) -> Features:
        value = torch.arange(6, dtype=torch.float64).view(1, 6, 1, 1) * t**2 - t
        return Features(value, (2 * value, value - 1))

    kept = History(Forecaster.of(Forecast("quadratic"), NODES), Features.combine)
    for i in range(3):
        kept = kept.key(i, features(NODES[i].t / 1000))
    for ours, true in zip(kept.at(4).tensors, features(NODES[4].t / 1000).tensors, strict=True):
        torch.testing.assert_close(ours, true, **EXACT)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_quantities_are_each_other_turned_round(quantity):
    x, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    abar = 0.3
    value = FROM_EPS[quantity](eps, x, abar)
    x0 = predict_x0(x, eps, abar)
    expected = {"eps": eps, "x0": x0, "v": sqrt(abar) * eps - sqrt(1 - abar) * x0}
    torch.testing.assert_close(value, expected[quantity], **EXACT)
    torch.testing.assert_close(TO_EPS[quantity](value, x, abar), eps, **EXACT)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("spec", ["linear", "quadratic:logsnr:eps", "taylor2:step:x0", "linear:timestep:v"])
def test_skipped_predictions_are_forecast_by_hand(spec, parameterization):
    """In the quantity that is asked for, from key nodes at the latents that they met, with guidance and an edit."""
    x, cond, uncond = toy_inputs(2)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 3.0, parameterization), toy_rule(8)
    edit = prior_noise(x, 0.05, 700)
    how, keys = Forecast.parse(spec), (0, 2, 3, 6)
    forecaster, state, kept = Forecaster.of(how, rule.nodes), State(x), []
    for i, node in enumerate(rule.nodes):
        state = State(edit(state.x, node))
        if i in keys:
            prediction = model.decode([model.encode(state.x, node.t)], [node.t])[0]
            eps = model.to_eps(prediction, state.x, node)
            value = FROM_EPS[how.quantity](eps, state.x, node.abar) if how.quantity else prediction.out
            kept = [*kept, (i, value)][-METHODS[how.name].keep :]
        else:
            weights = forecaster.weights([k for k, _ in kept], i)
            value = sum(weight * old for weight, (_, old) in zip(weights, kept, strict=True))
            to_eps = TO_EPS.get(how.quantity)
            eps = to_eps(value, state.x, node.abar) if to_eps else model.to_eps(Prediction(value), state.x, node)
        state = rule.step(state, i, eps)
    made = final(model, rule, load_plan("skip:0,2,3,6", 8, propagate=spec), x, [edit])
    torch.testing.assert_close(made, state.x, **EXACT)


@pytest.mark.parametrize("name", OF_NOISE)
@pytest.mark.parametrize("level", ["encoder", "deepcache", "skip"])
def test_every_level_serves_every_solver(name, level):
    x, cond, uncond = toy_inputs(1)
    rule = any_rule(name, 6, eta=1.0)
    nodes, model = len(rule.nodes), toy_denoiser(toy_network(), cond, uncond, 2.0)
    plain = final(model, rule, load_plan("off", nodes), x)
    held, extrapolated = (
        final(model, rule, load_plan(f"{level}:2", nodes, propagate=propagate), x)
        for propagate in ("hold:step", "linear:step")
    )
    assert not torch.equal(held, extrapolated) and not torch.equal(plain, extrapolated)
    assert torch.isfinite(extrapolated).all()
    torch.testing.assert_close(final(model, rule, load_plan(f"{level}:1", nodes), x), plain, **EXACT)


def test_a_skipped_node_calls_no_network():
    x, cond, uncond = toy_inputs(1)
    network = toy_network()
    final(toy_denoiser(network, cond, uncond, 2.0), toy_rule(10), load_plan("skip:3", 10), x)
    assert network.encoded == network.decoded == [2] * 4 and network.refreshed == []


def test_inner_features_are_forecast_from_the_nodes_that_computed_them():
    x, cond, uncond = toy_inputs(1)
    network, rule = toy_network(), toy_rule(5)
    model = toy_denoiser(network, cond, uncond, 1.0)
    state, inner = State(x), []
    for i, node in enumerate(rule.nodes):
        t = torch.tensor([node.t])
        if i in (0, 2):
            deep = network.advance(network.encode(state.x, t, cond), t, cond, 1)
            inner.append((node.t, deep.hidden))
            features = deep
        else:
            (t_a, a), *more = inner
            hidden = a
            if more:
                t_b, b = more[0]
                hidden = b + (node.t - t_b) / (t_b - t_a) * (b - a)
            features = Features(hidden, network.encode_outer(state.x, t, cond, 1))
        state = rule.step(state, i, network.decode(features, t, cond))
    plan = Plan(5, (0, 2), shallow=(1, 3, 4), branch=1, propagate="linear")
    made = final(model, rule, plan, x)
    torch.testing.assert_close(made, state.x, **EXACT)


def test_predictions_before_guidance_began_are_forgotten():
    """A forecast from both sides of the change would be of neither: after one guided key node that is held."""
    x, cond, uncond = toy_inputs(1)
    rule = toy_rule(8)
    model = toy_denoiser(toy_network(), cond, uncond, Guidance(3.0, (0, rule.nodes[4].t)))  # from node 4 on
    held = Plan(8, (0, 1, 2, 3, 4), skipped=(5, 6, 7))
    linear = replace(held, propagate="linear")
    torch.testing.assert_close(final(model, rule, linear, x), final(model, rule, held, x), **EXACT)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("hold", Forecast()),
        ("quadratic:logsnr:eps", Forecast("quadratic", "logsnr", "eps")),
        ("cubic:x0", Forecast("cubic", "timestep", "x0")),
        ("taylor2", Forecast("taylor2", "step")),
        ("spectrum:timestep", Forecast("spectrum", "timestep")),
    ],
)
def test_forecasters_are_named(text, expected):
    assert Forecast.parse(text) == expected
    assert isinstance(Forecaster.of(expected, NODES), Forecaster)


@pytest.mark.parametrize(
    "plan, propagate, why",
    [
        ("uniform:3", "quartic", "a forecaster must be one of hold, linear, .*; got 'quartic'"),
        ("uniform:3", "quadratc", "did you mean quadratic"),
        ("uniform:3", "linear:sigma", "the axis one of timestep, logsnr, step .*; got 'linear:sigma'"),
        ("skip:3", "linear:eps:step", "the quantity one of v, eps, x0; got 'linear:eps:step'"),
        ("skip:3", "linear:step:score", "the quantity one of v, eps, x0"),
        ("skip:3", "", "a forecaster must be one of"),
        ("uniform:3", "linear:eps", "eps is a quantity of whole predictions, and this plan forecasts features"),
        ("deepcache:3", "linear:x0", "x0 is a quantity of whole predictions"),
        ("online:0.1", "linear:v", "v is a quantity of whole predictions"),
        ("deepcache:3", "zeros", "zeros can stand for the encoder's features only"),
        ("skip:3", "zeros", "zeros can stand for the encoder's features only"),
        ("skip:3:1", "hold", "only deepcache and encoder take a number of blocks"),
        ("skip:0", "hold", "needs N >= 1"),
        ("skip:nobody", "hold", "unknown plan 'nobody'"),
        ("leap:3", "hold", "unknown plan 'leap:3'; accepted: .*skip:KEYS"),
        ("skip:2,3", "hold", "start with node 0"),
    ],
)
def test_bad_forecasts_say_why(plan, propagate, why):
    with pytest.raises(ValueError, match=why) as error:
        load_plan(plan, 9, propagate=propagate)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec, keys, level",
    [
        ("skip:3", (0, 3, 6), "skipped"),
        ("skip:uniform:4", (0, 4, 8), "skipped"),
        ("skip:0,2,5", (0, 2, 5), "skipped"),
        ("skip:pro", (0, 2, 5), "skipped"),
        ("skip:faster-diffusion", (0, 1, 2, 4, 6), "skipped"),
        ("deepcache:uniform:3:2", (0, 3, 6), "shallow"),
        ("deepcache:0,2:2", (0, 2), "shallow"),
        ("encoder:3", (0, 3, 6), "decoder"),
    ],
)
def test_a_level_goes_with_any_key_nodes(spec, keys, level):
    plan = load_plan(spec, 9)
    assert plan.keys == keys and {kind.value for kind in plan.levels} == {level}
    assert plan.propagate == ("quadratic:logsnr:eps" if level == "skipped" else "hold")
    assert plan.branch == (2 if level == "shallow" else 0)


def adds_noise(name: str, eta: float) -> bool:
    """Whether a solver can't do without a source of noise."""
    try:
        SOLVERS[name].rule((), eta, None)
    except ValueError as error:
        return "needs noise" in str(error)
    except IndexError:  # it looks at its nodes
        pass
    return False


@pytest.mark.parametrize("name", SOLVERS)
def test_skipped_steps_forecast_x0_where_noise_is_added(name):
    """For the noise of one step tells nothing of that of the next."""
    for eta in (0.0, 1.0)[: 1 + SOLVERS[name].takes_eta]:
        usual = "linear:timestep:x0" if adds_noise(name, eta) else "quadratic:logsnr:eps"
        for sampler in (name, f"{name}-trailing", f"{name}-at-01234567"):
            run = RunFacts({"sampler": sampler, "eta": eta})
            plans = {spec: load_plan(spec, 9, run=run).propagate for spec in ("skip:3", "skip:3+full:1", "deepcache:3")}
            assert plans == {"skip:3": usual, "skip:3+full:1": usual, "deepcache:3": "hold"}
            assert load_plan("skip:3", 9, propagate="quadratic", run=run).propagate == "quadratic"
            assert load_plan("spectrum", 9, run=run).propagate == "spectrum"


def test_plan_files_name_their_level_and_forecaster(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("source: mine\nsteps: {9: [0, 2, 5]}\nlevel: skip\npropagate: linear:step:x0\n")
    plan = load_plan(str(file), 9)
    assert plan.skipped == (1, 3, 4, 6, 7, 8) and plan.propagate == "linear:step:x0"
    file.write_text("source: mine\nevery: 3\nlevel: deepcache\nbranch: 2\n")
    assert load_plan(str(file), 9) == load_plan("deepcache:3:2", 9)
    assert load_plan(f"skip:{file}", 9) == load_plan("skip:3", 9), "a level before the file goes first"
    file.write_text("source: mine\nevery: 3\nlevel: skip\n")
    assert load_plan(str(file), 9, run=RunFacts({"eta": 0.5})).propagate == "linear:timestep:x0"
    file.write_text("source: mine\nevery: 3\nmade_for: {sampler: ddim}\n")
    assert load_plan(str(file), 9) == load_plan("uniform:3", 9), "a rule is for any number of nodes"
    for line, why in (
        ("level: prediction", "level"),
        ("propagate: quartic", "propagate.*quartic"),
        ("branch: 0", "branch"),
    ):
        file.write_text(f"source: mine\nevery: 3\n{line}\n")
        with pytest.raises(ValueError, match=why):
            load_plan(str(file), 9)


MIXED = "skip:3+encoder:1,2,7+deepcache:4+full:8"


def test_steps_can_be_set_apart_at_levels_of_their_own(tmp_path):
    mixed = load_plan(MIXED, 9)
    expected = Plan(9, (0, 3, 6, 8), shallow=(4,), branch=1, skipped=(5,), propagate="quadratic:logsnr:eps")
    assert mixed == expected and len(mixed.levels) == 3
    assert load_plan("skip:3+encoder:3", 9).keys == (0, 6), "a key timestep, too"
    assert load_plan("deepcache:3:2+full:1+skip:2", 9).branch == 2
    assert load_plan("deepcache:2+encoder:1,3", 4) == load_plan("encoder:2", 4), "no step is left at the plan's level"
    file = tmp_path / "mine.yaml"
    file.write_text(
        "source: mine\nsteps: {9: [0, 3, 6, 8]}\nlevel: skip\napart: {encoder: ['1-2', 7], deepcache: [4]}\n"
    )
    assert load_plan(str(file), 9) == mixed
    assert load_plan(f"{file}+deepcache:2", 9) == load_plan(f"{MIXED}+deepcache:2", 9)
    with pytest.raises(ValueError, match="steps set apart are not scaled: it is for 9 steps, not 18"):
        load_plan(str(file), 18)


@pytest.mark.parametrize(
    "spec, why",
    [
        ("skip:3+encoder:0", "steps at the level encoder must be 1..8; got 0"),
        ("skip:3+encoder:9", "key 9 is past the last node 8"),
        (
            "skip:3+encoder:x",
            r"steps are set apart as \+LEVEL:STEPS, with full, encoder, deepcache, skip, tgate .*; got \+enc",
        ),
        ("skip:3+encoder:1:2", r"or as \+deepcache:STEPS:BRANCH; got \+encoder:1:2"),
        ("skip:0,3+middle:1", "only deepcache and encoder take a number of blocks"),
        ("deepcache:3:2+deepcache:3", "all deepcache steps run the same number of blocks; got 2 and 1"),
        ("online:0.1+full:3", "an online plan decides during the run, so no steps can be set apart"),
        ("skip:3+encoder:5,2", "keys must increase strictly; got 2 after 5"),
    ],
)
def test_steps_that_can_not_be_set_apart_say_why(spec, why):
    with pytest.raises(ValueError, match=why):
        load_plan(spec, 9)


@pytest.mark.parametrize("propagate", [None, "linear", "hold"])
def test_the_laws_hold_of_mixed_plans(propagate):
    """Decoders that run together give what they give one by one; with every step in full it is the plain run."""
    x, cond, uncond = toy_inputs(2)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10)
    serial, together = (final(model, rule, load_plan(MIXED, 10, n, propagate), x) for n in (1, 10))
    torch.testing.assert_close(together, serial, **EXACT)
    plain = final(model, rule, load_plan("off", 10), x)
    torch.testing.assert_close(final(model, rule, load_plan(f"{MIXED}+full:1-9", 10), x), plain, **EXACT)
    assert (serial - plain).abs().max() > 1e-6
    alone = toy_denoiser(toy_network(), *(type(c)(c.context[:1]) for c in (cond, uncond)), 2.0)
    torch.testing.assert_close(final(alone, rule, load_plan(MIXED, 10, 3, propagate), x[:1]), serial[:1], **EXACT)


def test_only_key_timesteps_are_extrapolated_from():
    """By hand: a step of the decoder alone, between, does not enter the line through the last two key timesteps."""
    x, cond, uncond = toy_inputs(1)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10)
    run = [*denoise(model, rule, load_plan("skip:0,2,6+encoder:4", 10, propagate="linear:timestep:eps"), x)]
    xs = [x, *(state.x for state in run)]
    eps = {i: eps_of(rule, xs, i) for i in (0, 2, 5)}
    ts = [node.t for node in rule.nodes]
    slope = (eps[2] - eps[0]) / (ts[2] - ts[0])
    torch.testing.assert_close(eps[5], eps[2] + slope * (ts[5] - ts[2]), **EXACT)


def eps_of(rule, xs, i):
    """What moved the latents at a node: a DDIM step is linear in it."""
    node = rule.nodes[i]
    weight = eps_weight(node.abar, node.abar_next)
    return (xs[i + 1] - (node.abar_next / node.abar) ** 0.5 * xs[i]) / weight


def test_settings_of_old_spellings_are_what_they_were():
    """So that folders of images can be resumed."""
    assert load_plan("deepcache:3:0", 6).settings() == {"keys": [0, 3], "propagate": "hold", "shallow": [1, 2, 4, 5]}
    assert load_plan("uniform:3", 6, propagate="linear").settings() == {"keys": [0, 3], "propagate": "linear"}
    mixed = Plan(6, (0, 3), shallow=(1,), branch=1, skipped=(2, 4), propagate="linear")
    assert mixed.settings() == {"keys": [0, 3], "propagate": "linear", "shallow": [1], "branch": 1, "skipped": [2, 4]}
