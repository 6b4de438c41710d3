"""The UNet of most tests: 8 x 8 latents of 4 channels, two levels, a residual block in each."""

from __future__ import annotations

from typing import Any

TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
PLAIN_UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
}
TEXT_UNET = PLAIN_UNET | {"use_spatial_transformer": True, "context_dim": 16}


def unet_config(**changes: Any) -> dict[str, Any]:
    """The config of TEXT_UNET with other values."""
    return {"target": TARGET, "params": TEXT_UNET | changes}


def network_params(**changes: Any) -> dict[str, Any]:
    """The `params` of a diffusion model around that UNet; `changes` of the UNet."""
    unet = unet_config(legacy=False, **changes)
    return {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": unet["params"]["image_size"],
        "channels": 4,
        "conditioning_key": "crossattn",
        "unet_config": unet,
    }
