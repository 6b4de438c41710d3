"""SDXL's models at a tiny width, with random weights, as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.paths import ROOT
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT
from tests.helpers.tiny_models import tiny_model

NUMBERS = {"base": 6, "refiner": 5, "inpainting": 6}  # that frame an image
OWN = TINY_OPEN["embed_dim"]  # width of a text's own vector
WIDTHS = {"base": 16 + 16, "refiner": 16, "inpainting": 16 + 16}  # of the context


def tiny_xl(folder: Path, kind: str = "base", latent: int = 8, **params: Any) -> list[str]:
    """The model of configs/stable-diffusion/sd_xl_KIND.yaml, see `tiny_model`; its first level has no attention."""
    published = f"configs/stable-diffusion/sd_xl_{kind}.yaml"
    embedders = OmegaConf.to_container(
        OmegaConf.load(ROOT / published).model.params.cond_stage_config.params.emb_models
    )
    vocabulary = str(write_vocabulary(folder))
    for entry in embedders:
        name = entry["target"].rpartition(".")[2]
        if name == "FrozenCLIPEmbedder":
            entry["params"] = {"version": TINY_TEXT, "layer": "hidden", "layer_idx": 1, "vocabulary": vocabulary}
        elif name == "FrozenOpenCLIPEmbedder2":
            entry["params"] |= {"arch": TINY_OPEN, "vocabulary": vocabulary}
        else:
            entry["params"] = {"outdim": 8}
    levels = 4 if kind == "refiner" else 3
    unet = {
        "adm_in_channels": OWN + 8 * NUMBERS[kind],
        "context_dim": WIDTHS[kind],
        "num_head_channels": 16,
        "transformer_depth": [1, 1, 2, 1][:levels],
    }
    params |= {f"unet_config__params__{name}": value for name, value in unet.items()}
    return tiny_model(folder, published, latent, cond_stage_config__params__emb_models=embedders, **params)
