"""The outputs of a UNet's blocks, on cases that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.plots.features import (
    block_outputs,
    change,
    decoder_ends,
    encoder_ends,
    evolution,
    frobenius,
    plain_outputs,
)
from ldm.models.diffusion.denoiser import Conditional, Conditioning
from ldm.models.diffusion.loop import State, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.modules.diffusionmodules.dit import DiT
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers.goldens import recipe_weights
from tests.helpers.toy import toy_denoiser, toy_inputs, toy_network, toy_rule

EXACT = {"rtol": 0, "atol": 1e-9}


def test_change_is_equation_2_by_hand():
    now, before = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    now[1, 0, 0, 0], before[1, 2, 1, 1] = 3.0, 1.0
    np.testing.assert_allclose(change(now, before), [0, (9 + 1) / (3 * 2 * 2)])  # 1 / (d s^2) times the square


def test_frobenius_is_of_the_channels_mean():
    output = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 5.0)])[None]
    np.testing.assert_allclose(frobenius(output), [math.sqrt(4 * 3**2)])


def test_what_does_not_change_has_no_evolution():
    outputs = {"E8": torch.rand(2, 3, 4, 4), "D8": torch.rand(2, 3, 4, 4)}
    found = evolution(iter([outputs] * 5))
    assert all((values == 0).all() and values.shape == (4, 2) for values in found.absolute.values())
    assert all((values == 0).all() for values in found.relative.values())
    assert all(np.ptp(values, axis=0).max() == 0 and values.shape == (5, 2) for values in found.norm.values())


def test_relative_change_does_not_know_the_scale():
    run = [{"B": torch.rand(1, 2, 3, 3)} for _ in range(3)]
    one, ten = evolution(iter(run)), evolution({"B": 10 * o["B"]} for o in run)
    np.testing.assert_allclose(ten.absolute["B"], 100 * one.absolute["B"], rtol=1e-5)
    np.testing.assert_allclose(ten.relative["B"], one.relative["B"], rtol=1e-5)
    np.testing.assert_allclose(ten.norm["B"], 10 * one.norm["B"], rtol=1e-5)


def test_one_step_is_no_evolution():
    with pytest.raises(ValueError, match="at least 2 steps"):
        evolution(iter([{"B": torch.zeros(1, 1, 1, 1)}]))


def test_blocks_end_where_the_resolution_changes():
    sizes = [64, 64, 64, 32, 32, 32, 16, 16]  # two residual blocks a level, then the layer that halves
    assert encoder_ends(sizes) == [(3, 64), (6, 32), (7, 16)]
    assert decoder_ends(sizes) == [(6, 16), (3, 32), (0, 64)]
    assert encoder_ends([8, 8]) == [(1, 8)] and decoder_ends([8, 8]) == [(0, 8)]


def wrapped_unet() -> tuple[UNetModel, Any]:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = recipe_weights(UNetModel(8, 3, 64, 3, 1, [], channel_mult=(1, 2), num_heads=1), seed=1)

        def encode(self, x, t, cond, tome):
            return self.unet.encode(x, t)

        def advance(self, features, t, cond, blocks, tome):
            return self.unet.advance(features, t, blocks=blocks)

    network = Network()
    return network.unet, Conditional(network, Conditioning())


def test_block_outputs_are_what_the_modules_put_out():
    unet, model = wrapped_unet()
    seen: dict[str, torch.Tensor] = {}

    def watch(name, module):
        return module.register_forward_hook(lambda m, i, output: seen.__setitem__(name, output))

    handles = [watch(f"in{i}", block) for i, block in enumerate(unet.input_blocks)]
    handles += [watch(f"out{i}", block) for i, block in enumerate(unet.output_blocks)]
    handles.append(watch("mid", unet.middle_block))
    x = torch.rand(2, 3, 8, 8)
    unet(x, torch.tensor([5.0, 5.0]))
    for handle in handles:
        handle.remove()
    outputs = block_outputs(model, x, 5.0)
    assert [*outputs] == ["E8", "E4", "B", "D4", "D8"]
    for name, module in zip(outputs, ("in2", "in3", "mid", "out1", "out3"), strict=True):
        torch.testing.assert_close(outputs[name], seen[module], rtol=0, atol=1e-6)
        assert (outputs[name] - block_outputs(model, x, 500.0)[name]).abs().max() > 1e-3


def test_tokens_of_a_transformer_are_maps_of_the_places_that_they_are_of():
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            network = DiT(8, 2, 4, 32, 3, 4, num_classes=2, encoder_blocks=2)
            self.transformer = recipe_weights(network, seed=1)

        def encode(self, x, t, cond, tome):
            return self.transformer.encode(x, t, y=cond.y)

        def decode(self, features, t, cond, tome):
            return self.transformer.decode(features, t, y=cond.y)

    network, x, y = Network(), torch.rand(2, 4, 8, 8), torch.tensor([0, 1])
    outputs = block_outputs(Conditional(network, Conditioning(y=y)), x, 5.0)
    assert [*outputs] == ["E0", "E1", "D2"]
    tokens = network.transformer.encode(x, torch.tensor([5.0, 5.0]), y=y).hidden  # (B, T, D), row by row
    assert outputs["E1"].shape == (2, 32, 4, 4)
    torch.testing.assert_close(outputs["E1"][:, :, 1, 3], tokens[:, 7], rtol=0, atol=0)
    assert not any(block._forward_hooks for block in network.transformer.blocks)


def test_the_run_is_the_plain_run_and_its_conditional_half():
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(4)
    guided, plain = toy_denoiser(network, cond, uncond, 3.0), load_plan("off", 4)
    *_, last = plain_outputs(guided, rule, x)
    *_, state, _ = (State(x), *denoise(guided, rule, plain, x))
    conditional = block_outputs(toy_denoiser(network, cond, uncond, 1.0), state.x, rule.nodes[-1].t)
    for name, output in conditional.items():
        torch.testing.assert_close(last[name], output, **EXACT)
