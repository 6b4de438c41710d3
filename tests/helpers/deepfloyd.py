"""Stages of DeepFloyd-IF with weights by the recipe, whose keys are diffusers' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.checkpoint import save_weights
from ldm.checkpoint.deepfloyd import network_params, original_names, stage_config, to_original
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.deepfloyd import DeepFloydUNet
from tests.helpers.goldens import recipe_tensor
from tests.helpers.tiny_models import tiny_text_model
from tests.helpers.tiny_t5 import write_t5

# A first and a second stage, as their config.json describes them.
FIRST: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 16,
    "addition_embed_type_num_heads": 4,
    "encoder_hid_dim": 32,
}
SECOND = FIRST | {
    "sample_size": 16,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1.4142271248762552,
    "only_cross_attention": True,
}


def diffusers_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Diffusers' names and shapes of a network's weights."""
    with torch.device("meta"):
        ours = {key: tuple(value.shape) for key, value in DeepFloydUNet(**params).state_dict().items()}
    names, shapes = original_names(params), {}
    for key, shape in ours.items():
        module = max((name for name in names if key.startswith(f"{name}.")), key=len)
        theirs, kind = names[module], key[len(module) + 1 :]
        parts = [theirs] if isinstance(theirs, str) else theirs
        if len(shape) == 3:  # a convolution of width 1 there, a linear layer here
            shape = shape[:-1]
        rows = shape[0] // len(parts) if len(parts) > 1 else shape[0]
        shapes |= {f"{part}.{kind}": (rows, *shape[1:]) for part in parts}
    return shapes


def recipe_state(params: Mapping[str, Any], seed: int, gain: float) -> dict[str, Tensor]:
    """Weights under diffusers' names."""
    return {key: recipe_tensor(key, shape, seed, gain) for key, shape in diffusers_shapes(params).items()}


def recipe_network(config: Mapping[str, Any], seed: int, gain: float) -> DeepFloydUNet:
    """The network of a config.json."""
    params = network_params(config)
    network = DeepFloydUNet(**params)
    network.load_state_dict(to_original(recipe_state(params, seed, gain), params))
    return network.eval()


def recipe_model(config: Mapping[str, Any], most: float, seed: int, gain: float) -> LatentDiffusion:
    """The model of a config.json, with dynamic thresholding up to `most`."""
    params = network_params(config)
    model = LatentDiffusion(**stage_config(params, most)["params"]).eval()
    model.model.diffusion_model.load_state_dict(to_original(recipe_state(params, seed, gain), params))
    return model


def tiny_stages(folder: Path) -> dict[str, str]:
    """Stage 1 with T5 as a diffusers folder, stage 2 in the original layout, stage 3 as a checkpoint; their places."""
    first, second = folder / "first", folder / "second"
    write_t5(first)
    (first / "unet").mkdir()
    (first / "unet" / "config.json").write_text(json.dumps(FIRST))
    state = recipe_state(network_params(FIRST), seed=1, gain=0.6)
    save_weights(first / "unet" / "diffusion_pytorch_model.safetensors", state)
    second.mkdir()
    params = network_params(SECOND)
    original = {name: params[name] for name in params if name not in ("noise_level", "channel_mult")}
    (second / "config.yml").write_text(yaml.safe_dump({"params": original | {"channel_mult": "1,2"}}))
    torch.save(to_original(recipe_state(params, seed=2, gain=0.6), params), second / "pytorch_model.bin")
    x4 = tiny_text_model(folder / "x4", "configs/stable-diffusion/x4-upscaling.yaml")
    return {"stage1": str(first), "stage2": str(second), "stage3": x4[3]}
