"""DeepFloyd-IF: its networks in both layouts, its solver, the authors' trajectories, corrected and as released."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint.conversion import ConversionError
from ldm.checkpoint.deepfloyd import joined_heads, network_params, original_names, original_params, to_original
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.denoiser import thresholded
from ldm.models.diffusion.loop import State, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node, diffuse, leading
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.diffusionmodules.deepfloyd import DeepFloydUNet
from ldm.profiling.cost import unet_macs
from tests.helpers.deepfloyd import FIRST, SECOND, diffusers_shapes, recipe_model, recipe_network, recipe_state
from tests.helpers.goldens import assert_golden, load_case, recipe_weights
from tests.helpers.paths import GOLDENS

# The networks


@pytest.mark.parametrize("name", ["if_i_unet", "if_ii_unet"])
def test_one_prediction(name):
    case, tensors = load_case(name)
    network = recipe_network(case["kwargs"], **case["weight_recipe"])
    with torch.no_grad():
        context, y = network.condition(tensors["context"], tensors.get("noise_level"))
        assert_golden(context, tensors["context_projected"], case)
        assert_golden(network.embed(tensors["timesteps"], y, 2), tensors["emb"], case)
        features = network.encode(tensors["x"], tensors["timesteps"], context, y)
        assert_golden(features.hidden, tensors["mid"], case)
        for i, skip in enumerate(features.skips):
            assert_golden(skip, tensors[f"skip.{i}"], case)
        assert_golden(network.decode(features, tensors["timesteps"], context, y), tensors["out"], case)
        shared, projected = network.share(features), network.project(context)
        assert_golden(network.decode(shared, tensors["timesteps"], projected, y), tensors["out"], case)


@pytest.mark.parametrize("name", ["if_i_unet", "if_ii_unet"])
def test_both_layouts(name):
    """Names and shapes of each, what each file says of the network, and weights from one layout to the other."""
    case, _ = load_case(name)
    params = network_params(case["kwargs"])
    assert original_params(case["original_kwargs"]) == params
    assert {k: list(v) for k, v in diffusers_shapes(params).items()} == {k: s for k, (s, _) in case["weights"].items()}
    state = dict(sorted(recipe_state(params, **case["weight_recipe"]).items()))  # as files have them
    for key, (_, total) in case["weights"].items():
        assert state[key].double().sum().item() == pytest.approx(total, abs=2e-3)
    ours = to_original(state, params)
    alike = [key for key, value in ours.items() if any(value is same for same in state.values())]
    assert len(alike) > 50
    kept = [next(place for place, same in enumerate(state.values()) if same is ours[key]) for key in alike]
    assert kept == sorted(kept), "in another order what was read of the file stays in memory until all is"
    assert {key: list(value.shape) for key, value in ours.items()} == case["original_shapes"]
    for key, theirs in case["original_keys"].items():
        parts = [theirs] if isinstance(theirs, str) else theirs
        joined = state[parts[0]] if isinstance(theirs, str) else joined_heads([state[part] for part in parts], 16)
        assert torch.equal(ours[key].flatten(), joined.flatten()), key
    assert to_original(ours, params) == ours


def test_the_published_network_of_the_first_stage():
    published = json.loads(gzip.decompress((GOLDENS / "state_dicts_if.json.gz").read_bytes()))
    params = network_params(published["config"]["params"])
    assert params == original_params(published["config"]["original"]["params"])
    with torch.device("meta"):
        ours = {key: list(value.shape) for key, value in DeepFloydUNet(**params).state_dict().items()}
    assert ours == published["if_i_xl_unet_original"]
    assert {key: list(shape) for key, shape in diffusers_shapes(params).items()} == published["if_i_xl_unet"]


def test_what_the_first_stage_costs():
    """In the paper's convention, guidance batch of 2, which reads the text at every prediction."""
    published = json.loads(gzip.decompress((GOLDENS / "state_dicts_if.json.gz").read_bytes()))
    params = network_params(published["config"]["params"])
    network = {"target": "ldm.modules.diffusionmodules.deepfloyd.DeepFloydUNet", "params": params}
    macs = unet_macs(network, (64, 64), 2, 77, convention="paper")
    assert macs.whole / 1e9 == pytest.approx(2855.23, rel=2e-3)
    assert macs.encode / 1e9 == pytest.approx(799.95, rel=2e-3)
    assert macs.last[-1] == macs.decode


