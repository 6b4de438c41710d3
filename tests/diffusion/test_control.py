"""Runs under control against recorded trajectories of the released code, and the two laws."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import islice

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.control import Control, Controlled
from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.loop import denoise, prior_noise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_weights
from tests.helpers.tiny_unet import TARGET

TIMED = "controlnet_trajectory_plain"


@cache
def networks(name: str) -> tuple[DDPM, ControlNet]:
    """The networks of the cases that depend on the time, or of the older ones."""
    case, tensors = load_case(TIMED if name == TIMED else "propagation_controlnet_weights")
    unet_case, unet_tensors = (case, {}) if name == TIMED else load_case("propagation_unet")
    ddpm = DDPM(
        {"target": TARGET, "params": unet_case.get("unet_kwargs") or unet_case["kwargs"]},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        conditioning_key="crossattn",
    )
    unet, control = ddpm.model.diffusion_model, ControlNet(**case["kwargs"])
    if name == TIMED:
        recipe_weights(unet, **case["unet_weight_recipe"], sums=case["unet_weights"])
        return ddpm, from_recipe(control, case, tensors)
    from_recipe(unet, unet_case, unet_tensors)
    recipe_weights(control, **case["weight_recipe"])
    for key, weight in control.named_parameters():
        weight.data.mul_(0.5 if key.startswith(("zero_convs.", "middle_block_out.")) else 1.0)
    for key, (_, total) in case["weights"].items():
        assert control.get_parameter(key).double().sum().item() == pytest.approx(total, abs=2e-3)
    return ddpm, control


def run(
    name: str, plan: Plan, parts: tuple[dict, dict], order: str = "after", anew: bool = False, nodes: int = 50
) -> list[Tensor]:
    """The latents that enter each of the first so many updates, and those after the last of them."""
    (case, tensors), (ddpm, control) = parts, networks(name)
    x_T = tensors.get("x_T", tensors.get("latents"))
    with torch.no_grad():
        controlled = Controlled(ddpm.model, [Control.of(control, tensors["hint"].float())], anew=anew)
    embeds = tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
    denoiser = ddpm.denoiser(*embeds, case["guidance_scale"], network=controlled)
    into: list[Tensor] = []

    class Recording(DDIM):
        def step(self, state, i, eps):
            into.append(state.x)
            return super().step(state, i, eps)

    rule = Recording(ddim_nodes(ddpm.alphas_cumprod, ddim_timesteps(plan.num_nodes)))
    states = denoise(denoiser, rule, plan, x_T, [prior_noise(x_T, case["noise_alpha"], when=order)])
    *_, last = islice(states, nodes)
    return [*into, last.x]


@pytest.mark.parametrize(
    "name, parallel, nodes",
    [
        ("controlnet_trajectory_plain", 1, 12),
        ("controlnet_trajectory_50ls", 1, 50),
        ("controlnet_trajectory_50ls_noise", 50, 50),
        ("propagation_controlnet_full", 1, 12),
        ("propagation_controlnet_50ls", 1, 50),
        ("propagation_controlnet_50ls_noise", 50, 50),
    ],
)
def test_trajectories_of_the_released_code(name, parallel, nodes):
    """Plain, one decoder at a time, and in batches: the two laws, with recorded numbers."""
    case, tensors = load_case(name)
    keys = case.get("key_steps") or [call["order"] for call in case["unet_calls"]] or range(50)
    latents = run(TIMED if "key_steps" in case else name, Plan(50, tuple(keys), parallel), (case, tensors), nodes=nodes)
    recorded = [(j, i) for j, i in enumerate(tensors["step_idx"].tolist()) if i < nodes]
    assert len(recorded) >= 5
    for j, i in recorded:
        assert_golden(latents[i], tensors["into_step"][j], case)
    if nodes == 50:
        assert_golden(latents[-1], tensors["final"], case)


@cache
def final(plan: Plan, anew: bool = False, order: str = "after", noise: float = 0.0) -> Tensor:
    case, tensors = load_case("controlnet_trajectory_50ls_noise")
    return run(TIMED, plan, (case | {"noise_alpha": noise}, tensors), order, anew)[-1]


def test_control_at_every_step():
    """With every node a key node it is the plain run; else the control's part is of its own step and latent."""
    whole, held = Plan(5, tuple(range(5))), Plan(5, (0, 2))
    torch.testing.assert_close(final(replace(whole, control=True), anew=True), final(whole), rtol=0, atol=1e-4)
    anew = final(replace(held, control=True, parallel=5), anew=True)
    assert torch.equal(anew, final(replace(held, control=True), anew=True))  # none share a batch
    assert (anew - final(held)).abs().max() > 0.1 and (anew - final(whole)).abs().max() > 0.1


def test_noise_before_the_prediction_reaches_the_control():
    plan = Plan(5, (0, 2, 4))
    assert (final(plan, order="before", noise=0.5) - final(plan, order="after", noise=0.5)).abs().max() > 0.1


def test_plans_say_where_control_runs():
    plan = Plan(6, (0, 3), parallel=6, control=True)
    assert (
        plan.settings()["control_at_every_node"] is True
        and "control_at_every_node" not in replace(plan, control=False).settings()
    )
    assert [len(batch.nodes) for batch in plan.batches()] == [1] * 6
    for other in ({"propagate": "linear"}, {"shallow": (1,), "branch": 1}, {"skipped": (1,)}):
        with pytest.raises(ValueError, match="only with plans that hold features for the decoder"):
            replace(plan, **other)
