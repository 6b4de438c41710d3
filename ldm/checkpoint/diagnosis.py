"""Does a checkpoint belong to a config? Facts that tell models apart are read from both and compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any

import torch
from torch import Tensor

UNET = "model.diffusion_model."
CONDITIONERS = {  # by class: the name in a report, and a key that tells it in a checkpoint
    "FrozenCLIPEmbedder": ("CLIP", "transformer.text_model.embeddings.token_embedding.weight"),
    "FrozenOpenCLIPEmbedder": ("OpenCLIP", "model.token_embedding.weight"),
    "FrozenOpenCLIPEmbedder2": ("OpenCLIP", "model.token_embedding.weight"),
    "BERTEmbedder": ("BERT", "transformer.token_emb.weight"),
    "ClassEmbedder": ("classes", "embedding.weight"),
}
SEVERAL = "conditioner.embedders."  # text encoders side by side: SDXL


@dataclass(frozen=True)
class Facts:
    """Facts that distinguish models; None = the model has no such part, or an unknown one.

    channels:    input channels of the network: those of the latents and of a concatenated condition.
    width:       channels of the network's first level.
    context:     width of the context tokens.
    linear:      its transformers begin and end with linear layers (Stable Diffusion 2), not convolutions (1).
    positions:   tokens of a transformer (DiT), which depend on the size of its images.
    labels:      number of classes, or length of the vector, that the network is conditioned on beside the timestep.
    first_stage: "KL, 4 channels, factor 8" or "VQ, 8192 codes of 3 channels, factor 4".
    conditioner: one of CONDITIONERS, or several joined by " and ".
    video:       the network has layers between the frames of a video.
    """

    channels: int | None = None
    width: int | None = None
    context: int | None = None
    linear: bool | None = None
    positions: int | None = None
    labels: int | None = None
    first_stage: str | None = None
    conditioner: str | None = None
    video: bool | None = None


NAMES = {
    "channels": "input channels of the network",
    "width": "width of the network",
    "context": "context width",
    "linear": "linear layers around the transformers",
    "positions": "tokens of the network",
    "labels": "labels of the network",
    "first_stage": "first stage",
    "conditioner": "conditioner",
    "video": "layers between frames",
}


def summary(facts: Facts) -> str:
    known = "; ".join(f"{NAMES[name]}: {value}" for name, value in vars(facts).items() if value is not None)
    return known or "not a model of this family"


def facts_of_config(config: Mapping[str, Any]) -> Facts:
    """The facts of the `model` part of a config, without building it.

    Raises:
        ValueError: it is neither a diffusion model's nor a first stage's.
    """
    params = config.get("params") or {}
    try:
        if "unet_config" not in params:
            return Facts(first_stage=_first_stage_of_config(params))
        unet, first = params["unet_config"]["params"], params["first_stage_config"].get("params") or {}
        first_stage = _first_stage_of_config(first) if "ddconfig" in first else None
        if "hidden_size" in unet:
            return Facts(**_transformer_of_config(unet), first_stage=first_stage)
        video = params["unet_config"]["target"].endswith(".VideoUNet") or None
        spatial = video or unet.get("use_spatial_transformer", False)
        return Facts(
            unet["in_channels"],
            unet["model_channels"],
            unet["context_dim"] if spatial else None,
            bool(video or unet.get("use_linear_in_transformer", False)) if spatial else None,
            labels=unet.get("adm_in_channels") or unet.get("num_classes"),
            first_stage=first_stage,
            conditioner=_conditioner_of_config(params["cond_stage_config"]),
            video=video,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the config of a model of this family: {config.get('target')} lacks {error}") from error


def _transformer_of_config(dit: Mapping[str, Any]) -> dict[str, int]:
    return {
        "channels": dit["in_channels"],
        "width": dit["hidden_size"],
        "positions": (dit["input_size"] // dit["patch_size"]) ** 2,
        "labels": dit["num_classes"] + (dit.get("class_dropout_prob", 0.1) > 0),
    }


def _first_stage_of_config(params: Mapping[str, Any]) -> str:
    dd = params["ddconfig"]
    factor = dd.get("patch_size", 1) * 2 ** (len(dd["ch_mult"]) - 1)
    return _first_stage(params.get("n_embed"), params["embed_dim"], factor)


def _first_stage(codes: int | None, channels: int, factor: int) -> str:
    kind = f"KL, {channels} channels" if codes is None else f"VQ, {codes} codes of {channels} channels"
    return f"{kind}, factor {factor}"


def _conditioner_of_config(config: Any) -> str | None:
    if isinstance(config, str):  # a marker: the first stage, or none
        return None
    if config["target"].endswith(".GeneralConditioner"):
        parts = map(_conditioner_of_config, config["params"]["emb_models"])
        return " and ".join(part for part in parts if part is not None)
    name, _ = CONDITIONERS.get(config["target"].rpartition(".")[2], (None, None))
    return name


def facts_of_weights(state: Mapping[str, Tensor]) -> Facts:
    """The facts of a checkpoint of a diffusion model or of a first stage, from names and shapes."""
    if f"{UNET}x_embedder.proj.weight" in state:
        return _facts_of_transformer(state)
    if f"{UNET}input_blocks.0.0.weight" not in state:
        return Facts(first_stage=_first_stage_of_weights(state, ""))
    width, channels = state[f"{UNET}input_blocks.0.0.weight"].shape[:2]
    transformer = next(
        (
            key.removesuffix("attn2.to_k.weight")
            for key in state
            if key.startswith(UNET)
            and key.endswith("transformer_blocks.0.attn2.to_k.weight")
            # which of a network of videos is between frames, without a context
            and not key.startswith(f"{UNET}input_blocks.0.")
        ),
        None,
    )
    context = linear = None
    if transformer is not None:
        context = state[f"{transformer}attn2.to_k.weight"].shape[1]
        linear = state[f"{transformer.removesuffix('transformer_blocks.0.')}proj_in.weight"].ndim == 2
    conditioner = _conditioner_of_weights(state)
    labels = next(
        (
            state[f"{UNET}label_emb.{key}"].shape[side]
            for key, side in (("weight", 0), ("0.0.weight", 1))
            if f"{UNET}label_emb.{key}" in state
        ),
        None,
    )
    first_stage = _first_stage_of_weights(state, "first_stage_model.")
    video = any(key.startswith(UNET) and ".temopral_conv." in key for key in state) or None
    return Facts(channels, width, context, linear, None, labels, first_stage, conditioner, video)


def _facts_of_transformer(state: Mapping[str, Tensor]) -> Facts:
    width, channels = state[f"{UNET}x_embedder.proj.weight"].shape[:2]
    return Facts(
        channels,
        width,
        positions=state[f"{UNET}pos_embed"].shape[1],
        labels=len(state[f"{UNET}y_embedder.embedding_table.weight"]),
        first_stage=_first_stage_of_weights(state, "first_stage_model."),
    )


def _conditioner_of_weights(state: Mapping[str, Tensor]) -> str | None:
    if any(key.startswith(SEVERAL) for key in state):
        found = [
            name
            for i in range(10)
            for name, key in dict.fromkeys(CONDITIONERS.values())
            if f"{SEVERAL}{i}.{key}" in state
        ]
        return " and ".join(found)
    return next((name for name, key in CONDITIONERS.values() if f"cond_stage_model.{key}" in state), None)


def _first_stage_of_weights(state: Mapping[str, Tensor], prefix: str) -> str | None:
    if f"{prefix}encoder.conv_in.weight" not in state:
        return None
    levels = {found[1] for key in state if (found := re.match(rf"{re.escape(prefix)}encoder\.down\.(\d+)\.", key))}
    patch = isqrt(state[f"{prefix}encoder.conv_in.weight"].shape[1] // 3)  # images have three channels
    codebook = state.get(f"{prefix}quantize.embedding.weight")
    codes = None if codebook is None else len(codebook)
    return _first_stage(codes, state[f"{prefix}post_quant_conv.weight"].shape[1], patch * 2 ** (len(levels) - 1))


@dataclass(frozen=True)
class Difference:
    """A fact that differs between config and checkpoint."""

    name: str
    config: Any
    weights: Any

    def __str__(self) -> str:
        return f"{NAMES[self.name]}: {self.config} in the config, {self.weights} in the checkpoint"


def differences(config: Facts, weights: Facts) -> list[Difference]:
    """The facts that differ, in the order of `Facts`."""
    return [
        Difference(field.name, ours, theirs)
        for field in fields(Facts)
        if (ours := getattr(config, field.name)) != (theirs := getattr(weights, field.name))
    ]


def fitting(weights: Facts, configs: Iterable[tuple[str, Facts]]) -> list[str]:
    """Names of the configs with the same facts."""
    return [name for name, facts in configs if facts == weights]


@torch.no_grad()
def measured_prediction(network: Callable[[Tensor], Tensor], shape: tuple[int, ...], seed: int = 0) -> str | None:
    """What a trained network predicts, "eps" or "v", found from one prediction on pure noise.

    At the last training timestep the input is almost pure noise, so a network that predicts the noise returns its
    input. There v is almost minus the clean image, which does not correlate with the input.

    Args:
        network: raw prediction at the last training timestep, (B, C, H, W) -> (B, C, H, W).
        shape: shape of its input.

    Returns:
        None if neither is clear. An untrained network, or one that predicts x0, looks like "v".
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    prediction = network(x).float()
    likeness = torch.corrcoef(torch.stack([x.flatten(), prediction.flatten()]))[0, 1].item()
    if likeness > 0.9:
        return "eps"
    return "v" if abs(likeness) < 0.5 else None
