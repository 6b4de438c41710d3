from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.denoiser import Conditional
from ldm.models.diffusion.loop import Edit, denoise, inpainting, prior_noise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node
from tests.helpers.toy import ABAR, final, node_noise, toy_denoiser, toy_inputs, toy_network, toy_rule


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
