"""Laws of the family of plans: decoder and shallow nodes, extrapolation, guidance that is not always computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.models.diffusion.denoiser import Guidance
from ldm.models.diffusion.loop import Rule, State, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.online import OnlinePlan
from ldm.models.diffusion.propagation.plan import AXES, METHODS, QUANTITIES, Compute, Plan
from ldm.modules.diffusionmodules.util import Features
from tests.helpers.toy import EXACT, OF_NOISE, any_rule, final, toy_denoiser, toy_inputs, toy_network, toy_rule

GUIDANCE = {
    "none": 1.0,
    "always": 3.0,
    "interval": Guidance(3.0, (100, 700)),
    "reuse": Guidance(3.0, reuse=True),
    "both": Guidance(3.0, (100, 700), reuse=True),
    "forecast": Guidance(3.0, (100, 700), reuse="quadratic"),
}


@st.composite
def forecasts(draw, levels: frozenset[Compute]) -> str:
    """Any forecaster that serves these levels."""
    names = [name for name in METHODS if name != "zeros" or not levels - {Compute.DECODER}]
    words = [draw(st.sampled_from(names)), draw(st.sampled_from(AXES))]
    return ":".join(words + [draw(st.sampled_from(QUANTITIES))] * (Compute.SKIPPED in levels and draw(st.booleans())))


@st.composite
def family(draw, num_nodes: int, latent: bool) -> Plan:
    """Any plan of the family; without `latent` none of what needs the latest latent and the network."""
    kinds = draw(st.lists(st.sampled_from("kdxs" if latent else "kdx"), min_size=num_nodes, max_size=num_nodes))
    kinds[0] = "k"
    keys, shallow, skipped = (tuple(i for i, kind in enumerate(kinds) if kind == wanted) for wanted in "ksx")
    plan = Plan(
        num_nodes,
        keys,
        draw(st.integers(1, num_nodes + 1)),
        shallow,
        draw(st.integers(1, 2)) if shallow else 0,
        refresh=draw(st.integers(0, 2)) if latent else 0,
        skipped=skipped,
    )
    return replace(plan, propagate=draw(forecasts(plan.levels)))


@given(
    data=st.data(),
    name=st.sampled_from(OF_NOISE),
    steps=st.integers(1, 9),
    guidance=st.sampled_from([*GUIDANCE]),
    batch=st.integers(1, 2),
)
def test_parallel_is_serial_for_every_plan_solver_and_guidance(data, name, steps, guidance, batch):
    x, cond, uncond = toy_inputs(batch)
    network, rule = toy_network(), any_rule(name, steps)
    plan = data.draw(family(len(rule.nodes), latent=guidance not in ("reuse", "both", "forecast")))
    model = toy_denoiser(network, cond, uncond, GUIDANCE[guidance])
    whole = final(model, rule, plan, x)
    bound = EXACT["atol"] * max(1.0, float(whole.abs().max()))  # far extrapolation grows without bound
    torch.testing.assert_close(whole, final(model, rule, replace(plan, parallel=1), x), rtol=0, atol=bound)


@pytest.mark.parametrize("guidance", ["always", "reuse"])
@pytest.mark.parametrize("propagate", METHODS)
def test_every_node_a_key_node_is_plain_in_every_mode(guidance, propagate):
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(8)
    plain = final(toy_denoiser(network, cond, uncond, 3.0), rule, load_plan("off", 8), x)
    model = toy_denoiser(network, cond, uncond, GUIDANCE[guidance])
    torch.testing.assert_close(final(model, rule, load_plan("off", 8, propagate=propagate), x), plain, **EXACT)


@pytest.mark.parametrize("tome", [0.0, 0.4])
def test_shallow_nodes_are_deepcache_by_hand(tome):
    x, cond, uncond = toy_inputs(1)
    network, rule = toy_network(), toy_rule(4)
    model = toy_denoiser(network, cond, uncond, 1.0, tome=tome)
    state = State(x)
    for i, node in enumerate(rule.nodes):
        t = torch.tensor([node.t])
        if i == 0:
            features = network.encode(x, t, cond, tome)
            inner = network.advance(features, t, cond, 1, tome)
            out = network.decode(inner, t, cond, tome)
        else:
            outer = network.encode_outer(state.x, t, cond, 1, tome)
            out = network.decode(Features(inner.hidden, outer), t, cond, tome)
        state = rule.step(state, i, out)
    torch.testing.assert_close(final(model, rule, load_plan("deepcache:4", 4), x), state.x, **EXACT)


def by_hand(rule: Rule, x: torch.Tensor, predict: Callable[[torch.Tensor, float, bool], torch.Tensor]) -> torch.Tensor:
    """A run whose noise is predict(x, t, whether the node is a key node), with key nodes 0 and 3."""
    state = State(x)
    for i, node in enumerate(rule.nodes):
        state = rule.step(state, i, predict(state.x, node.t, i in (0, 3)))
    return state.x


def test_with_no_block_between_key_nodes_their_prediction_is_used_again():
    x, cond, uncond = toy_inputs(1)
    rule, model, kept = toy_rule(5), toy_denoiser(toy_network(), cond, uncond, 3.0), []

    def predict(x: torch.Tensor, t: float, key: bool) -> torch.Tensor:
        if key:
            kept.append(model.decode([model.encode(x, t)], [t])[0].out)
        return kept[-1]

    for plan in (load_plan("deepcache:3:0", 5), load_plan("skip:3", 5, propagate="hold")):
        torch.testing.assert_close(final(model, rule, plan, x), by_hand(rule, x, predict), **EXACT)


def test_deepcache_takes_the_key_nodes_of_another_plan():
    published, plan = load_plan("faster-diffusion", 50), load_plan("deepcache:faster-diffusion:2", 50)
    assert plan.keys == published.keys and plan.branch == 2 and len(plan.keys) + len(plan.shallow) == 50
    with pytest.raises(ValueError, match="unknown plan 'nobody'"):
        load_plan("deepcache:nobody", 50)


def test_zeros_reach_the_decoder_between_key_nodes_only():
    x, cond, uncond = toy_inputs(1)
    rule, model = toy_rule(5), toy_denoiser(toy_network(), cond, uncond, 3.0)

    def predict(x: torch.Tensor, t: float, key: bool) -> torch.Tensor:
        features = model.encode(x, t)
        given = features if key else Features.of([torch.zeros_like(part) for part in features.tensors])
        return model.decode([given], [t])[0].out

    made = final(model, rule, load_plan("uniform:3", 5, parallel=3, propagate="zeros"), x)
    torch.testing.assert_close(made, by_hand(rule, x, predict), **EXACT)


def test_refreshed_skips_follow_the_latent():
    x, cond, uncond = toy_inputs(1)
    network, rule = toy_network(), toy_rule(4)
    model = toy_denoiser(network, cond, uncond, 2.0)
    plain, held, one, two = (
        final(model, rule, plan, x)
        for plan in (load_plan("off", 4), *(load_plan(f"encoder:4:{n}", 4) for n in range(3)))
    )
    errors = [(run - plain).norm().item() for run in (held, one, two)]
    assert errors[0] > errors[1] > 0 and errors[2] > 0
    assert network.refreshed.count(2) == 2 * 3, "at every node but the key node, for both halves of the guidance"


def test_guidance_is_computed_where_it_is_asked_for():
    x, cond, uncond = toy_inputs(1)
    rule, plan = toy_rule(8), Plan(8, (0, 3, 6))
    ts = [node.t for node in rule.nodes]
    expected = {
        "always": [2] * 8,
        "none": [1] * 8,
        "interval": [1] * 3 + [2] * 3 + [2] * 2,
        "reuse": [2, 1, 1] * 2 + [2, 1],
        "both": [1] * 3 + [2, 1, 1, 2, 1],
        "forecast": [1] * 3 + [2, 1, 1, 2, 1],
    }
    guidance = {name: g if isinstance(g, Guidance) else Guidance(g) for name, g in GUIDANCE.items()}
    assert ts[0] > 700 > ts[3] > ts[6] > 100
    for name, counts in expected.items():
        network = toy_network()
        final(toy_denoiser(network, cond, uncond, guidance[name]), rule, plan, x)
        assert network.decoded == counts == guidance[name].images(plan.computes(), ts)


def test_the_offset_of_the_key_node_is_used_again():
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(2)
    whole, reuse = (toy_denoiser(network, cond, uncond, g) for g in (3.0, GUIDANCE["reuse"]))
    features, ts = whole.encode(x, 900), (900, 700)
    alone = toy_denoiser(network, cond, uncond, 1.0)
    first, second = reuse.decode([features] * 2, ts)
    torch.testing.assert_close(first.out, whole.decode([features], [900])[0].out, **EXACT)
    conditional = alone.decode([features.images(slice(2, 4))], [700])[0].out
    offset = (first.out - alone.decode([features.images(slice(2, 4))], [900])[0].out) / 2
    torch.testing.assert_close(second.out, conditional + 2 * offset, **EXACT)
    assert len(rule.nodes) == 2


def test_the_offset_is_extrapolated_from_those_of_the_key_nodes():
    x, cond, uncond = toy_inputs(1)
    network, rule = toy_network(), toy_rule(8)
    both, alone = (toy_denoiser(network, cond, uncond, scale) for scale in (3.0, 1.0))
    state, kept = State(x), []
    for i, node in enumerate(rule.nodes):
        if i in (0, 2, 5):
            features = both.encode(state.x, node.t)
            conditional = features.images(slice(1, 2))
            out = both.decode([features], [node.t])[0].out
            kept = [*kept, (node.t, (out - alone.decode([conditional], [node.t])[0].out) / 2)][-2:]
        else:
            (t_a, a), (t_b, b) = kept if len(kept) == 2 else (kept[0], (0.0, kept[0][1]))
            offset = b + (node.t - t_b) / (t_b - t_a) * (b - a)
            out = alone.decode([conditional], [node.t])[0].out + 2 * offset
        state = rule.step(state, i, out)
    for parallel in (1, 3):
        model = toy_denoiser(network, cond, uncond, Guidance(3.0, reuse="linear"))
        torch.testing.assert_close(final(model, rule, Plan(8, (0, 2, 5), parallel), x), state.x, **EXACT)


def works(model, rule, plan, x) -> list[Compute]:
    return [state.compute for state in denoise(model, rule, plan, x)]


def test_an_online_plan_encodes_when_the_latent_has_changed_enough():
    x, cond, uncond = toy_inputs(1)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(20)
    xs = [x, *(state.x for state in denoise(model, rule, OnlinePlan(20, 0.2), x))]
    ran = works(model, rule, OnlinePlan(20, 0.2), x)
    key, keys = 0, 0
    for i, work in enumerate(ran):
        change = float((xs[i] - xs[key]).norm() / xs[key].norm())
        assert (work is Compute.FULL) == (i == 0 or change > 0.2)
        key, keys = (i, keys + 1) if work is Compute.FULL else (key, keys)
    assert 1 < keys < 20
    counts = [
        works(model, rule, OnlinePlan(20, threshold), x).count(Compute.FULL) for threshold in (1e-9, 0.1, 0.4, 1e9)
    ]
    assert counts[0] == 20 > counts[1] > counts[2] > counts[3] == 1
    with pytest.raises(ValueError, match="one image at a time; got a batch of 2"):
        final(toy_denoiser(toy_network(), *toy_inputs(2)[1:], 2.0), rule, OnlinePlan(20, 0.2), toy_inputs(2)[0])


def test_runs_with_different_thresholds_have_different_settings():
    thresholds = (0.1, 0.1 + 1e-9, 1.0, 0.12345678)
    written = [OnlinePlan(5, threshold).settings()["online"] for threshold in thresholds]
    assert written == ["latent:0.1", "latent:0.100000001", "latent:1", "latent:0.12345678"]


@pytest.mark.parametrize("parallel", [1, 3, 20])
def test_an_online_plan_by_time_is_known_ahead_and_stays_parallel(parallel):
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(20)
    model = toy_denoiser(network, cond, uncond, 1.0)
    plan = load_plan("online:time:0.3", 20, parallel)
    ran = works(model, rule, plan, x)
    keys = tuple(i for i, work in enumerate(ran) if work is Compute.FULL)
    assert 1 < len(keys) < 20
    network.decoded.clear()
    result = final(model, rule, plan, x)
    assert max(network.decoded) == 2 * min(parallel, max(b - a for a, b in zip(keys, (*keys[1:], 20), strict=True)))
    torch.testing.assert_close(result, final(model, rule, Plan(20, keys), x), **EXACT)


def test_an_image_does_not_depend_on_its_batch_in_any_mode():
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(8)
    plan = Plan(8, (0, 3), 2, (5, 6), 1, "linear")
    together = final(toy_denoiser(network, cond, uncond, GUIDANCE["interval"]), rule, plan, x)
    for b in range(2):
        one = slice(b, b + 1)
        model = toy_denoiser(network, *(type(c)(c.context[one]) for c in (cond, uncond)), GUIDANCE["interval"])
        torch.testing.assert_close(final(model, rule, plan, x[one]), together[one], **EXACT)


def test_contradicting_options_say_why():
    x, cond, uncond = toy_inputs(1)
    model = toy_denoiser(toy_network(), cond, uncond, GUIDANCE["reuse"])
    for plan in (load_plan("deepcache:2", 4), Plan(4, (0,), refresh=1)):
        with pytest.raises(ValueError, match="reuse of the guidance offset needs decoder nodes only"):
            final(model, toy_rule(4), plan, x)
    with pytest.raises(ValueError, match="interval must be low,high; got 5,3"):
        Guidance(3.0, (5, 3))
    with pytest.raises(ValueError, match="used again by hold, linear, quadratic, cubic; got 'taylor2'"):
        Guidance(3.0, reuse="taylor2")
