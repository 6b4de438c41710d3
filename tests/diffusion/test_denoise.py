"""Laws of the loop, for any plan, solver setting, guidance and batch; edits of the latents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm.models.diffusion.denoiser import TO_EPS, Conditional, Conditioning, Guidance, Guided, Prediction
from ldm.models.diffusion.loop import (
    Edit,
    NonFiniteLatents,
    State,
    denoise,
    first_nonfinite_layer,
    inpainting,
    prior_noise,
)
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node, ddim_nodes, ddim_timesteps, diffuse
from ldm.models.diffusion.solvers.registry import solver
from tests.helpers.toy import (
    ABAR,
    CHANNELS,
    EXACT,
    OF_NOISE,
    any_rule,
    final,
    node_noise,
    plans,
    toy_denoiser,
    toy_inputs,
    toy_network,
    toy_rule,
)

any_run = {
    "name": st.sampled_from(OF_NOISE),
    "steps": st.sampled_from([1, 2, 5, 8, 10]),
    "eta": st.sampled_from([0.0, 0.7, 1.0]),
    "scale": st.sampled_from([1.0, 3.0]),
    "batch": st.integers(1, 3),
    "parameterization": st.sampled_from(list(TO_EPS)),
    "when": st.sampled_from(["before", "after", "update"]),
}


def guided_run(name, steps, eta, scale, batch, parameterization, when):
    x, cond, uncond = toy_inputs(batch)
    network = toy_network()
    denoiser = toy_denoiser(network, cond, uncond, scale, parameterization)
    return network, denoiser, any_rule(name, steps, eta), x, [prior_noise(x, 0.1, 600, when)]


@given(data=st.data(), **any_run)
def test_batched_decoding_changes_only_speed(data, **run):
    network, denoiser, rule, x, edits = guided_run(**run)
    plan = data.draw(plans(len(rule.nodes)))
    one_by_one = final(denoiser, rule, Plan(plan.num_nodes, plan.keys), x, edits)
    network.encoded.clear()
    network.decoded.clear()
    torch.testing.assert_close(final(denoiser, rule, plan, x, edits), one_by_one, **EXACT)
    images = len(x) * (1 if run["scale"] == 1 else 2)
    assert network.encoded == [images] * len(plan.keys)
    assert network.decoded == [images * len(batch.nodes) for batch in plan.batches()]


@given(**any_run)
def test_every_node_a_key_node_is_the_plain_sampler(**run):
    """And a step is pure: it can be made again, or by another instance, from its state alone."""
    _, denoiser, rule, x, _ = guided_run(**run)
    twin = any_rule(run["name"], run["steps"], run["eta"])
    state = State(x)
    for i, node in enumerate(rule.nodes):
        eps = denoiser.to_eps(denoiser.decode([denoiser.encode(state.x, node.t)], [node.t])[0], state.x, node)
        given, kept = (state.x, eps, *state.memory), [t.clone() for t in (state.x, eps, *state.memory)]
        once, again = rule.step(state, i, eps), twin.step(state, i, eps)
        assert all(map(torch.equal, given, kept)), "a step changes nothing in place"
        assert all(map(torch.equal, (once.x, once.x0, *once.memory), (again.x, again.x0, *again.memory)))
        state = once
    actual = final(denoiser, rule, load_plan("off", len(rule.nodes), parallel=3), x)
    torch.testing.assert_close(actual, state.x, **EXACT)


@given(**{**any_run, "name": st.just("ddim")})
def test_the_loop_with_ddim_is_the_papers_formula(**run):
    _, denoiser, rule, x, _ = guided_run(**run)
    expected = x
    for i, node in enumerate(rule.nodes):
        prediction = denoiser.decode([denoiser.encode(expected, node.t)], [node.t])[0]
        sigma = rule.eta * ((1 - node.abar_next) / (1 - node.abar) * (1 - node.abar / node.abar_next)) ** 0.5
        eps = denoiser.to_eps(prediction, expected, node)
        x0 = (expected - (1 - node.abar) ** 0.5 * eps) / node.abar**0.5
        expected = node.abar_next**0.5 * x0 + (1 - node.abar_next - sigma**2) ** 0.5 * eps + sigma * node_noise(i, x)
    actual = final(denoiser, rule, load_plan("off", len(rule.nodes), parallel=3), x)
    torch.testing.assert_close(actual, expected, **EXACT)


@settings(max_examples=30)
@given(data=st.data(), scale=st.sampled_from([1.0, 4.0]), batch=st.integers(2, 4))
def test_an_image_does_not_depend_on_its_batch(data, scale, batch):
    x, cond, uncond = toy_inputs(batch)
    plan = data.draw(plans(10))
    network = toy_network()
    together = final(toy_denoiser(network, cond, uncond, scale), toy_rule(10), plan, x)
    for b in range(batch):
        one = slice(b, b + 1)
        model = toy_denoiser(network, Conditioning(cond.context[one]), Conditioning(uncond.context[one]), scale)
        torch.testing.assert_close(final(model, toy_rule(10), plan, x[one]), together[one], **EXACT)


def test_a_later_latent_reaches_a_non_key_node_only_through_the_solver():
    x, cond, uncond = toy_inputs(2)
    model = toy_denoiser(toy_network(), cond, uncond, 3.0)
    features = model.encode(x, 981)
    batched = model.decode([features] * 3, [981, 961, 7])
    for t, prediction in zip([981, 961, 7], batched, strict=True):
        torch.testing.assert_close(model.decode([features], [t])[0].out, prediction.out, **EXACT)


def test_fractional_timesteps_reach_the_network():
    x, cond, _ = toy_inputs(1)
    model = Conditional(toy_network(), cond)
    features = model.encode(x, 500.25)
    assert not torch.allclose(features.hidden, model.encode(x, 500).hidden, atol=1e-6)
    one, other = model.decode([features] * 2, [500, 500.25])
    assert not torch.allclose(one.out, other.out, atol=1e-6)


def test_states_are_yielded_after_every_node_with_the_estimate():
    x, cond, uncond = toy_inputs(2)
    states = list(denoise(toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10), load_plan("0,4", 10), x))
    assert len(states) == 10
    assert all(state.x0.shape == x.shape for state in states)


def test_gradients_are_not_kept():
    x, cond, _ = toy_inputs(1)
    network = toy_network().requires_grad_(True)
    assert not final(Conditional(network, cond), toy_rule(2), Plan(2, (0, 1)), x).requires_grad


@pytest.mark.parametrize("parameterization", TO_EPS)
def test_predictions_become_the_noise(parameterization):
    x0, eps = torch.randn(2, 1, CHANNELS, 4, 4, dtype=torch.float64)
    node = Node(500, 0.3, 0.4)
    out = {"eps": eps, "x0": x0, "v": 0.3**0.5 * eps - 0.7**0.5 * x0}[parameterization]
    model = Conditional(toy_network(), toy_inputs(1)[1], parameterization)
    torch.testing.assert_close(model.to_eps(Prediction(out), diffuse(x0, eps, node.abar), node), eps, **EXACT)


def test_guidance_is_linear_in_the_raw_predictions():
    x, cond, uncond = toy_inputs(2)
    network = toy_network()
    outs = {}
    for scale in (0.0, 1.0, 5.0):
        model = Guided(Conditional(network, Conditioning.cat(uncond, cond), "v"), Guidance(scale))
        outs[scale] = model.decode([model.encode(x, 300)], [300])[0].out
    for scale, alone in ((0.0, uncond), (1.0, cond)):
        model = Conditional(network, alone)
        torch.testing.assert_close(outs[scale], model.decode([model.encode(x, 300)], [300])[0].out, **EXACT)
    torch.testing.assert_close(outs[5.0], outs[0.0] + 5 * (outs[1.0] - outs[0.0]), **EXACT)


class Poisoned(nn.Module):
    """A layer whose output is NaN once armed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.armed = False

    def forward(self, x):
        return self.layer(x) * (float("nan") if self.armed else 1)


