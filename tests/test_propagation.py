"""Encoder propagation against recorded trajectories of the released code."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from contracts import assert_golden, from_recipe, load_case

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.edits import Edit, prior_noise
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.plan import load_plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps

SD_CASES = {
    "full_ddim50": "off",
    "full_ddim50_noise": "off",
    "serial_50ls": "faster-diffusion",
    "serial_50ls_noise": "faster-diffusion",
    "serial_50ls_nocfg": "faster-diffusion",
    "serial_50ls_alpha1": "faster-diffusion",
    "parallel_50ls": "faster-diffusion",
    "parallel_50ls_noise": "faster-diffusion",
    "parallel_50ls_alpha1": "faster-diffusion",
    "serial_mod4": "uniform:4",
    "serial_mod4_noise": "uniform:4",
    "parallel_mod4_noise": "uniform:4",
}


@cache
def model(name: str) -> DDPM:
    case, tensors = load_case(name)
    kwargs = case.get("kwargs") or case["unet_kwargs"]
    schedule = case.get("schedule", {"linear_start": 0.00085, "linear_end": 0.012})
    ddpm = DDPM(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": kwargs},
        linear_start=schedule["linear_start"],
        linear_end=schedule["linear_end"],
        use_ema=False,
        conditioning_key="crossattn",
    )
    sums = {key: value for key, value in case["weights"].items() if not key.startswith("cond_stage_model.")}
    from_recipe(ddpm.model.diffusion_model, {**case, "weights": sums}, tensors)
    return ddpm


def recorded_run(ddpm, steps, plan, cond, uncond, scale, x_T, edits):
    """Final latents; and per node what entered the update and what left it, before any edit of the latter."""
    rule = DDIM(ddim_nodes(ddpm.alphas_cumprod, ddim_timesteps(steps)))
    into, left = [], []
    edits = [
        Edit(lambda x, _: (left.append(x), x)[1], "update"),
        *edits,
        Edit(lambda x, _: (into.append(x), x)[1], "after"),
    ]
    *_, state = denoise(ddpm.denoiser(cond, uncond, scale), rule, plan, x_T, edits)
    return state.x, into, left, rule.nodes


def implied_eps(x, x_next, node):
    """The eps that the deterministic DDIM update from x to x_next used."""
    a, b = node.abar**0.5, node.abar_next**0.5
    s, u = (1 - node.abar) ** 0.5, (1 - node.abar_next) ** 0.5
    return (x_next.double() - b / a * x.double()) / (u - b * s / a)


@pytest.mark.parametrize(
    "name, parallel",
    [
        (name, parallel)
        for name, plan in SD_CASES.items()
        for parallel in ((1,) if plan == "off" else (1, 4, 50))
    ],
)
def test_released_trajectories(name, parallel):
    case, tensors = load_case(f"propagation_{name}")
    x_T = tensors["latents"]
    order = "after" if case["mode"] == "parallel" else "before"
    final, into, left, nodes = recorded_run(
        model("propagation_unet"),
        case["S"],
        load_plan(SD_CASES[name], 50, parallel),
        tensors["prompt_embeds"],
        tensors["negative_prompt_embeds"],
        case["guidance_scale"],
        x_T,
        [prior_noise(x_T, case["noise_alpha"], when=order)],
    )
    assert [node.t for node in nodes] == tensors["scheduler_timesteps"].tolist()
    for j, i in enumerate(tensors["step_idx"].tolist()):
        assert_golden(into[i], tensors["into_step"][j], case)
        assert_golden(left[i], tensors["after_step"][j], case)
    assert_golden(final, tensors["final"], case)


def test_released_predictions():
    """The guided noise itself, at early nodes where it can be read off the update well."""
    case, tensors = load_case("propagation_serial_50ls")
    _, into, left, nodes = recorded_run(
        model("propagation_unet"),
        50,
        load_plan("faster-diffusion", 50),
        tensors["prompt_embeds"],
        tensors["negative_prompt_embeds"],
        7.5,
        tensors["latents"],
        [],
    )
    for j, i in enumerate(tensors["step_idx"].tolist()):
        if i < 25:
            eps = implied_eps(into[i], left[i], nodes[i])
            torch.testing.assert_close(eps.float(), tensors["guided_eps"][j], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "name, plan, noise",
    [("fork_parallel_k19_alpha1_cfg1.5", "ldm250-demo", 1.0), ("fork_serial_k48_cfg6.0", "ldm250", 0.0)],
)
def test_latent_diffusion_fork_trajectories(name, plan, noise):
    case, tensors = load_case(name)
    x_T = tensors["x_T"]
    final, into, _, _ = recorded_run(
        model("fork_model"),
        case["S"],
        load_plan(plan, 250, parallel=8),
        tensors["c"],
        tensors["uc"],
        case["cfg_scale"],
        x_T,
        [prior_noise(x_T, noise, below=150, when="update")],
    )
    for j, i in enumerate(tensors["step_idx"].tolist()):
        assert_golden(into[i], tensors["x_in"][j], case)
    assert_golden(final, tensors["final"], case)


def test_the_two_orders_of_prior_noise_differ():
    (_, before), (_, after) = (
        load_case(f"propagation_{mode}_50ls_alpha1") for mode in ("serial", "parallel")
    )
    assert (before["final"] - after["final"]).abs().max() > 0.1, "so the cases above tell them apart"


def test_a_longer_hold_moves_further_from_the_plain_sampler():
    _, tensors = load_case("propagation_full_ddim50")
    plans = ["off", "uniform:2", "uniform:5", "0"]
    finals = [
        recorded_run(
            model("propagation_unet"),
            20,
            load_plan(plan, 20, 20),
            tensors["prompt_embeds"],
            tensors["negative_prompt_embeds"],
            7.5,
            tensors["latents"],
            [],
        )[0]
        for plan in plans
    ]
    distance = [(final - finals[0]).pow(2).mean().sqrt() for final in finals]
    assert all(near < far for near, far in pairwise(distance))


def test_an_image_does_not_depend_on_its_place_in_the_batch():
    case, tensors = load_case("propagation_full_ddim50")

    def run(index):
        return recorded_run(
            model("propagation_unet"),
            10,
            load_plan("faster-diffusion", 10, 4),
            tensors["prompt_embeds"][index],
            tensors["negative_prompt_embeds"][index],
            7.5,
            tensors["latents"][index],
            [],
        )[0]

    together = run([0, 1])
    assert_golden(run([1, 0]), together[[1, 0]], case)
    assert_golden(run([1]), together[[1]], case)