def test_another_network_is_refused():
    with pytest.raises(ConversionError, match="not a stage of DeepFloyd-IF: channels .64, 96"):
        network_params(FIRST | {"block_out_channels": [64, 96]})
    with pytest.raises(ConversionError, match="not the config.json of a stage of DeepFloyd-IF: KeyError..encoder_hid"):
        network_params({key: value for key, value in FIRST.items() if key != "encoder_hid_dim"})
    params = network_params(FIRST)
    state = recipe_state(params, 1, 1.0)
    with pytest.raises(ConversionError, match=r"keys that this stage of DeepFloyd-IF does not have \(up_blocks.7.a"):
        to_original(state | {"up_blocks.7.a": torch.zeros(1)}, params)
    with pytest.raises(ValueError, match=r"states must have shape \(B, L, 32\); got \(1, 7, 48\)"):
        recipe_network(FIRST, 1, 1.0).condition(torch.zeros(1, 7, 48))
    with pytest.raises(ValueError, match="noise_level: this stage takes one"):
        recipe_network(SECOND, 1, 1.0).condition(torch.zeros(1, 7, 32))
    assert "qkv" in str(original_names(params))


# The solver


def test_steps_of_ddpm_with_a_learned_variance_and_thresholding():
    case, tensors = load_case("if_scheduler_ddpm")
    abar = tensors["alphas_cumprod"]
    for step in case["cases"]:
        x, out, noise, expected, clean = (
            tensors[f"{step['key']}.{name}"]
            for name in ("x", "model_output", "noise", "prev_sample", "pred_original_sample")
        )
        at, before = float(abar[step["t"]]), 1.0 if step["prev_t"] < 0 else float(abar[step["prev_t"]])
        x0 = thresholded((x - (1 - at) ** 0.5 * out[:, :3]) / at**0.5, step["sample_max_value"])
        eps = torch.cat([(x - at**0.5 * x0) / (1 - at) ** 0.5, out[:, 3:]], dim=1)
        rule = solver("ddpm-learned", abar, 1, noise=lambda i, x, noise=noise: noise)
        rule = type(rule)((Node(step["t"], at, before),), rule.noise)
        state = rule.step(State(x), 0, eps)
        assert_golden(state.x0, clean, case)
        assert_golden(state.x, expected, case)
    for steps, timesteps in case["timesteps"].items():
        assert list(leading(int(steps))) == timesteps
    for most in ("1.0", "1.5"):
        assert_golden(thresholded(tensors["threshold.in"], float(most)), tensors[f"threshold.{most}"], case)


def test_the_low_resolution_image():
    case, tensors = load_case("if_stage_arithmetic")
    abar = recipe_model(FIRST, 1.0, 1, 1.0).alphas_cumprod
    for part in case["cases"]:
        image, noise, upscaled, noised = (
            tensors[f"{part['key']}.{name}"] for name in ("image", "noise", "upscaled", "noised")
        )
        up = F.interpolate(image, size=(part["to"],) * 2, mode="bilinear", align_corners=True)
        assert_golden(up, upscaled, case)
        assert_golden(diffuse(up, noise, float(abar[part["noise_level"]])), noised, case)


# Trajectories


@cache
def model_of(stage: int) -> LatentDiffusion:
    case, _ = load_case({1: "if_stage1_25_corrected", 2: "if_stage2_50_corrected"}[stage])
    return recipe_model(case["kwargs"], case["scheduler"]["sample_max_value"], **case["weight_recipe"])


