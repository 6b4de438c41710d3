"""Published client code: every name that docs/compatibility.md offers takes the published arguments, and works."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import main
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules import x_transformer
from ldm.modules.diffusionmodules import openaimodel, util
from ldm.modules.diffusionmodules.util import at
from ldm.util import mean_flat
from tests.helpers import golden_sampler
from tests.helpers.goldens import assert_golden, load_case
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import WORDS, tiny_params, write_model

SHAPE = (4, 8, 8)
UTIL, UNET = "ldm.modules.diffusionmodules.util", "ldm.modules.diffusionmodules.openaimodel"
IDENTITY = {"target": "torch.nn.Identity"}
B, X, EMB, T = 2, torch.ones(2, 32, 8, 8), torch.ones(2, 64), torch.tensor([1, 500])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LatentDiffusion:
    """A model of texts as published scripts load it: built from its config, filled by load_state_dict."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)

    config = OmegaConf.create(
        {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": tiny_params(folder) | {"use_ema": True, "log_every_t": 200},
        }
    )
    model = main.instantiate_from_config(config)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and all(key.startswith("model_ema.") for key in missing)
    return model.eval()


@pytest.fixture
def batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.rand(2, 16, 16, 3, generator=generator) * 2 - 1, "caption": WORDS[:2]}


def tokens(model, count=B):
    return model.get_learned_conditioning(WORDS[:count])


# The list

