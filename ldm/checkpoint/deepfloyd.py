"""The files of DeepFloyd-IF: a stage's network as a config of ours, and its weights under the original names.

There are two layouts. The folders of the diffusers library have unet/config.json beside the weights; the original ones
have config.yml and pytorch_model.bin. Queries, keys and values are apart in the first; in the second they are one
tensor, whose rows go head by head: the query's, the key's, the value's of the first head, then of the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.conversion import RES_BLOCK, UNET, UNET_ENDS, ConversionError
from ldm.checkpoint.file import PART_FILES, read_checkpoint
from ldm.checkpoint.model import check_free, fill, is_copied, unmade
from ldm.io.errors import some
from ldm.io.files import read_json, read_yaml
from ldm.util import instantiate_from_config

NETWORK = "ldm.modules.diffusionmodules.deepfloyd.DeepFloydUNet"
ENDS = UNET_ENDS | {
    "encoder_proj": "encoder_hid_proj",
    "encoder_pooling.0": "add_embedding.norm1",
    "encoder_pooling.1": "add_embedding.pool",
    "encoder_pooling.2": "add_embedding.proj",
    "encoder_pooling.3": "add_embedding.norm2",
    "aug_proj.0": "class_embedding.linear_1",
    "aug_proj.2": "class_embedding.linear_2",
}
ATTENTION = {"norm": "group_norm", "norm_encoder": "norm_cross", "proj_out": "to_out.0"}
JOINED = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}  # where they are there
WITH_TEXT = "SimpleCrossAttn"  # in the names of diffusers' blocks with attention


# The network


def network_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DeepFloydUNet` from diffusers' unet/config.json.

    Raises:
        ConversionError: it describes another network.
    """
    try:
        widths, blocks = [*config["block_out_channels"]], config["layers_per_block"]
        first, size = widths[0], config["sample_size"]
        with_text = [WITH_TEXT in kind for kind in config["down_block_types"]]
        if any(width % first for width in widths) or not any(with_text):
            raise ConversionError(f"not a stage of DeepFloyd-IF: channels {widths}, {config['down_block_types']}")
        return {
            "image_size": size,
            "in_channels": config["in_channels"],
            "model_channels": first,
            "out_channels": config["out_channels"],
            "num_res_blocks": blocks if isinstance(blocks, int) else [*blocks],
            "attention_resolutions": ",".join(str(size >> level) for level, text in enumerate(with_text) if text),
            "encoder_dim": config["encoder_hid_dim"],
            "encoder_channels": config["cross_attention_dim"],
            "att_pool_heads": config.get("addition_embed_type_num_heads", 64),
            "num_head_channels": config["attention_head_dim"],
            "channel_mult": [width // first for width in widths],
            "noise_level": config.get("class_embed_type") == "timestep",
            "efficient_activation": bool(config.get("resnet_skip_time_act")),
            "scale_skip_connection": config.get("resnet_out_scale_factor", 1.0) != 1.0,
            "disable_self_attentions": bool(config.get("only_cross_attention")),
        }
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(f"not the config.json of a stage of DeepFloyd-IF: {error!r}") from None


def original_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same from the arguments of the original code, as config.yml has them under `params`.

    Raises:
        ConversionError: they are those of another network.
    """
    try:
        mult = params["channel_mult"]
        return {
            name: params[name]
            for name in ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks")
        } | {
            "attention_resolutions": str(params["attention_resolutions"]),
            "encoder_dim": params["encoder_dim"],
            "encoder_channels": params["encoder_channels"],
            "att_pool_heads": params.get("att_pool_heads", 64),
            "num_head_channels": params["num_head_channels"],
            "channel_mult": [int(one) for one in mult.split(",")] if isinstance(mult, str) else [*mult],
            "noise_level": params["in_channels"] != params["out_channels"] // 2,
            "efficient_activation": bool(params.get("efficient_activation")),
            "scale_skip_connection": bool(params.get("scale_skip_connection")),
            "disable_self_attentions": bool(params.get("disable_self_attentions")),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"not the config.yml of a stage of DeepFloyd-IF: {error!r}") from None


COUNTS = (
    "image_size",
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "encoder_dim",
    "encoder_channels",
    "att_pool_heads",
    "num_head_channels",
    "channel_mult",
)


def check_counts(network: Mapping[str, Any]) -> None:
    """Raise ConversionError unless what is counted in the arguments of `DeepFloydUNet` are whole numbers above 0."""
    for name in COUNTS:
        value = network[name]
        counts = value if isinstance(value, list) else [value]
        if not counts or any(type(one) is not int or one < 1 for one in counts):
            raise ConversionError(f"{name} must be whole numbers of at least 1; got {value!r}")


def stage_config(network: Mapping[str, Any], most: float) -> dict[str, Any]:
    """The `model` part of our config of a stage.

    Args:
        network: arguments of `DeepFloydUNet`.
        most: the largest value that dynamic thresholding scales down.
    """
    low_resolution = network["noise_level"]
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "beta_schedule": "cosine",
            "timesteps": 1000,
            "parameterization": "eps",
            "dynamic_threshold": most,
            "conditioning_key": "hybrid-adm" if low_resolution else "crossattn-adm",
            "image_size": network["image_size"],
            "channels": network["out_channels"] // 2,
            "use_ema": False,
            "unet_config": {"target": NETWORK, "params": dict(network)},
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
            "cond_stage_config": "__is_unconditional__",  # texts are encoded once for all stages
        },
    }


# The weights


def original_names(network: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:
    """Modules, the original name -> diffusers', or the names of those that the original joins."""
    blocks, levels = network["num_res_blocks"], len(network["channel_mult"])
    blocks = [blocks] * levels if isinstance(blocks, int) else blocks
    heights = {int(height) for height in network["attention_resolutions"].split(",")}
    attended = [network["image_size"] >> level in heights for level in range(levels)]
    residual = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attention = {"middle_block.1": "mid_block.attentions.0"}
    place = 1
    for level in range(levels):
        down = f"down_blocks.{level}"
        for i in range(blocks[level]):
            residual[f"input_blocks.{place}.0"] = f"{down}.resnets.{i}"
            if attended[level]:
                attention[f"input_blocks.{place}.1"] = f"{down}.attentions.{i}"
            place += 1
        if level < levels - 1:
            residual[f"input_blocks.{place}.0"] = f"{down}.downsamplers.0"
            place += 1
    place = 0
    for level in reversed(range(levels)):
        up = f"up_blocks.{levels - 1 - level}"
        for i in range(blocks[level] + 1):
            residual[f"output_blocks.{place}.0"] = f"{up}.resnets.{i}"
            if attended[level]:
                attention[f"output_blocks.{place}.1"] = f"{up}.attentions.{i}"
            place += 1
        if level > 0:
            residual[f"output_blocks.{place - 1}.{1 + attended[level]}"] = f"{up}.upsamplers.0"
    names: dict[str, str | Sequence[str]] = dict(ENDS)
    names |= {f"{a}.{x}": f"{b}.{y}" for a, b in residual.items() for x, y in RES_BLOCK.items()}
    names |= {f"{a}.{x}": f"{b}.{y}" for a, b in attention.items() for x, y in ATTENTION.items()}
    kept = {"qkv": ("to_q",)} if network["disable_self_attentions"] else {}
    return names | {
        f"{a}.{x}": [f"{b}.{y}" for y in parts] for a, b in attention.items() for x, parts in (JOINED | kept).items()
    }


def to_original(state: Mapping[str, Tensor], network: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under the original names, from those of either layout, in their order.

    So what was read of a file is let go on the way through it, see `ldm.checkpoint.model.fill`.

    Raises:
        ConversionError: diffusers' names of another network.
    """
    if "input_blocks.0.0.weight" in state:
        return dict(state)
    left, found, heads = dict(state), {}, network["num_head_channels"]
    places, place_of = {key: place for place, key in enumerate(state)}, {}
    for ours, theirs in original_names(network).items():
        for kind in ("weight", "bias", "positional_embedding", *(f"{p}_proj.{k}" for p in "qkv" for k in KINDS)):
            parts = [theirs] if isinstance(theirs, str) else theirs
            given = [left.pop(f"{part}.{kind}", None) for part in parts]
            if any(part is None for part in given):
                continue
            joined = given[0] if isinstance(theirs, str) else joined_heads(given, heads)
            conv1d = kind == "weight" and ours.endswith((".1.qkv", ".1.encoder_kv", ".1.proj_out"))
            found[f"{ours}.{kind}"] = joined[..., None] if conv1d and joined.ndim == 2 else joined
            place_of[f"{ours}.{kind}"] = places[f"{parts[0]}.{kind}"]
    if left:
        raise ConversionError(f"keys that this stage of DeepFloyd-IF does not have{some(left, 4)}")
    return {name: found[name] for name in sorted(found, key=place_of.get)}


KINDS = ("weight", "bias")


def joined_heads(parts: Sequence[Tensor], head_channels: int) -> Tensor:
    """Tensors of C rows each as one of all, head by head."""
    return torch.stack([part.unflatten(0, (-1, head_channels)) for part in parts], dim=1).flatten(0, 2)


# A stage's folder

MOST = {True: 1.0, False: 1.5}  # of dynamic thresholding as published, by whether there is a low-resolution image
ORIGINAL = ("config.yml", "pytorch_model.bin")
DIFFUSERS = ("unet", "config.json", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Stage:
    """Where a stage's files are, and what they say.

    described: the file that describes the network.
    weights: its weights.
    model: the `model` part of our config.
    """

    described: Path
    weights: Path
    model: dict[str, Any]


def find_stage(folder: Path) -> Stage:
    """The stage in a folder of either layout.

    Raises:
        ValueError: it is not there, or its files are not those of a stage of DeepFloyd-IF.
    """
    described, network = _description(folder)
    names = PART_FILES["unet"] if described.name == DIFFUSERS[1] else ORIGINAL[1:]
    found = [path for path in (described.parent / name for name in names) if path.is_file()]
    if not found:
        raise ValueError(f"{folder}: no weights; expected {DIFFUSERS[0]}/{DIFFUSERS[2]}.safetensors, or {ORIGINAL[1]}")
    return Stage(described, found[0], _model(folder, network))


def stage_model(folder: Path) -> dict[str, Any]:
    """The `model` part of our config of the stage in a folder, whose weights need not be there.

    Raises:
        ValueError: see `find_stage`.
    """
    return _model(folder, _description(folder)[1])


def _description(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes a stage's network, and the arguments of `DeepFloydUNet` that it says."""
    part, config, _ = DIFFUSERS
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a stage of DeepFloyd-IF, see docs/deepfloyd-if.md")
    unet = folder / part if (folder / part).is_dir() else folder
    if (unet / config).is_file():
        described, network = unet / config, network_params(read_json(unet / config))
    elif (described := folder / ORIGINAL[0]).is_file():
        content = read_yaml(described)
        network = original_params(content.get("params", {}) if isinstance(content, dict) else {})
    else:
        raise ValueError(f"{folder}: no {part}/{config} and no {ORIGINAL[0]}; expected a stage of DeepFloyd-IF")
    check_counts(network)
    return described, network


def _model(folder: Path, network: Mapping[str, Any]) -> dict[str, Any]:
    most = _threshold(folder / "scheduler" / "scheduler_config.json", MOST[network["noise_level"]])
    return stage_config(network, most)


def _threshold(path: Path, usual: float) -> float:
    """What a folder's scheduler says of dynamic thresholding."""
    if not path.is_file():
        return usual
    most = read_json(path).get("sample_max_value", usual)
    if not isinstance(most, int | float) or not 1 <= most < float("inf"):
        raise ValueError(f"{path}: sample_max_value must be a number of at least 1; got {most!r}")
    return float(most)


def load_stage(stage: Stage, device: torch.device, free: int | None = None) -> nn.Module:
    """The model of a stage, ready to sample from.

    Args:
        free: bytes of the device's memory that the weights may take; None = any.

    Raises:
        CheckpointError, ConversionError: the weights are not those that its files describe, or do not fit.
    """
    network, given = stage.model["params"]["unet_config"]["params"], read_checkpoint(stage.weights)
    full = torch.float32
    need = sum(full.itemsize * value.numel() for value in given.values() if is_copied(value, full, device))
    check_free(stage.weights, need, free)
    state = {UNET + key: value for key, value in to_original(given, network).items()}
    del given
    model = unmade(lambda: instantiate_from_config(stage.model))
    fill(model, state, stage.weights, "raw", assign=True)
    model.weights_file = stage.weights
    return model.eval().requires_grad_(False).to(device)
