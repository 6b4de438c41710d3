"""Decoder nodes that hold the features of a key timestep share what depends on these alone: the same run, sooner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.denoiser import BatchBackoff, Conditioning, Guidance, Wrapper
from ldm.models.diffusion.loop import Edit, State, inpainting, prior_noise
from ldm.models.diffusion.propagation.online import OnlinePlan
from ldm.models.diffusion.propagation.plan import AnyPlan, Plan
from ldm.modules.diffusionmodules.util import Features, PartWeights
from ldm.profiling.cost import WarmUp, decoder_bytes, peak_bytes, shared_bytes
from ldm.profiling.workload import random_network
from tests.helpers.tiny_unet import unet_config
from tests.helpers.toy import EXACT, ToyNetwork, final, toy_denoiser, toy_inputs, toy_network, toy_rule

GUIDANCE = {"none": 1.0, "always": 3.0, "interval": Guidance(3.0, (100, 700)), "reuse": Guidance(3.0, reuse=True)}


class Unshared(Wrapper):
    """A denoiser whose nodes share nothing."""

    def share(self, features: Features) -> Features:
        return features


@cache
def small_network() -> DiffusionWrapper:
    return random_network({"unet_config": unet_config()})


def inputs(batch: int) -> tuple[Tensor, Conditioning, Conditioning]:
    """Starting latents, conditioning and unconditional one."""
    generator = torch.Generator().manual_seed(7)
    x, cond, uncond = (torch.randn(batch, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16), (5, 16)))
    return x, Conditioning(cond), Conditioning(uncond)


def assert_same(latents: Tensor, expected: Tensor) -> None:
    """Up to rounding, which early nodes multiply: the latents of these networks reach 30."""
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_a_run_that_shares_is_the_run_that_does_not(guidance, parallel):
    x, cond, uncond = inputs(2)
    model, rule, plan = toy_denoiser(small_network(), cond, uncond, GUIDANCE[guidance]), toy_rule(8), Plan(8, (0, 3, 7))
    expected = final(Unshared(model), rule, plan, x)
    assert_same(final(model, rule, Plan(8, plan.keys, parallel), x), expected)


@pytest.mark.parametrize("edit", ["prior noise", "mask"])
def test_a_run_that_shares_is_edited_alike(edit):
    x, cond, uncond = inputs(1)
    mask = (torch.arange(64).view(1, 1, 8, 8) % 3 == 0).float()
    edits: dict[str, Edit] = {
        "prior noise": prior_noise(x, 0.1, 600),
        "mask": inpainting(x / 2, mask, lambda image, node: torch.full_like(image, node.t / 1000)),
    }
    model, rule, plan = toy_denoiser(small_network(), cond, uncond, 3.0), toy_rule(5), Plan(5, (0, 2), 4)
    expected = final(Unshared(model), rule, plan, x, [edits[edit]])
    assert not torch.allclose(expected, final(model, rule, plan, x), atol=1e-3)
    assert_same(final(model, rule, plan, x, [edits[edit]]), expected)


@pytest.mark.parametrize("parallel", [1, 3, 10])
@pytest.mark.parametrize(
    "plan, shared",
    [
        (Plan(10, (0, 1, 4, 9)), [2, 2]),  # no node follows nodes 0 and 9
        (Plan(10, (0, 6), propagate="linear"), []),
        (Plan(10, (0, 6), propagate="zeros"), []),
        (Plan(10, (0, 6), refresh=1), []),
        (Plan(10, (0, 6), shallow=(3,), branch=1), []),
        (Plan(10, (0, 6), skipped=(7, 8, 9)), [2]),  # nothing runs at the others
        (Plan(10, tuple(range(10))), []),
        (OnlinePlan(10, 1e9), [2]),
        (OnlinePlan(10, 1e-9), []),
    ],
    ids=str,
)
def test_features_are_shared_once_per_key_node_that_others_follow(plan, shared, parallel):
    x, cond, uncond = toy_inputs(1)
    network = toy_network()
    plan = type(plan)(**vars(plan) | {"parallel": parallel})
    final(toy_denoiser(network, cond, uncond, 3.0), toy_rule(10), plan, x)
    assert network.shared == shared


def test_with_every_node_a_key_node_not_a_byte_changes():
    x, cond, uncond = inputs(2)
    model, rule = toy_denoiser(small_network(), cond, uncond, 3.0), toy_rule(4)
    state = State(x)
    for i, node in enumerate(rule.nodes):
        (prediction,) = model.decode([model.encode(state.x, node.t)], [node.t])
        state = rule.step(state, i, model.to_eps(prediction, state.x, node))
    assert torch.equal(final(model, rule, Plan(4, (0, 1, 2, 3)), x), state.x)


def test_the_key_node_of_a_serial_run_is_that_of_a_plain_one():
    x, cond, uncond = inputs(1)
    model, rule = toy_denoiser(small_network(), cond, uncond, 3.0), toy_rule(2)
    predictions: list[Tensor] = []

    class Listening(Wrapper):
        def decode(self, features: Sequence[Features], ts: Sequence[float], last: Any = None) -> list[Any]:
            found = super().decode(features, ts, last)
            predictions.extend(prediction.out for prediction in found)
            return found

    for plan in (Plan(2, (0, 1)), Plan(2, (0,))):
        final(Listening(model), rule, plan, x)
    assert torch.equal(predictions[0], predictions[2]) and not torch.equal(predictions[1], predictions[3])


class NoRoomToShare(ToyNetwork):
    def share(self, features: Features, weights: Sequence[PartWeights]) -> Features:
        super().share(features, weights)
        raise torch.OutOfMemoryError("no room")


def test_without_memory_to_share_the_run_goes_on():
    x, cond, uncond = toy_inputs(1)
    rule, plan = toy_rule(5), Plan(5, (0, 3), 4)
    expected = final(toy_denoiser(toy_network(), cond, uncond, 3.0), rule, plan, x)
    torch.manual_seed(5)  # the weights of toy_network
    network = NoRoomToShare().requires_grad_(False)
    model = toy_denoiser(network, cond, uncond, 3.0)
    torch.testing.assert_close(final(BatchBackoff(model), rule, plan, x), expected, **EXACT)
    assert network.shared == [2, 2]


def test_a_warm_up_meets_what_a_run_calls():
    x, cond, _ = inputs(1)
    network, first_calls = small_network(), {}
    warm_up = WarmUp(network, first_calls, torch.device("cpu"))
    assert final(toy_denoiser(warm_up, cond, cond, 1.0), toy_rule(4), Plan(4, (0,), 3), x).isfinite().all()
    shared = {("part_weights",), ("share", 1), ("decode", 3, 4, True), ("decode", 1, 4, True)}
    assert {*first_calls} == {("encode", 1), *shared}


@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_decoders_that_share_hold_no_more_than_estimated(nodes):
    unet = small_network().diffusion_model
    each = decoder_bytes(unet, (8, 8), batch=2, context_length=7)
    context = torch.randn(2, 7, 16)
    features = unet.encode(torch.randn(2, 4, 8, 8), torch.full((2,), 900.0), context)
    t, tiled = torch.full((2 * nodes,), 500.0), context.repeat(nodes, 1, 1)
    held = peak_bytes(lambda: unet.decode(unet.share(features, unet.part_weights()), t, tiled))
    assert each < held <= nodes * each + shared_bytes(unet)


def test_batches_of_any_size_that_share_are_exact():
    x, cond, uncond = toy_inputs(2)
    model, rule = toy_denoiser(toy_network(), cond, uncond, GUIDANCE["reuse"]), toy_rule(10)
    plans: list[AnyPlan] = [Plan(10, (0, 4, 5), parallel) for parallel in (1, 2, 10)]
    expected = final(Unshared(model), rule, plans[0], x)
    for plan in plans:
        torch.testing.assert_close(final(model, rule, plan, x), expected, **EXACT)