def test_non_finite_latents_name_node_and_layer():
    x, cond, uncond = toy_inputs(2)
    network = toy_network()
    network.outward[1] = poison = Poisoned(network.outward[1])
    states = denoise(toy_denoiser(network, cond, uncond, 2.0), toy_rule(10), Plan(10, (0, 4), 3), x)
    with pytest.raises(NonFiniteLatents, match=r"after node 7 of 10 \(t = 201\), first in layer outward\.1$"):
        for i, _ in enumerate(states):
            poison.armed = i == 6
    assert not network.outward[1]._forward_hooks, "the hooks of the search are gone"


def test_a_solver_that_overflows_is_not_blamed_on_a_layer():
    x, cond, _ = toy_inputs(1)
    with pytest.raises(NonFiniteLatents, match="node 0 of 5 .*the update overflowed"):
        final(Conditional(toy_network(), cond), toy_rule(5), Plan(5, (0,)), x, [Edit(lambda x, _: x / 0, "update")])


def test_the_first_layer_is_the_innermost():
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), nn.Linear(2, 2))
    assert first_nonfinite_layer(network, lambda: network(torch.ones(1, 2))) is None
    network[1][1].weight.data.fill_(float("nan"))
    assert first_nonfinite_layer(network, lambda: network(torch.ones(1, 2))) == "1.1"


