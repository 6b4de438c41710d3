"""Outputs of cross-attention that are kept (T-GATE, arXiv 2404.02747): the published rule, any solver, costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.denoiser import BatchBackoff, Conditional, Conditioning, Guidance, Guided
from ldm.models.diffusion.loop import Rule, State, inpainting
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Compute, Plan
from ldm.modules.attention import AttentionOutputs, BasicTransformerBlock
from ldm.profiling.cost import count_macs, kept_bytes, unet_macs
from ldm.profiling.workload import random_network
from tests.helpers.tiny_unet import unet_config
from tests.helpers.toy import any_rule, final, toy_denoiser, toy_inputs, toy_network, toy_rule

SCALE = 3.0
GUIDANCE = Guidance(SCALE)


@cache
def network() -> DiffusionWrapper:
    return random_network({"unet_config": unet_config()})


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Starting latents, tokens of the condition and of the unconditional one."""
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16), (5, 16)))


def denoiser(cond: Tensor, uncond: Tensor, guidance: Guidance = GUIDANCE) -> Guided:
    both, alone = (network().project(Conditioning(tokens)) for tokens in (torch.cat([uncond, cond]), cond))
    return Guided(Conditional(network(), both), guidance, Conditional(network(), alone))


@contextmanager
def watched(change: Callable[[nn.Module, Tensor], Tensor | None]) -> Iterator[None]:
    """change(layer, output) of every cross-attention replaces its output, unless it is None."""
    layers = [block.attn2 for block in network().modules() if isinstance(block, BasicTransformerBlock)]
    hooks = [layer.register_forward_hook(lambda layer, _, out: change(layer, out)) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def by_hand(rule: Rule, keys: set[int], x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    """The published rule: guidance at key nodes; at the others the conditional half alone, cross-attention giving the
    mean of what it gave for both halves at the key node before."""
    unet, kept, state = network().diffusion_model, {}, State(x)

    def keep(layer: nn.Module, out: Tensor) -> None:
        kept[layer] = out.unflatten(0, (2, -1)).mean(0)

    for i, node in enumerate(rule.nodes):
        t = torch.tensor([node.t] * len(x))
        if i in keys:
            with watched(keep):
                out = unet(torch.cat([state.x] * 2), torch.cat([t, t]), torch.cat([uncond, cond]))
            without, with_text = out.chunk(2)
            eps = without + SCALE * (with_text - without)
        else:
            with watched(lambda layer, _: kept[layer]):
                eps = unet(state.x, t, torch.full_like(cond, torch.nan))  # the text is not read
        state = rule.step(state, i, eps)
    return state.x


def assert_same(latents: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddim", "unipc", "heun", "euler-a"])
@pytest.mark.parametrize("spec, keys", [("tgate:2", {0, 1}), ("tgate:0,2-3", {0, 2, 3})])
def test_the_published_rule_with_any_solver(solver, spec, keys):
    x, cond, uncond = inputs(2)
    rule = any_rule(solver, 5)
    plan = load_plan(spec, len(rule.nodes))
    assert {*plan.keys} == keys and plan.levels == {Compute.GATED}
    expected = by_hand(rule, keys, x, cond, uncond)
    assert_same(final(denoiser(cond, uncond), rule, plan, x), expected)
    assert_same(final(BatchBackoff(denoiser(cond, uncond)), rule, replace(plan, parallel=4), x), expected)


def test_a_gate_at_the_end_is_the_plain_run():
    x, cond, uncond = inputs(1)
    rule, model = toy_rule(4), denoiser(cond, uncond)
    plain = final(model, rule, load_plan("off", 4), x)
    assert torch.equal(final(model, rule, load_plan("tgate:4", 4), x), plain)
    assert load_plan("tgate:9", 4).plain
    assert (final(model, rule, load_plan("tgate:3", 4), x) - plain).abs().max() > 0.001


def test_outputs_of_one_half_are_kept_as_they_are():
    """Where guidance had ended at the key node."""
    x, cond, uncond = inputs(1)
    model, t, kept = denoiser(cond, uncond), 500.0, {}
    alone = model.conditional.recording(kept)
    expected = alone.decode([alone.encode(x, t)], [t])[0].out
    gated = model.gated(AttentionOutputs(kept))
    assert torch.equal(gated.decode([gated.encode(x, t)], [t])[0].out, expected)


def test_edits_budgets_and_forecasts_go_with_it():
    x, cond, uncond = inputs(1)
    rule, model = toy_rule(5), denoiser(cond, uncond)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    edit = inpainting(x, mask, lambda x, node: torch.zeros_like(x))
    held = final(model, rule, load_plan("tgate:0,3", 5), x)
    linear = final(model, rule, load_plan("tgate:0,3", 5, propagate="linear"), x)
    assert (held - linear).abs().max() > 1e-5 * held.abs().max()
    assert torch.isfinite(final(model, rule, load_plan("tgate:2", 5), x, [edit])).all()
    strict = BudgetPlan(load_plan("tgate:1", 5), 1e-9)
    assert_same(final(model, rule, strict, x), final(model, rule, load_plan("off", 5), x))


def test_two_values_make_a_line():
    layer = nn.Identity()
    parts = [AttentionOutputs({layer: torch.full((1, 2, 3), value)}) for value in (1.0, 2.0)]
    assert (AttentionOutputs.combine(parts, [-1.0, 2.0]).layers[layer] == 3).all()


def test_costs_are_those_of_what_runs():
    x, cond, uncond = inputs(1)
    rule, model, plan = toy_rule(4), denoiser(cond, uncond), load_plan("tgate:2", 4)
    unit = unet_macs(network().diffusion_model, (8, 8), 1, 5)
    images = GUIDANCE.images(plan.computes(), [node.t for node in rule.nodes])
    assert images == [2, 2, 1, 1]
    assert unit.run(plan, images=images) - 2 * unit.once == count_macs(lambda: final(model, rule, plan, x))
    assert unit.critical_path(plan, images=images) == unit.run(plan, images=images)
    assert unet_macs(network().diffusion_model, (8, 8), 2, 5).gated == unit.gated < unit.whole
    kept: dict[nn.Module, Tensor] = {}
    alone = model.conditional.recording(kept)
    alone.decode([alone.encode(x, 5.0)], [5.0])
    held = kept_bytes(network().diffusion_model, (8, 8), 5)
    assert held.attention == sum(out.nbytes for out in kept.values()) > 0
    assert held.added(plan, 2) == 2 * held.attention


def test_networks_without_cross_attention_are_refused():
    x, cond, uncond = toy_inputs(1)
    with pytest.raises(ValueError, match="networks that have it; this one has none"):
        final(toy_denoiser(toy_network(), cond, uncond, 3.0), toy_rule(4), load_plan("tgate:1", 4), x)


@pytest.mark.parametrize(
    "spec, why",
    [
        ("tgate:0", "tgate:M needs M >= 1, the number of first steps that run in full; got 0"),
        ("tgate:2:1", "only deepcache and encoder take a number of blocks"),
        ("tgate:auto", "unknown plan 'auto'"),
        ("tgate:2+skip:4", "after a step at the level tgate comes another or a key step; got 4"),
        ("off+tgate:0", "must be 1..7"),
    ],
)
def test_bad_plans_say_why(spec, why):
    with pytest.raises(ValueError, match=why):
        load_plan(spec, 8)


def test_steps_can_be_set_apart_and_are_told():
    plan = load_plan("skip:3+full:5-7+tgate:6", 8)
    assert plan.gated == (6,) and plan.keys == (0, 3, 5, 7)
    assert plan.settings()["gated"] == [6]
    with pytest.raises(ValueError, match="gated nodes must be 1..3"):
        Plan(4, (0, 1), gated=(1, 2, 3))
