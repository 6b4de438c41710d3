"""The two layouts of SDXL's weights: the publisher's single file, and the folder of the diffusers library.

As `ldm.checkpoint.conversion`, with the vector that frames an image as a second timestep embedding, and with the second
text encoder, OpenCLIP's, whole: its last layer and its projection are used. The refiner has only that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.checkpoint.conversion import (
    UNET,
    VAE,
    ConversionError,
    clip_to_ldm,
    openclip_to_diffusers,
    openclip_to_ldm,
    parts_of,
    text_config,
    unet_config,
    unet_to_diffusers,
    unet_to_ldm,
    vae_config,
    vae_to_diffusers,
    vae_to_ldm,
)

EMBEDDERS = "conditioner.embedders."
CLIP, OPENCLIP = "transformer.text_model.", "model."  # the text encoders' names below that and a number
VECTOR = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
PROJECTION = ("text_projection", "text_projection.weight")  # (width, D) here, (D, width) there
NOT_IN_FOLDERS = re.compile(r"denoiser\..+|conditioner\.(.+\.)?(position_ids|logit_scale)|first_stage_model\.loss\..+")


def is_xl(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is the base model's or the refiner's of SDXL."""
    return any(key.startswith(EMBEDDERS) for key in state)


def to_ldm(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The single file's state dict of the parts of a folder: unet, vae, text_encoder_2, and of the base text_encoder.

    Raises:
        ConversionError: a part has keys that these models do not have, or lacks keys.
    """
    converted = {UNET: unet_to_ldm(parts["unet"], VECTOR), VAE: vae_to_ldm(parts["vae"])}
    if "text_encoder" in parts:
        converted[f"{EMBEDDERS}0.{CLIP}"] = clip_to_ldm(parts["text_encoder"])
    ours, theirs = PROJECTION
    text = dict(parts["text_encoder_2"])
    if theirs not in text:
        raise ConversionError(f"text_encoder_2: without {theirs}")
    projection = text.pop(theirs).T
    place = "1" if "text_encoder" in parts else "0"
    converted[f"{EMBEDDERS}{place}.{OPENCLIP}"] = openclip_to_ldm(text, unused=0) | {ours: projection}
    return {prefix + key: value for prefix, state in converted.items() for key, value in state.items()}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of a folder of the single file's state dict; the inverse of `to_ldm`.

    Raises:
        ConversionError: a part is not there, or is not SDXL's.
    """
    state = {key: value for key, value in state.items() if "." in key and not NOT_IN_FOLDERS.fullmatch(key)}
    both = any(key.startswith(f"{EMBEDDERS}1.") for key in state)
    prefixes = {"unet": UNET, "vae": VAE}
    if both:
        prefixes["text_encoder"] = f"{EMBEDDERS}0.{CLIP}"
    prefixes["text_encoder_2"] = f"{EMBEDDERS}{int(both)}.{OPENCLIP}"
    ours = parts_of(state, prefixes)
    text, (projection, theirs) = ours["text_encoder_2"], PROJECTION
    if projection not in text:
        raise ConversionError(f"text_encoder_2: without {projection}")
    last = {theirs: text.pop(projection).T}
    parts = {
        "unet": unet_to_diffusers(ours["unet"], VECTOR),
        "vae": vae_to_diffusers(ours["vae"]),
        "text_encoder_2": _prefixed(openclip_to_diffusers(text, unused=0)) | last,
    }
    return parts | ({"text_encoder": _prefixed(clip_to_ldm(ours["text_encoder"]))} if both else {})


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"text_model.{key}": value for key, value in state.items()}


def framed_unet_config(params: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a UNet that is conditioned on size and crop; arguments and errors: see `unet_config`, and
    `configs`."""
    unet, embedders = params["unet_config"]["params"], params["cond_stage_config"]["params"]["emb_models"]
    widths = {entry["params"]["outdim"] for entry in embedders if "outdim" in entry["params"]}
    if len(widths) != 1:
        raise ConversionError(f"unet: the numbers that frame an image must have one width; got {sorted(widths)}")
    return unet_config(params, unet, weights) | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": widths.pop(),
        "projection_class_embeddings_input_dim": unet["adm_in_channels"],
    }


def configs(params: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """The content of the JSON files of a folder: for each part, and for the "scheduler".

    Args:
        params: `model.params` of the config of a `StableDiffusionXL`.
        parts: result of `to_diffusers` for its weights.

    Raises:
        ConversionError: a model that the folder can't describe.
    """
    dd = params["first_stage_config"]["params"]["ddconfig"]
    if params.get("parameterization", "eps") == "x0":
        raise ConversionError("scheduler: only eps- and v-prediction have a place there")
    described = {
        "unet": framed_unet_config(params, parts["unet"]),
        "vae": vae_config(params, dd) | {"force_upcast": bool(params.get("disable_first_stage_autocast", True))},
        "text_encoder_2": text_config(parts["text_encoder_2"], openclip=True)
        | {
            "architectures": ["CLIPTextModelWithProjection"],
            "projection_dim": len(parts["text_encoder_2"][PROJECTION[1]]),
        },
        "scheduler": {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": params["linear_start"],
            "beta_end": params["linear_end"],
            "num_train_timesteps": params.get("timesteps", 1000),
            "timestep_spacing": "trailing",
            "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[params.get("parameterization", "eps")],
        },
    }
    if "text_encoder" in parts:
        described["text_encoder"] = text_config(parts["text_encoder"], openclip=False)
    return described
