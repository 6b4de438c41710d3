"""The command line of scripts/txt2img.py on a tiny model with random weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from contracts import recipe_weights
from omegaconf import OmegaConf

from ldm.checkpoint import save_weights
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.tokenizer import train_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "txt2img.py"
WORDS = ["a red heart, noto style", "a green tree", "a dog face", "an owl"]


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


main = load_script("txt2img").main


def tiny_params(folder: Path) -> dict:
    """8 x 8 latents of 4 channels, 16 x 16 pictures."""
    return {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
        "channels": 4,
        "scale_factor": 1.0,
        "conditioning_key": "crossattn",
        "cond_stage_key": "caption",
        "use_ema": False,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {
                "image_size": 8,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 32,
                "num_res_blocks": 1,
                "channel_mult": [1, 2],
                "attention_resolutions": [2],
                "num_heads": 2,
                "use_spatial_transformer": True,
                "context_dim": 16,
                "legacy": False,
            },
        },
        "first_stage_config": {
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
        },
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


def write_model(folder: Path) -> tuple[Path, Path]:
    """Config and weights of a tiny model."""
    train_tokenizer(WORDS, 60, 8).save(str(folder / "tokenizer.json"))
    params = tiny_params(folder)
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    config = {"model": {"target": target, "params": params}, "sampling": {"scale": 3.0}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    model = recipe_weights(LatentDiffusion(**OmegaConf.create(params)), seed=1, gain=0.6)
    save_weights(folder / "model.safetensors", model.state_dict())
    return folder / "config.yaml", folder / "model.safetensors"