def test_bad_runs_say_why():
    x, cond, uncond = toy_inputs(2)
    model = Conditional(toy_network(), cond)
    with pytest.raises(ValueError, match="plan is for 9 nodes, the solver has 10"):
        final(model, toy_rule(10), Plan(9, (0,)), x)
    with pytest.raises(ValueError, match="starting latents, must be finite"):
        final(model, toy_rule(10), Plan(10, (0,)), x * float("nan"))
    with pytest.raises(ValueError, match="context is for a batch of 2, the latents are 1"):
        final(model, toy_rule(10), Plan(10, (0,)), x[:1])
    with pytest.raises(ValueError, match="one of eps, x0, v"):
        Conditional(toy_network(), cond, "score")
    with pytest.raises(ValueError, match="same parts"):
        Conditioning.cat(cond, Conditioning())
    with pytest.raises(ValueError, match="differ in context"):
        Conditioning.cat(cond, Conditioning(uncond.context[:, :1]))


def test_conditioning_tiles_step_major():
    cond = Conditioning(torch.arange(2).view(2, 1, 1), torch.arange(2).view(2, 1, 1, 1), torch.arange(2))
    for part in cond.tile(3).parts().values():
        assert part.flatten().tolist() == [0, 1] * 3
    assert set(Conditioning(y=torch.arange(2)).tile(2).parts()) == {"y"}


def test_solvers_by_name():
    rule = solver("ddim", ABAR, 30)
    assert rule.nodes == ddim_nodes(ABAR, ddim_timesteps(30)) and len(rule.nodes) == 31
    with pytest.raises(ValueError, match="one of ddim, plms, .*; got 'magic'"):
        solver("magic", ABAR, 30)
    with pytest.raises(ValueError, match="eta"):
        solver("ddim", ABAR, 30, eta=0.5)
    with pytest.raises(ValueError, match="eta must be 0 for heun"):
        solver("heun", ABAR, 30, eta=0.5)
    for name in ("ddpm", "euler-a"):
        with pytest.raises(ValueError, match="needs noise"):
            solver(name, ABAR, 30)


@pytest.mark.parametrize("name", OF_NOISE)
def test_every_solver(name):
    steps, nodes = 20, {"plms": 21, "heun": 39}.get(name, 20)
    assert len(any_rule(name, steps).nodes) == nodes
    assert len(any_rule(name, 1).nodes) == (2 if name == "plms" else 1)
    for bad in (0, 1001):
        with pytest.raises(ValueError, match=r"steps must be 1..1000"):
            any_rule(name, bad)
    for bad in (-1, 20):
        with pytest.raises(ValueError, match="skip must leave at least one of 20 steps"):
            solver(name, ABAR, steps, noise=node_noise, skip=bad)


@pytest.mark.parametrize("name", OF_NOISE)
def test_image_to_image_begins_inside_the_grid(name):
    """A run from an image at a little noise ends near the image, if the network knows it."""
    rule = solver(name, ABAR, 20, noise=node_noise, skip=12)
    whole = any_rule(name, 20)
    assert {node.abar for node in rule.nodes} <= {node.abar for node in whole.nodes}
    assert len(rule.nodes) < len(whole.nodes) / 2 + 1
    image, noise = torch.randn(2, 1, CHANNELS, 4, 4, dtype=torch.float64)
    state = State(diffuse(image, noise, rule.nodes[0].abar))
    for i, node in enumerate(rule.nodes):
        state = rule.step(state, i, (state.x - node.abar**0.5 * image) / (1 - node.abar) ** 0.5)
        torch.testing.assert_close(state.x0, image, rtol=0, atol=1e-9)
    residue = (1 - rule.nodes[-1].abar_next) ** 0.5
    assert (state.x - image).abs().max() <= 5 * residue + 1e-9


