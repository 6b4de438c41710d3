"""ControlNet against the published implementation: its outputs, and what they do to a UNet's prediction."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from ldm.models.diffusion.control import Control, Controlled
from ldm.models.diffusion.ddpm.latent import DiffusionWrapper
from ldm.models.diffusion.denoiser import Conditioning
from ldm.modules.diffusionmodules.controlnet import ControlNet, guess_weights
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_weights
from tests.helpers.tiny_unet import TARGET

NAMES = ("controlnet", "controlnet_time")


@cache
def networks(name: str) -> tuple[ControlNet, DiffusionWrapper]:
    case, tensors = load_case(name)
    unet = DiffusionWrapper({"target": TARGET, "params": case["unet_kwargs"]}, "crossattn")
    if "unet_weights_in" in case:
        from_recipe(unet.diffusion_model, *load_case(case["unet_weights_in"].removesuffix(".safetensors")))
    else:
        recipe_weights(unet.diffusion_model, **case["unet_weight_recipe"], sums=case["unet_weights"])
    return from_recipe(ControlNet(**case["kwargs"]), case, tensors), unet


def predicted(name: str, *weights: list[float], guess: bool = False, times: int = 1) -> torch.Tensor:
    """The UNet's prediction with as many controls as there are lists of weights; the batch `times` over."""
    (_, tensors), (network, unet) = load_case(name), networks(name)
    hint = tensors["hint"].float()
    controlled = Controlled(unet, [Control.of(network, hint, one) for one in weights], guess) if weights else unet
    x, t, context = (
        tensors[key].repeat(times, *[1] * (tensors[key].ndim - 1)) for key in ("x", "timesteps", "context")
    )
    with torch.no_grad():
        cond = controlled.project(Conditioning(context))
        return controlled.decode(controlled.encode(x, t, cond), t, cond)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_published_ones(name):
    (case, tensors), (network, _) = load_case(name), networks(name)
    with torch.no_grad():
        assert_golden(network.read(tensors["hint"].float()), tensors["hint_encoded"], case)
        out = network(tensors["x"], tensors["hint"].float(), tensors["timesteps"], tensors["context"])
    assert len(out) == network.residuals == 5
    for i, residual in enumerate(out):
        assert_golden(residual, tensors[f"control.{i}"], case)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_under_control_are_the_published_ones(name):
    case, tensors = load_case(name)
    scales = case["scales_for_out_scaled"]
    assert_golden(predicted(name), tensors["out_no_control"], case)
    assert_golden(predicted(name, [1.0] * 5), tensors["out_controlled"], case)
    assert_golden(predicted(name, [0.0] * 4 + [1.0]), tensors["out_only_mid"], case)
    assert_golden(predicted(name, scales), tensors["out_scaled"], case)
    # Two controls add up.
    assert_golden(predicted(name, [0.25] * 5, [0.75] * 5), tensors["out_controlled"], case)


def test_guess_mode_controls_the_conditional_half_alone():
    case, tensors = load_case("controlnet_time")
    weights = guess_weights(0.9, 5)
    assert weights == pytest.approx(case["scales_for_out_scaled"], abs=1e-6)
    uncond, cond = predicted("controlnet_time", weights, guess=True, times=2).chunk(2)
    assert_golden(uncond, tensors["out_no_control"], case)
    assert_golden(cond, tensors["out_scaled"], case)
    assert_golden(predicted("controlnet_time", weights, guess=True), tensors["out_scaled"], case)


def test_a_part_of_the_encoder_anew_has_that_part_of_the_control():
    """As at a shallow node: the first blocks' outputs are those of the whole encoder, the others are kept."""
    (_, tensors), (network, unet) = load_case("controlnet_time"), networks("controlnet_time")
    x, t, cond = tensors["x"], tensors["timesteps"], Conditioning(tensors["context"])
    controlled = Controlled(unet, [Control.of(network, tensors["hint"].float())])
    with torch.no_grad():
        before, now = controlled.encode(x.flip(0), t, cond), controlled.encode(x, t, cond)
        fresh = controlled.refresh(before, x, t, cond, 2)
    for i, skip in enumerate(fresh.skips):
        torch.testing.assert_close(skip, (now if i < 2 else before).skips[i], rtol=0, atol=1e-5)
    assert torch.equal(fresh.hidden, before.hidden)


def test_control_anew_keeps_the_encoder_and_replaces_what_is_added():
    (_, tensors), (network, unet) = load_case("controlnet_time"), networks("controlnet_time")
    x, t, cond = tensors["x"], tensors["timesteps"], Conditioning(tensors["context"])
    controlled = Controlled(unet, [Control.of(network, tensors["hint"].float())], anew=True)
    with torch.no_grad():
        key, other = unet.encode(x, t, cond), x.flip(0)
        fresh = controlled.refresh(controlled.encode(x, t, cond), other, t // 2, cond, 0)
        added = network(other, tensors["hint"].float(), t // 2, cond.context)
    expected = key.plus(added)
    for one, two in zip(fresh.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_before_training_nothing_is_added():
    case, tensors = load_case("controlnet_time")
    network = ControlNet(**case["kwargs"])
    assert all(
        (out == 0).all() for out in network(*(tensors[k].float() for k in ("x", "hint", "timesteps", "context")))
    )


def test_a_image_that_does_not_fit_is_refused():
    (_, tensors), (network, _) = load_case("controlnet_time"), networks("controlnet_time")
    x, t, context = tensors["x"], tensors["timesteps"], tensors["context"]
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), H and W multiples of 8; got \(2, 1, 64, 64\)"):
        network(x, torch.zeros(2, 1, 64, 64), t, context)
    with pytest.raises(ValueError, match="must have 64 x 64 pixels; got 32 x 64"):
        network(x, torch.zeros(2, 3, 64, 32), t, context)
    with pytest.raises(ValueError, match="5, one of each residual; got 2"):
        Control.of(network, torch.zeros(2, 3, 64, 64), [1.0, 1.0])


def test_features_say_how_many_residuals_they_take():
    (_, tensors), (_, unet) = load_case("controlnet_time"), networks("controlnet_time")
    with torch.no_grad():
        features = unet.encode(tensors["x"], tensors["timesteps"], Conditioning(tensors["context"]))
    with pytest.raises(ValueError):
        features.plus([torch.zeros(())] * 3)
    assert replace(features, alone=features).alone is features