def conditions(model: LatentDiffusion, case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Conditional and unconditional."""
    found = []
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        level = torch.tensor([case["noise_level"]]) if case["stage"] == 2 else None
        with torch.no_grad():
            context, y = model.model.diffusion_model.condition(tensors[name], level)
        concat = {"c_concat": [tensors["low_res_noised"]]} if case["stage"] == 2 else {}
        found.append({"c_crossattn": [context], "c_adm": y} | concat)
    return found


def run(case: Mapping[str, Any], tensors: Mapping[str, Tensor], sampler: str, network: Any = None) -> list[Tensor]:
    """The samples that enter each step, and the last."""
    model = model_of(case["stage"])
    rule = solver(
        sampler,
        model.alphas_cumprod,
        case["S"],
        noise=lambda i, x: tensors["step_noise"][i],
        timesteps_at=case["timesteps"],
    )
    calls = case.get("unet_calls_timesteps", [[t] for t in case["timesteps"]])
    plan = Plan(case["S"], tuple(case["timesteps"].index(call[0]) for call in calls), parallel=case["S"])
    if case["mode"] != "plain":
        assert plan.keys == load_plan(f"if-stage{case['stage']}", case["S"]).keys
    learned = sampler == "ddpm-learned"
    denoiser = model.denoiser(
        *conditions(model, case, tensors), case["guidance_scale"], network=network, variance=learned
    )
    return [tensors["x_T"], *(state.x for state in denoise(denoiser, rule, plan, tensors["x_T"]))]


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("if_stage1_25_plain", "ddpm-learned"),
        ("if_stage1_25_corrected", "ddpm-learned"),
        ("if_stage1_100_plain", "ddpm-learned"),
        ("if_stage1_100_corrected", "ddpm-learned"),
        ("if_stage2_50_plain", "ddpm-learned"),
        ("if_stage2_50_corrected", "ddpm-learned"),
        ("if_stage1_dpmpp25_plain", "dpm-solver++-published"),
    ],
)
def test_trajectories(name, sampler):
    """Those called corrected decode several steps at once; the last is without the variance."""
    case, tensors = load_case(name)
    into = run(case, tensors, sampler)
    assert_golden(torch.stack([into[i] for i in tensors["step_idx"]]), tensors["into_step"], case)
    assert_golden(into[-1], tensors["final"], case)


class AsReleased(nn.Module):
    """A network whose decoder knows the timestep alone: neither text nor noise level, nor an activation after them."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole, self.decoder = whole, copy.copy(whole.diffusion_model)
        if hasattr(self.decoder, "embedding_act"):
            self.decoder._modules = {**self.decoder._modules, "embedding_act": nn.Identity()}
        else:
            self.decoder.num_classes = None

    def decode(self, features, t, cond, tome=0.0):
        y = torch.zeros_like(cond.y) if self.decoder.num_classes else None
        return self.decoder.decode(features, t, cond.context, y, tome)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("whole", "decoder") else getattr(self.whole, name)


@pytest.mark.parametrize("name", ["if_stage1_25", "if_stage1_100", "if_stage2_50"])
def test_the_release_loses_part_of_the_embedding(name):
    """What it made is reproduced by that loss, and is far from what its plan makes without."""
    case, tensors = load_case(f"{name}_released")
    into = run(case, tensors, "ddpm-learned", AsReleased(model_of(case["stage"]).model))
    assert_golden(into[-1], tensors["final"], case)
    corrected = load_case(f"{name}_corrected")[1]["final"]
    assert (into[-1] - corrected).abs().max() > 1


@pytest.mark.parametrize("mode", ["plain", "corrected", "released"])
def test_the_third_stage(mode):
    """The x4 upscaler of Stable Diffusion, by DDIM with every 13th timestep."""
    case, tensors = load_case(f"if_stage3_75_{mode}")
    model = DDPM(
        {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": case["kwargs"]},
        linear_start=case["scheduler"]["beta_start"],
        linear_end=case["scheduler"]["beta_end"],
        parameterization="v",
        conditioning_key="hybrid-adm",
        channels=4,
        use_ema=False,
    )
    recipe_weights(model.model.diffusion_model, **case["weight_recipe"])
    level = torch.tensor([case["noise_level"]])
    low = diffuse(tensors["low_res"], tensors["low_res_noise"], float(model.alphas_cumprod[case["noise_level"]]))
    torch.testing.assert_close(low, tensors["low_res_noised"])
    cond, uncond = (
        {"c_crossattn": [tensors[name]], "c_concat": [low], "c_adm": level}
        for name in ("prompt_embeds", "negative_prompt_embeds")
    )
    plan = load_plan("off" if mode == "plain" else "if-stage3", 75, 75)
    assert list(plan.keys) == case.get("key_steps", [*range(75)]) and leading(75, 1) == tuple(case["timesteps"])
    rule = solver("ddim", model.alphas_cumprod, 75, timesteps_at=leading(75, 1))
    network = AsReleased(model.model) if mode == "released" else None
    denoiser = model.denoiser(cond, uncond, case["guidance_scale"], network=network)
    x = [tensors["x_T"], *(state.x for state in denoise(denoiser, rule, plan, tensors["x_T"]))]
    assert_golden(torch.stack([x[i] for i in tensors["step_idx"]]), tensors["into_step"], case)
    assert_golden(x[-1], tensors["final"], case)
