"""Models with random weights: one of 8 x 8 latents, and published ones at a tiny width; written as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.checkpoint import save_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.util import instantiate_from_config
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import recipe_weights
from tests.helpers.paths import ROOT
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT
from tests.helpers.tiny_unet import unet_config

CODEBOOK = "first_stage_model.quantize.embedding.weight"
DEPTH_BIAS = "depth_model.model.scratch.output_conv.4.bias"
NARROW = {"unet_config__params__context_dim": 16, "cond_stage_config__params__embed_dim": 16}
TINY_DEPTH = {"width": 64, "heads": 4, "depth": 4, "taps": (1, 3), "stages": (1, 2, 1), "grid": 4, "features": 32}
# 16 x 16 images to 8 x 8 latents.
FIRST_STAGE: dict[str, Any] = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    },
}
WORDS = ["a red heart, noto style", "a green tree", "a dog face", "an owl"]


def tiny_params(folder: Path) -> dict:
    """8 x 8 latents of 4 channels, 16 x 16 images."""
    return {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
        "channels": 4,
        "scale_factor": 1.0,
        "conditioning_key": "crossattn",
        "cond_stage_key": "caption",
        "use_ema": False,
        "unet_config": unet_config(legacy=False),
        "first_stage_config": FIRST_STAGE,
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.BERTEmbedder",
            "params": {
                "n_embed": 16,
                "n_layer": 1,
                "vocab_size": 60,
                "max_seq_len": 8,
                "tokenizer": str(folder / "tokenizer.json"),
            },
        },
    }


def write_model(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Config and weights of a tiny model; `changes` of its params."""
    train_tokenizer(WORDS, 60, 8).save(str(folder / "tokenizer.json"))
    params = tiny_params(folder) | changes
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    config = {"model": {"target": target, "params": params}, "sampling": {"scale": 3.0}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    model = recipe_weights(LatentDiffusion(**OmegaConf.create(params)), seed=1, gain=0.6)
    save_weights(folder / "model.safetensors", model.state_dict())
    return folder / "config.yaml", folder / "model.safetensors"


def tiny_model(folder: Path, published: str, latent: int = 8, **params: Any) -> list[str]:
    """The model of a published config, narrow, with one block per level and random weights; its files as arguments.

    Args:
        published: path of the config in the project.
        latent: height and width of its latents.
        params: other values in params.PATH, dots as __.
    """
    config = OmegaConf.load(ROOT / published)
    model = config.model.params
    model.image_size, model.use_ema = latent, False
    unet, first_stage = model.unet_config.params, model.first_stage_config.params.ddconfig
    unet.update(image_size=latent, model_channels=32, num_res_blocks=1, channel_mult=narrow(unet.channel_mult))
    first_stage.update(ch=32, num_res_blocks=1, ch_mult=narrow(first_stage.ch_mult))
    if "n_embed" in model.first_stage_config.params:
        model.first_stage_config.params.n_embed = 1024
    return written(folder, config, **params)


def tiny_transformer(folder: Path, published: str, **params: Any) -> list[str]:
    """The same of a config of a DiT: 4 x 4 latents of 32 x 32 images, three narrow blocks."""
    config = OmegaConf.load(ROOT / published)
    model = config.model.params
    model.image_size = 4
    model.unet_config.params.update(input_size=4, hidden_size=32, depth=3, num_heads=4, encoder_blocks=2)
    first_stage = model.first_stage_config.params.ddconfig
    first_stage.update(ch=32, num_res_blocks=1, ch_mult=narrow(first_stage.ch_mult))
    return written(folder, config, **params)


def written(folder: Path, config: Any, **params: Any) -> list[str]:
    """A config with other values in params.PATH and random weights for it; the files as arguments."""
    for name, value in params.items():
        OmegaConf.update(config.model.params, name.replace("__", "."), value, force_add=True)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    weights = recipe_weights(instantiate_from_config(config.model), seed=1, gain=0.6)
    state = weights.state_dict()
    if CODEBOOK in state:
        state[CODEBOOK] *= 10  # as wide as the latents of a random network, lest all become the same few codes
    if DEPTH_BIAS in state:
        state[DEPTH_BIAS] += 1  # the depth of a random network may be nowhere above 0, and is cut off there
    save_weights(folder / "model.safetensors", state)
    return ["--config", str(folder / "config.yaml"), "--ckpt", str(folder / "model.safetensors")]


def narrow(widths: Sequence[int]) -> list[int]:
    """As many levels, none of them wider than twice the first."""
    return [min(width, 2) for width in widths]


def tiny_text_model(folder: Path, published: str, **params: Any) -> list[str]:
    """The same of a model of Stable Diffusion 1 or 2, whose text encoder reads words of the golden prompts."""
    model = OmegaConf.load(ROOT / published).model.params
    open_clip = model.cond_stage_config.target.endswith("FrozenOpenCLIPEmbedder")
    encoder = {"arch": TINY_OPEN} if open_clip else {"version": TINY_TEXT}
    encoder["vocabulary"] = str(write_vocabulary(folder))
    if "num_head_channels" in model.unet_config.params:
        params["unet_config__params__num_head_channels"] = 16
    return tiny_model(
        folder, published, unet_config__params__context_dim=16, cond_stage_config__params=encoder, **params
    )
