"""DDPM and LatentDiffusion against the published implementation, and the laws of the process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper, LatentDiffusion
from ldm.models.diffusion.denoiser import Conditioning
from ldm.modules.diffusionmodules.util import make_beta_schedule, with_zero_terminal_snr
from tests.helpers.goldens import load_case, recipe_weights

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tiny(unet_kwargs: dict, **params) -> DDPM:
    settings = {"linear_start": 0.00085, "linear_end": 0.012, "use_ema": False, "conditioning_key": "crossattn"}
    return DDPM({"target": UNET, "params": unet_kwargs}, **settings | params)


@pytest.mark.parametrize("key", ["concat", "hybrid", "crossattn", None])
def test_wrapper_golden(key):
    case, golden = load_case("diffusion_wrapper")
    spec = case["cases"][str(key)]
    wrapper = DiffusionWrapper({"target": UNET, "params": spec["unet"]}, key).eval()
    recipe_weights(wrapper.diffusion_model, spec["recipe_seed"], case["weight_recipe"]["gain"])
    tokens = [golden["c_crossattn_0"], golden["c_crossattn_1"]]
    condition = {
        "concat": {"c_concat": [golden["c_concat"]]},
        "crossattn": {"c_crossattn": tokens},
        None: {},
        "hybrid": {"c_concat": [golden["c_concat"]], "c_crossattn": tokens[:1]},
    }[key]
    with torch.no_grad():
        out = wrapper(golden["x"], golden["t"], **condition)
    torch.testing.assert_close(out, golden[f"{key}.out"], **CLOSE)


@pytest.mark.parametrize("name", ["train_l2_eps", "train_l2_eps_logvar", "train_l2_x0", "train_l2_v"])
def test_training_loss_golden(name):
    case, golden = load_case(name)
    options = {
        k: case[k]
        for k in (
            "loss_type",
            "parameterization",
            "learn_logvar",
            "logvar_init",
            "original_elbo_weight",
            "l_simple_weight",
        )
        if k in case
    }
    model = tiny(case["unet_kwargs"], **options)
    network = model.model.diffusion_model
    recipe_weights(network, **case["weight_recipe"])
    model.train()
    losses = model.p_losses(golden["x0"], golden["c"], golden["t"], golden["noise"])
    torch.testing.assert_close(losses["loss"].view(1), golden["loss"], **CLOSE)
    for part in ("loss_simple", "loss_vlb", "loss_gamma", "logvar"):
        if f"dict.val/{part}" in golden:
            torch.testing.assert_close(losses[part].view(1), golden[f"dict.val/{part}"], **CLOSE)
    losses["loss"].backward()
    for key in [k for k in golden if k.startswith("grad.")]:
        name = key.removeprefix("grad.")
        gradient = model.logvar.grad if name == "logvar" else network.get_parameter(name).grad
        torch.testing.assert_close(gradient, golden[key], **CLOSE)
    if "v_target" in golden:
        torch.testing.assert_close(model.get_v(golden["x0"], golden["noise"], golden["t"]), golden["v_target"], **CLOSE)


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_network_is_trained_at_the_time_of_its_noise(parameterization):
    """The networks of the recorded losses don't depend on the time; this one does."""
    kwargs = load_case("train_l2_v")[0]["unet_kwargs"] | {"channel_mult": [1, 2]}
    model = tiny(kwargs, parameterization=parameterization)
    network = recipe_weights(model.model.diffusion_model, seed=1)
    x, noise, c, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([20, 900])
    with torch.no_grad():
        loss = model.p_losses(x, c, t, noise)["loss_simple"]
        target = noise if parameterization == "eps" else model.get_v(x, noise, t)
        at, elsewhere = (
            (network(model.q_sample(x, t, noise), time, c) - target).square().mean() for time in (t, t.flip(0))
        )
    torch.testing.assert_close(loss, at)
    assert (elsewhere - at).abs() > 1e-3


def test_predictions_invert_the_noising():
    model = tiny(load_case("train_l2_v")[0]["unet_kwargs"], parameterization="v")
    x, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([1, 400, 900])
    x_t, v = model.q_sample(x, t, noise), model.get_v(x, noise, t)
    torch.testing.assert_close(model.predict_start_from_noise(x_t, t, noise), x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.predict_start_from_z_and_v(x_t, t, v), x, **CLOSE)
    torch.testing.assert_close(model.predict_eps_from_z_and_v(x_t, t, v), noise, **CLOSE)


def test_published_forms_of_a_condition_mean_the_same():
    model = tiny(load_case("train_l2_v")[0]["unet_kwargs"])
    c = torch.randn(2, 5, 24)
    for form in (c, [c], {"c_crossattn": [c]}, Conditioning(context=c)):
        assert torch.equal(model.conditioning(form).context, c)
    with pytest.raises(ValueError, match="c_cross"):
        model.conditioning({"c_cross": [c]})


def test_a_condition_of_the_wrong_kind_says_what_is_needed():
    model = tiny(load_case("train_l2_v")[0]["unet_kwargs"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    with pytest.raises(ValueError, match="needs context"):
        model.apply_model(x, t)
    with pytest.raises(ValueError, match="takes no y"):
        model.apply_model(x, t, Conditioning(context=torch.randn(1, 5, 24), y=torch.tensor([1])))


def test_guidance_without_an_unconditional_condition_is_refused():
    model = tiny(load_case("train_l2_v")[0]["unet_kwargs"])
    with pytest.raises(ValueError, match="uncond"):
        model.denoiser(torch.randn(1, 5, 24), guidance=2.0)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"parameterization": "mu"}, "parameterization"),
        ({"loss_type": "huber"}, "loss_type"),
        ({"conditioning_key": "film"}, "conditioning_key"),
    ],
)
def test_wrong_settings_say_why(change, why):
    with pytest.raises(ValueError, match=why):
        tiny(load_case("train_l2_v")[0]["unet_kwargs"], **change)


def test_the_frozen_stages_stay_frozen():
    case, _ = load_case("ldm_tiny_checkpoint")
    model = LatentDiffusion(**case["params"]).train()
    assert model.model.training
    for stage in (model.first_stage_model, model.cond_stage_model):
        assert not stage.training and not any(p.requires_grad for p in stage.parameters())


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_zero_terminal_snr_leaves_nothing_of_the_image_at_the_end(schedule):
    plain = np.cumprod(1 - make_beta_schedule(schedule, 1000))
    betas = with_zero_terminal_snr(make_beta_schedule(schedule, 1000))
    abar = np.cumprod(1 - betas)
    assert abar[0] == pytest.approx(plain[0]) and abar[-1] == pytest.approx(2.0**-24) and (betas > 0).all()
    # sqrt(alpha-bar) is a linear function of what it was
    before, after = np.sqrt(plain[:-1]), np.sqrt(abar[:-1])
    np.testing.assert_allclose(np.diff(after) / np.diff(before), np.sqrt(plain[0]) / (before[0] - np.sqrt(plain[-1])))


def test_zero_terminal_snr_is_not_for_eps():
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    unet |= {"attention_resolutions": [], "channel_mult": [1], "num_heads": 1}
    with pytest.raises(ValueError, match="zero_terminal_snr: not with parameterization eps"):
        tiny(unet, zero_terminal_snr=True, conditioning_key=None)
    model = tiny(unet, zero_terminal_snr=True, conditioning_key=None, parameterization="v")
    x, v = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    last = torch.tensor([999])
    start = model.predict_start_from_z_and_v(x, last, v)
    torch.testing.assert_close(start, -v, rtol=0, atol=2e-3)  # pure noise says nothing: x_0 is what v says