FUNCTIONS = {
    "main.instantiate_from_config": lambda f: (
        f({"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}}).out_features == 3
    ),
    "ldm.util.instantiate_from_config": lambda f: isinstance(f(IDENTITY), torch.nn.Identity),
    "ldm.util.get_obj_from_str": lambda f: f("torch.nn.Identity") is torch.nn.Identity,
    "ldm.util.exists": lambda f: f(0) and not f(None),
    "ldm.util.default": lambda f: (f(0, 1), f(None, 1), f(None, lambda: 2)) == (0, 1, 2),
    "ldm.util.ismap": lambda f: (f(torch.ones(1, 4, 2, 2)), f(torch.ones(1, 3, 2, 2)), f("a")) == (True, False, False),
    "ldm.util.isimage": lambda f: (f(torch.ones(1, 1, 2, 2)), f(torch.ones(1, 4, 2, 2)), f([])) == (True, False, False),
    "ldm.util.mean_flat": lambda f: f(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist() == [2, 5],
    "ldm.util.count_params": lambda f: f(torch.nn.Linear(2, 3), verbose=True) == 9,
    "ldm.util.log_txt_as_img": lambda f: (
        f((64, 32), WORDS[:2], size=10).shape == (2, 3, 32, 64)
        and (f((64, 32), ["a"]) < 0).any()
        and f((64, 32), ["a"]).abs().max() <= 1
    ),
    f"{UTIL}.make_beta_schedule": lambda f: f("linear", 1000, linear_start=1e-4, linear_end=2e-2).shape == (1000,),
    f"{UTIL}.betas_for_alpha_bar": lambda f: np.allclose(
        f(1000, lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2), util.make_beta_schedule("cosine", 1000)
    ),
    f"{UTIL}.make_ddim_timesteps": lambda f: f("uniform", 10, 1000, verbose=False)[:2].tolist() == [1, 101],
    f"{UTIL}.make_ddim_sampling_parameters": lambda f: all(
        part.shape == (3,) for part in f(np.linspace(0.99, 0.01, 1000), [1, 300, 700], 0.5, verbose=False)
    ),
    f"{UTIL}.extract_into_tensor": lambda f: torch.equal(
        f(torch.arange(1000.0), T, X.shape), at(torch.arange(1000.0), T, X)
    ),
    f"{UTIL}.noise_like": lambda f: (
        (f((2, 3), "cpu") != f((2, 3), "cpu")).any() and len(f((2, 3), "cpu", repeat=True).unique(dim=0)) == 1
    ),
    f"{UTIL}.timestep_embedding": lambda f: f(T, 32, repeat_only=False).shape == (2, 32),
    f"{UTIL}.mean_flat": lambda f: f is mean_flat,
    f"{UTIL}.conv_nd": lambda f: f(2, 32, 4, 3, padding=1)(X).shape == (2, 4, 8, 8),
    f"{UTIL}.avg_pool_nd": lambda f: f(2, kernel_size=2, stride=2)(X).shape == (2, 32, 4, 4),
    f"{UTIL}.linear": lambda f: f(64, 3)(EMB).shape == (2, 3),
    f"{UTIL}.normalization": lambda f: f(32)(X).shape == X.shape,
    f"{UTIL}.zero_module": lambda f: f(torch.nn.Linear(2, 2)).weight.abs().sum() == 0,
    f"{UTIL}.scale_module": lambda f: torch.equal(f(torch.nn.BatchNorm1d(2), 3).weight, torch.tensor([3.0, 3.0])),
    f"{UTIL}.SiLU": lambda f: f()(torch.zeros(1)).item() == 0,
    f"{UTIL}.GroupNorm32": lambda f: f(32, 32)(X.half()).dtype == torch.float16,
    f"{UTIL}.HybridConditioner": lambda f: f(IDENTITY, IDENTITY)(1, 2) == {"c_concat": [1], "c_crossattn": [2]},
    f"{UNET}.UNetModel": lambda f: f(8, 32, 32, 4, 1, [1], num_heads=1, channel_mult=[1])(X, T).shape == (2, 4, 8, 8),
    f"{UNET}.EncoderUNetModel": lambda f: all(
        f(8, 32, 32, 10, 1, [1], channel_mult=[1, 1], num_head_channels=16, pool=pool)(X, T).shape == (2, 10)
        for pool in ("adaptive", "attention", "spatial", "spatial_v2")
    ),
    f"{UNET}.TimestepBlock": lambda f: issubclass(openaimodel.ResBlock, f),
    f"{UNET}.TimestepEmbedSequential": lambda f: f(Doubled(), torch.nn.Identity())(X, EMB).sum() == 2 * X.sum(),
    f"{UNET}.ResBlock": lambda f: f(32, 64, 0.0, out_channels=64)(X, EMB).shape == (2, 64, 8, 8),
    f"{UNET}.Upsample": lambda f: f(32, True, dims=2)(X).shape == (2, 32, 16, 16),
    f"{UNET}.Downsample": lambda f: f(32, True, dims=2, out_channels=64)(X).shape == (2, 64, 4, 4),
    f"{UNET}.AttentionBlock": lambda f: f(32, num_heads=2)(X).shape == X.shape,
    f"{UNET}.AttentionPool2d": lambda f: f(8, 32, 16, 5)(X).shape == (2, 5),
    f"{UNET}.QKVAttention": lambda f: f(2)(torch.ones(2, 96, 5)).shape == (2, 32, 5),
    f"{UNET}.QKVAttentionLegacy": lambda f: f(2)(torch.ones(2, 96, 5)).shape == (2, 32, 5),
    "ldm.modules.attention.SpatialTransformer": lambda f: (
        f(32, 2, 16, context_dim=8)(X, torch.ones(2, 5, 8)).shape == X.shape
    ),
    "ldm.modules.attention.CrossAttention": lambda f: (
        f(32, 8, heads=2, dim_head=16)(torch.ones(2, 3, 32), torch.ones(2, 5, 8)).shape == (2, 3, 32)
    ),
    "ldm.modules.attention.MemoryEfficientCrossAttention": lambda f: (
        f(query_dim=32, context_dim=8, heads=2, dim_head=16)(torch.ones(2, 3, 32), context=torch.ones(2, 5, 8)).shape
        == (2, 3, 32)
    ),
    "ldm.modules.attention.Normalize": lambda f: f(64).num_groups == 32 and f(64).eps == 1e-6,
    "ldm.modules.diffusionmodules.model.Normalize": lambda f: f(X.shape[1], num_groups=8)(X).abs().max() < 1e-3,
    "ldm.modules.diffusionmodules.model.nonlinearity": lambda f: torch.equal(f(X), X * torch.sigmoid(X)),
    "ldm.modules.encoders.modules.AbstractEncoder": lambda f: raises(NotImplementedError, f().encode, "a cat"),
    "ldm.models.diffusion.ddpm.disabled_train": lambda f: stays_in_evaluation_mode(f),
    "ldm.models.diffusion.ddpm.Layout2ImgDiffusion": lambda f: (
        f(first_stage_config=IDENTITY, cond_stage_config=IDENTITY, unet_config=IDENTITY).cond_stage_key
        == "coordinates_bbox"
        and raises(
            ValueError, f, "caption", first_stage_config=IDENTITY, cond_stage_config=IDENTITY, unet_config=IDENTITY
        )
    ),
    "ldm.modules.ema.LitEma": lambda f: f(torch.nn.Linear(2, 2), decay=0.9).copy_to(torch.nn.Linear(2, 2)) is None,
    "ldm.modules.x_transformer.TransformerWrapper": lambda f: (
        f(num_tokens=9, max_seq_len=4, attn_layers=x_transformer.Encoder(dim=8, depth=1))(T[None] // 100).shape
        == (1, 2, 9)
    ),
    "ldm.modules.distributions.distributions.DiagonalGaussianDistribution": lambda f: f(X).mode().shape[1] == 16,
}


def raises(kind: type[Exception], call, *args, **kwargs) -> bool:
    with pytest.raises(kind):
        call(*args, **kwargs)
    return True


def stays_in_evaluation_mode(disabled_train) -> bool:
    module = torch.nn.Dropout().eval()
    module.train = disabled_train.__get__(module)
    return module.train() is module and not module.training


class Doubled(openaimodel.TimestepBlock):
    def forward(self, x, emb):
        return 2 * x


METHODS = {
    "apply_model": lambda m: m.apply_model(torch.ones(2, *SHAPE), T, tokens(m)).shape == (2, *SHAPE),
    "q_mean_variance": None,
    "differentiable_decode_first_stage": None,
    "p_mean_variance": lambda m: (
        len(m.p_mean_variance(torch.ones(2, *SHAPE), tokens(m), T, clip_denoised=True, return_x0=True)) == 4
    ),
    "p_sample": lambda m: (
        [
            part.shape
            for part in m.p_sample(
                torch.ones(2, *SHAPE), tokens(m), T, repeat_noise=True, return_x0=True, temperature=0.5
            )
        ]
        == [(2, *SHAPE)] * 2
    ),
    "p_sample_loop": lambda m: (
        len(
            m.p_sample_loop(
                tokens(m), (2, *SHAPE), return_intermediates=True, timesteps=4, verbose=False, log_every_t=2
            )[1]
        )
        == 4
    ),
    "progressive_denoising": lambda m: (
        len(m.progressive_denoising(tokens(m), SHAPE, verbose=False, batch_size=2, start_T=4, log_every_t=2)[1]) == 3
    ),
    "sample": lambda m: m.sample(cond=tokens(m, 3), batch_size=2, timesteps=3, verbose=False).shape == (2, *SHAPE),
    "sample_log": lambda m: all(
        m.sample_log(cond=tokens(m), batch_size=2, ddim=ddim, ddim_steps=3, **more)[0].shape == (2, *SHAPE)
        for ddim, more in ((True, {"eta": 1.0}), (False, {"timesteps": 3, "verbose": False}))
    ),
    "get_unconditional_conditioning": lambda m: torch.allclose(  # one text alone, and twice: other last digits
        m.get_unconditional_conditioning(2, ""), m.get_learned_conditioning(["", ""]), atol=1e-5
    ),
    "ema_scope": lambda m: entered(m.ema_scope("Plotting")),
    "get_input": None,
    "log_images": None,  # tests of their own
}


def entered(scope) -> bool:
    with scope:
        return True


SAMPLERS = {
    "ldm.models.diffusion.ddim.DDIMSampler": DDIMSampler,
    "ldm.models.diffusion.plms.PLMSSampler": PLMSSampler,
    "ldm.models.diffusion.dpm_solver.DPMSolverSampler": DPMSolverSampler,
}


def test_the_list_is_the_documented_one():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+)` \|", text, re.M)
    assert sorted(listed) == sorted([*FUNCTIONS, *SAMPLERS, *(f"LatentDiffusion.{name}" for name in METHODS)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_and_layer(name):
    module, _, attribute = name.rpartition(".")
    assert FUNCTIONS[name](getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("name", [name for name, call in METHODS.items() if call])
def test_each_method(name, model):
    with torch.no_grad():
        assert METHODS[name](model)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler(name, model):
    module, _, attribute = name.rpartition(".")
    sampler = getattr(importlib.import_module(module), attribute)(model, device=torch.device("cpu"))
    samples, _ = sampler.sample(
        S=4,
        conditioning=tokens(model),
        batch_size=2,
        shape=SHAPE,
        verbose=False,
        unconditional_guidance_scale=3.0,
        eta=0.0,
        x_T=None,
        unconditional_conditioning=model.get_learned_conditioning(["", ""]),
    )
    assert samples.shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="device must be the model's, cpu"):
        SAMPLERS[name](model, device=torch.device("cuda"))


# What they compute


def golden_model() -> LatentDiffusion:
    """The network of the golden posterior as a LatentDiffusion."""
    case, _ = load_case("sampler_unet")
    model = LatentDiffusion(
        {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "__is_unconditional__",
        {"target": f"{UNET}.UNetModel", "params": case["kwargs"]},
        conditioning_key="crossattn",
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        image_size=8,
        channels=4,
    )
    model.load_state_dict(golden_sampler.model().state_dict(), strict=False)
    return model.eval()


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_the_posterior_is_the_published_one(t):
    case, tensors = load_case("ddpm_posterior")
    model, x = golden_model(), tensors["x"]
    for clip in (False, True):
        mean, variance, log_variance = model.p_mean_variance(x, tensors["c"], torch.full((2,), t), clip_denoised=clip)
        assert_golden(mean, tensors[f"t{t}.clip{clip:d}.mean"], case)
        torch.testing.assert_close(variance, tensors[f"t{t}.var"])
        torch.testing.assert_close(log_variance, tensors[f"t{t}.logvar"])


def test_the_forward_process_has_the_moments_of_its_draws():
    model, x, t = golden_model(), torch.full((4000, *SHAPE), 0.5), torch.full((4000,), 600)
    mean, variance, log_variance = model.q_mean_variance(x, t)
    drawn = model.q_sample(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(drawn.mean(), mean.mean(), rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.var(), variance.mean(), rtol=0.01, atol=0)
    assert variance.shape == (4000, 1, 1, 1) and mean.shape == x.shape
    torch.testing.assert_close(log_variance.exp(), variance)


def test_gradients_pass_through_the_decoder_where_they_are_asked_for(model):
    z = torch.ones(1, *SHAPE, requires_grad=True)
    images = model.differentiable_decode_first_stage(z)
    assert torch.equal(images, model.decode_first_stage(z)) and not model.decode_first_stage(z).requires_grad
    assert torch.autograd.grad(images.sum(), z)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="predict_cids"):
        model.differentiable_decode_first_stage(z, predict_cids=True)


def test_a_loop_is_its_steps():
    model, c = golden_model(), torch.ones(2, 5, 24)
    torch.manual_seed(3)
    x = torch.randn(2, *SHAPE)
    expected, estimates = x, []
    for t in reversed(range(5)):
        expected, x0 = model.p_sample(expected, c, torch.full((2,), t), return_x0=True)
        estimates.append(x0)
    torch.manual_seed(3)
    called = []
    looped = model.p_sample_loop(c, (2, *SHAPE), timesteps=5, verbose=False, callback=called.append)
    torch.testing.assert_close(looped, expected, rtol=1e-4, atol=1e-4)
    assert called == [4, 3, 2, 1, 0]
    torch.manual_seed(3)
    _, seen = model.progressive_denoising(c, (2, *SHAPE), start_T=5, verbose=False, log_every_t=1)
    torch.testing.assert_close(seen, estimates, rtol=1e-4, atol=1e-4)


def test_the_mask_keeps_what_it_covers():
    model, mask = golden_model(), torch.ones(1, 1, 8, 8)
    mask[..., 4:] = 0
    x0 = torch.randn(2, *SHAPE)
    kept = model.p_sample_loop(torch.ones(2, 5, 24), (2, *SHAPE), timesteps=3, verbose=False, mask=mask, x0=x0)
    noise = float(1 - model.alphas_cumprod[0]) ** 0.5
    assert (kept - x0)[..., :4].abs().max() < 6 * noise < (kept - x0)[..., 4:].abs().mean()


def test_a_batch_is_read_as_published(model, batch):
    z, c, x, reconstruction, raw = model.get_input(
        batch, "image", return_first_stage_outputs=True, force_c_encode=True, return_original_cond=True, bs=1
    )
    assert torch.equal(x, batch["image"][:1].movedim(-1, 1)) and raw == WORDS[:1]
    assert z.shape == (1, *SHAPE) and torch.equal(c, tokens(model, 1)) and reconstruction.shape == (1, 3, 16, 16)


def test_what_a_training_shows(model, batch):
    log = model.log_images(
        batch,
        N=2,
        n_row=2,
        ddim_steps=2,
        plot_denoise_rows=True,
        plot_progressive_rows=False,
        unconditional_guidance_scale=3.0,
        unconditional_guidance_label="",
    )
    assert set(log) == {
        "inputs",
        "reconstruction",
        "conditioning",
        "diffusion_row",
        "samples",
        "denoise_row",
        "samples_cfg_scale_3.00",
        "mask",
        "samples_inpainting",
        "samples_outpainting",
    }
    assert log["samples"].shape == log["conditioning"].shape == (2, 3, 16, 16)
    assert log["diffusion_row"].shape == (1, 3, 32, 6 * 16)  # timesteps 0, 200, ..., 800, 999
    assert set(
        model.log_images(
            batch, sample=False, plot_progressive_rows=False, plot_diffusion_rows=False, return_keys=["inputs", "none"]
        )
    ) == {"inputs"}


def test_unconditional_classes_are_the_last(model):
    with pytest.raises(ValueError, match='null_label: needed by this model; for one that reads text it is ""'):
        model.get_unconditional_conditioning(2)


def test_what_no_script_sets_is_refused(model):
    x = torch.ones(2, *SHAPE)
    with pytest.raises(ValueError, match="noise_dropout is not supported"):
        model.p_sample(x, tokens(model), T, noise_dropout=0.1)
    with pytest.raises(ValueError, match="timesteps and start_T must be 1..1000; got 0"):
        model.p_sample_loop(tokens(model), (2, *SHAPE), timesteps=0)
