"""The models that see more than a text, at a tiny width: what conditions them, and that they sample with it."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load_model, save_weights
from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps
from ldm.util import ConfigError, instantiate_from_config
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import recipe_weights
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT
from tests.helpers.tiny_models import FIRST_STAGE, TINY_DEPTH
from tests.helpers.tiny_unet import unet_config

MODULES = "ldm.modules.encoders.modules"
NOISING = {"linear_start": 0.0001, "linear_end": 0.02}
OPENCLIP = {"target": f"{MODULES}.FrozenOpenCLIPEmbedder", "params": {"arch": TINY_OPEN, "layer": "penultimate"}}
KINDS = {  # class -> conditioning key, channels of the UNet, how it takes y, further parameters
    "LatentInpaintDiffusion": ("hybrid", 9, {}, {"finetune_keys": None}),
    "LatentDepth2ImageDiffusion": (
        "hybrid",
        5,
        {},
        {
            "finetune_keys": None,
            "depth_stage_config": {
                "target": "ldm.modules.midas.api.MiDaSInference",
                "params": {"model_type": "dpt_hybrid", "settings": TINY_DEPTH},
            },
        },
    ),
    "LatentUpscaleDiffusion": (
        "hybrid-adm",
        7,
        {"num_classes": 1000},
        {
            "low_scale_key": "lr",
            "low_scale_config": {
                "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
                "params": {"noise_schedule_config": NOISING, "max_noise_level": 350},
            },
        },
    ),
    "ImageEmbeddingConditionedLatentDiffusion": (
        "crossattn-adm",
        4,
        {"num_classes": "sequential", "adm_in_channels": 16},
        {
            "embedding_dropout": 0.5,
            "embedder_config": {"target": f"{MODULES}.FrozenOpenCLIPImageEmbedder", "params": {"arch": TINY_OPEN}},
            "noise_aug_config": {
                "target": f"{MODULES}.CLIPEmbeddingNoiseAugmentation",
                "params": {
                    "timestep_dim": 8,
                    "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
                },
            },
        },
    ),
}


def config(
    kind: str,
    key: str = "crossattn",
    channels: int = 4,
    unet: dict | None = None,
    more: dict | None = None,
    conditioner: dict = OPENCLIP,
) -> dict:
    """8 x 8 latents of 4 channels, 16 x 16 images."""
    return {
        "target": f"ldm.models.diffusion.ddpm.{kind}",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "image_size": 8,
            "channels": 4,
            "scale_factor": 0.18215,
            "parameterization": "v",
            "conditioning_key": key,
            "cond_stage_key": "txt",
            "use_ema": False,
            "unet_config": unet_config(in_channels=channels, legacy=False, **(unet or {})),
            "first_stage_config": FIRST_STAGE,
            "cond_stage_config": conditioner,
            **(more or {}),
        },
    }


def model(kind: str) -> LatentDiffusion:
    return recipe_weights(instantiate_from_config(config(kind, *KINDS[kind])), seed=5, gain=0.6)


def given(kind: str) -> dict:
    """What the condition of two images is made from."""
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    if kind == "LatentInpaintDiffusion":
        mask = torch.zeros(2, 1, 16, 16)
        mask[:, :, 4:12, 6:10] = 1
        return {"image": image, "mask": mask, "noise": noise}
    if kind == "LatentDepth2ImageDiffusion":
        return {"image": image, "size": (8, 8)}
    levels = torch.tensor([0, 20])
    if kind == "LatentUpscaleDiffusion":
        return {"low": image[..., ::2, ::2], "noise_level": levels, "noise": torch.randn(2, 3, 8, 8)}
    return {"image": image, "noise_level": levels, "noise": torch.randn(2, 8)}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_samples_under_guidance_with_encoder_propagation(kind):
    """And the image it is conditioned on makes a difference."""
    ldm = model(kind)
    tokens = torch.randint(0, 49000, (2, 5))
    context, empty = ldm.get_learned_conditioning(tokens), ldm.get_learned_conditioning(torch.zeros_like(tokens))
    rule = DDIM(ddim_nodes(ldm.alphas_cumprod, ddim_timesteps(5)))
    x_T = torch.randn(2, 4, 8, 8)

    def final(inputs: dict) -> torch.Tensor:
        denoiser = ldm.denoiser(ldm.condition(context, **inputs), ldm.condition(empty, **inputs), guidance=3.0)
        *_, state = denoise(denoiser, rule, load_plan("uniform:2", 5, 2), x_T)
        return ldm.decode_first_stage(state.x)

    inputs = given(kind)
    other = {name: value.flip(0) if name in ("image", "low") else value for name, value in inputs.items()}
    images = final(inputs)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    assert (images - final(other)).abs().max() > 1e-3


@torch.no_grad()
def test_inpainting_is_told_the_mask_and_the_rest_but_not_what_is_masked():
    ldm, inputs = model("LatentInpaintDiffusion"), given("LatentInpaintDiffusion")
    context = torch.zeros(2, 5, 16)
    concat = ldm.condition(context, **inputs).concat
    assert torch.equal(concat[:, :1], inputs["mask"][..., ::2, ::2])
    changed = torch.where(inputs["mask"] > 0, torch.rand_like(inputs["image"]), inputs["image"])
    assert torch.equal(ldm.condition(context, **inputs | {"image": changed}).concat, concat)
    seen = ldm.get_first_stage_encoding(ldm.encode_first_stage(inputs["image"] * (1 - inputs["mask"])), inputs["noise"])
    torch.testing.assert_close(concat[:, 1:], seen)
    with pytest.raises(ValueError, match="mask must have the shape"):
        ldm.condition(context, inputs["image"], inputs["mask"][..., :8])


@torch.no_grad()
def test_depth_is_told_in_each_images_own_range():
    ldm, inputs = model("LatentDepth2ImageDiffusion"), given("LatentDepth2ImageDiffusion")
    inputs["image"][1] = 0.1
    concat = ldm.condition(torch.zeros(2, 5, 16), **inputs).concat
    assert concat.shape == (2, 1, 8, 8) and concat.isfinite().all()
    torch.testing.assert_close(concat.amin((1, 2, 3)), torch.full((2,), -1.0))
    assert 0.9 < concat[0].max() <= 1
    assert torch.equal(
        ldm.condition(torch.zeros(1, 5, 16), inputs["image"][:1], (8, 8)).concat.round(decimals=3),
        concat[:1].round(decimals=3),
    )


@torch.no_grad()
def test_upscaling_is_told_the_noise_level():
    ldm, inputs = model("LatentUpscaleDiffusion"), given("LatentUpscaleDiffusion")
    condition = ldm.condition(torch.zeros(2, 5, 16), **inputs)
    assert torch.equal(condition.y, inputs["noise_level"])
    noised, _ = ldm.low_scale_model(inputs["low"], inputs["noise_level"], inputs["noise"])
    assert torch.equal(condition.concat, noised) and not torch.equal(noised, inputs["low"])


@torch.no_grad()
def test_variations_are_told_the_embedding_and_lose_some_in_training():
    kind = "ImageEmbeddingConditionedLatentDiffusion"
    ldm, inputs = model(kind), given(kind)
    context = torch.zeros(2, 5, 16)
    y = ldm.condition(context, **inputs).y
    assert torch.equal(
        y, torch.cat(ldm.noise_augmentor(ldm.embedder(inputs["image"]), inputs["noise_level"], inputs["noise"]), dim=1)
    )
    many = {name: value[:1].expand(200, *value.shape[1:]) for name, value in inputs.items()}
    kept = ldm.train().condition(context, **many).y.abs().sum(1) > 0
    assert 60 < kept.sum() < 140


@pytest.mark.parametrize("kind", ["LatentInpaintDiffusion", "LatentDepth2ImageDiffusion"])
def test_unknown_parameters_of_a_kind_are_refused(kind):
    settings = config(kind, *KINDS[kind])
    settings["params"]["concat_key"] = "mask"
    with pytest.raises(ConfigError, match="concat_key.*accepted: .*finetune_keys, first_stage_config"):
        instantiate_from_config(settings)
    settings["params"] |= {"finetune_keys": ["a"]}
    del settings["params"]["concat_key"]
    with pytest.raises(ValueError, match="finetune_keys must be null"):
        instantiate_from_config(settings)


@torch.no_grad()
def test_a_checkpoint_brings_the_text_encoder(tmp_path):
    """Saved with the keys of the installed transformers and of its older versions; loaded without a network."""
    conditioner = {
        "target": f"{MODULES}.FrozenCLIPEmbedder",
        "params": {"version": TINY_TEXT, "vocabulary": str(write_vocabulary(tmp_path))},
    }
    settings = config("LatentDiffusion", conditioner=conditioner)
    OmegaConf.save(OmegaConf.create({"model": settings}), tmp_path / "config.yaml")
    written = recipe_weights(instantiate_from_config(settings), seed=8)
    position_ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    for extra in ({}, position_ids):
        save_weights(tmp_path / "model.safetensors", written.state_dict() | extra)
        read = load_model(tmp_path / "config.yaml", tmp_path / "model.safetensors")
        assert torch.equal(read.get_learned_conditioning(["a cat"]), written.get_learned_conditioning(["a cat"]))