def test_prior_noise_adds_a_share_below_a_timestep():
    x, x_T = torch.randn(2, 2, 3, 4, 4)
    before = x.clone()
    edit = prior_noise(x_T)
    torch.testing.assert_close(edit(x, Node(499, 0.5, 0.6)), x + 0.003 * x_T)
    assert torch.equal(edit(x, Node(500, 0.5, 0.6)), x)
    assert torch.equal(prior_noise(x_T, 0)(x, Node(1, 0.5, 0.6)), x)
    assert torch.equal(x, before), "never in place"


@pytest.mark.parametrize("when", ["before", "after", "update"])
def test_each_moment_sees_its_nodes_in_order(when):
    x, cond, _ = toy_inputs(1)
    seen = []
    edit = Edit(lambda x, node: (seen.append(node), x)[1], when)
    rule = toy_rule(5)
    final(Conditional(toy_network(), cond), rule, Plan(5, (0, 3), 2), x, [edit])
    assert tuple(seen) == rule.nodes


@pytest.mark.parametrize(
    "when, encoder_sees, update_sees", [("before", True, True), ("after", False, True), ("update", False, False)]
)
def test_what_a_moment_reaches(when, encoder_sees, update_sees):
    """One node: an edit before it reaches prediction and update, after it the update, else the result."""
    x, cond, _ = toy_inputs(1)
    rule, plan, network = toy_rule(1), Plan(1, (0,)), toy_network()
    edited = final(Conditional(network, cond), rule, plan, x, [Edit(lambda x, _: x + 1, when)])
    model = Conditional(network, cond)
    node = rule.nodes[0]
    eps = model.decode([model.encode(x + encoder_sees, node.t)], [node.t])[0].out
    x0 = (x + update_sees - (1 - node.abar) ** 0.5 * eps) / node.abar**0.5
    expected = node.abar_next**0.5 * x0 + (1 - node.abar_next) ** 0.5 * eps + (not update_sees)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-9)


def test_edits_of_one_moment_apply_in_order():
    x, cond, _ = toy_inputs(1)
    double, add = Edit(lambda x, _: 2 * x, "update"), Edit(lambda x, _: x + 1, "update")
    model = Conditional(toy_network(), cond)
    plain, both = (final(model, toy_rule(1), Plan(1, (0,)), x, edits) for edits in ([], [double, add]))
    torch.testing.assert_close(both, 2 * plain + 1)


def test_inpainting_begins_every_node_from_the_kept_region():
    x, cond, uncond = toy_inputs(2)
    x0 = torch.full_like(x, 0.25)
    mask = torch.zeros(2, 1, 4, 4, dtype=x.dtype)
    mask[:, :, :2] = 1
    began = []
    rule = toy_rule(5)
    edits = [
        inpainting(x0, mask, lambda x, node: node_noise(int(node.t), x)),
        Edit(lambda x, node: (began.append((x, node)), x)[1]),
    ]
    *_, last = denoise(toy_denoiser(toy_network(), cond, uncond, 3.0), rule, load_plan("0,2", 5), x, edits)
    for latents, node in began:
        abar = ABAR[int(node.t)]
        kept = abar.sqrt() * x0 + (1 - abar).sqrt() * node_noise(int(node.t), x)
        torch.testing.assert_close(latents[:, :, :2], kept[:, :, :2])
    assert torch.equal(began[0][0][:, :, 2:], x[:, :, 2:]), "the rest is left alone"
    assert not torch.allclose(last.x[:, :, :2], x0[:, :, :2], atol=1e-4), "no paste after the last step"


def test_bad_edits_say_why():
    with pytest.raises(ValueError, match="one of before, after, update; got 'during'"):
        Edit(lambda x, node: x, "during")
    with pytest.raises(ValueError, match="0 or more; got -1"):
        prior_noise(torch.zeros(1), -1)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and the latents \(1, 3, 4, 4\)"):
        prior_noise(torch.zeros(2, 3, 4, 4))(torch.zeros(1, 3, 4, 4), Node(1, 0.5, 0.6))
