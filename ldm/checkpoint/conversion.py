"""The two layouts of Stable Diffusion's weights: one CompVis checkpoint, and the folder of the diffusers library.

"Ours" are the names of a CompVis checkpoint, "theirs" those of diffusers' parts `unet`, `vae` and `text_encoder`.
Every weight is the same in both, under another name, except that

- the first stage's attention is made of 1x1 convolutions here, (C, C, 1, 1), and of linear layers there, (C, C);
- OpenCLIP (Stable Diffusion 2) keeps the query, key and value of a layer in one tensor, (3 C, C), there it is three;
- Stable Diffusion 2 takes the text from the layer before the last, and the folder is without that last layer.

An unknown key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.io.errors import some

UNET, VAE, CLIP, OPENCLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
)
CONTROL = "control_model."
PARTS = {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model."}
TEXT_ACTIVATIONS = {False: "quick_gelu", True: "gelu"}  # by whether it is OpenCLIP's
HEAD_WIDTH = 64  # of every CLIP text encoder
NOT_IN_FOLDERS = re.compile(  # what no part of a folder has a place for
    r"[^.]+|model_ema\..+|first_stage_model\.loss\..+"
    r"|cond_stage_model\.(.+\.)?(position_ids|logit_scale|text_projection)"
)

# Modules by name: ours -> theirs.
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_BLOCK = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
VAE_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
TEXT_ENDS = {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
CLIP_MODULES = ("embeddings", "encoder.layers", "final_layer_norm")  # the same in both
POSITIONS = ("positional_embedding", "embeddings.position_embedding.weight")
ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


class ConversionError(ValueError):
    """Weights that are not those of Stable Diffusion 1 or 2 in the expected layout."""


# Names


def unet_names(levels: int, blocks: int, attention: set[int]) -> dict[str, str]:
    """The UNet's modules, ours -> theirs.

    Args:
        levels: number of resolutions.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: the levels of the decoder with attention; 0 is the coarsest.
    """
    pairs = dict(UNET_ENDS)
    residual = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    pairs["middle_block.1"] = "mid_block.attentions.0"
    for level in range(levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{level}"
        for i in range(blocks):
            ours = f"input_blocks.{1 + level * (blocks + 1) + i}"
            residual[f"{ours}.0"], pairs[f"{ours}.1"] = f"{down}.resnets.{i}", f"{down}.attentions.{i}"
        for i in range(blocks + 1):
            ours = f"output_blocks.{level * (blocks + 1) + i}"
            residual[f"{ours}.0"] = f"{up}.resnets.{i}"
            if level in attention:
                pairs[f"{ours}.1"] = f"{up}.attentions.{i}"
        if level < levels - 1:
            last = (level + 1) * (blocks + 1)
            pairs[f"input_blocks.{last}.0.op"] = f"{down}.downsamplers.0.conv"
            place = 2 if level in attention else 1
            pairs[f"output_blocks.{last - 1}.{place}.conv"] = f"{up}.upsamplers.0.conv"
    return pairs | {f"{a}.{x}": f"{b}.{y}" for a, b in residual.items() for x, y in RES_BLOCK.items()}


def control_names(levels: int, blocks: int, hints: int) -> dict[str, str]:
    """A control network's modules, ours -> theirs: the encoder's, and those around it.

    Args:
        levels, blocks: as in `unet_names`.
        hints: layers that read the control image, without the first and the last.
    """
    read = "controlnet_cond_embedding"
    encoder = {
        ours: theirs
        for ours, theirs in unet_names(levels, blocks, set()).items()
        if not ours.startswith(("output_blocks.", "out."))
    }
    outputs = {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (blocks + 1))}
    layers = {f"input_hint_block.{2 + 2 * i}": f"{read}.blocks.{i}" for i in range(hints)}
    ends = {"input_hint_block.0": f"{read}.conv_in", f"input_hint_block.{2 + 2 * hints}": f"{read}.conv_out"}
    return encoder | outputs | layers | ends | {"middle_block_out.0": "controlnet_mid_block"}


def vae_names(levels: int, blocks: int) -> dict[str, str]:
    """The first stage's modules, ours -> theirs; `blocks` as in `unet_names`. Only the middle has attention."""
    pairs, residual = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}, {}
    for half in ("encoder", "decoder"):
        pairs |= {f"{half}.{a}": f"{half}.{b}" for a, b in VAE_ENDS.items()}
        pairs |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in VAE_ATTENTION.items()}
        residual |= {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in range(2)}
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        residual |= {f"encoder.down.{level}.block.{i}": f"{down}.resnets.{i}" for i in range(blocks)}
        residual |= {f"decoder.up.{level}.block.{i}": f"{up}.resnets.{i}" for i in range(blocks + 1)}
        if level < levels - 1:
            pairs[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            pairs[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return pairs | {f"{a}.{x}": f"{b}.{y}" for a, b in residual.items() for x, y in VAE_BLOCK.items()}


def openclip_names(layers: int) -> dict[str, str]:
    """The OpenCLIP text encoder's modules, ours -> theirs, without what is packed (`ATTENTION_INPUTS`)."""
    return TEXT_ENDS | {
        f"transformer.resblocks.{i}.{a}": f"encoder.layers.{i}.{b}"
        for i in range(layers)
        for a, b in TEXT_LAYER.items()
    }


def _rename(part: str, state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Each key under the name that its innermost known module has on the other side.

    Raises:
        ConversionError: keys of an unknown module, or weights that are not floating-point numbers.
    """
    renamed, unknown = {}, []
    for key, value in state.items():
        known = next((prefix for prefix in _prefixes(key) if prefix in names), None)
        if known is None:
            unknown.append(key)
        else:
            renamed[names[known] + key.removeprefix(known)] = value
    if unknown:
        raise ConversionError(f"{part}: keys that these models do not have{some(unknown, 4)}")
    if others := [f"{key} {value.dtype}" for key, value in renamed.items() if not value.is_floating_point()]:
        raise ConversionError(f"{part}: weights that are not floating-point numbers{some(others, 4)}")
    return renamed


def _prefixes(key: str) -> Iterator[str]:
    """'a.b.c' -> 'a.b.c', 'a.b', 'a'."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest number that the group of `pattern` matches in the names of `state`."""
    return 1 + max((int(found[1]) for key in state if (found := re.match(pattern, key))), default=-1)


# From a folder's parts


def to_ldm(
    parts: Mapping[str, Mapping[str, Tensor]],
    openclip: bool,
    unet: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """A CompVis state dict of the three parts of a diffusers folder.

    The last layer of an OpenCLIP encoder, which is not in a folder and which the model does not run, comes as zeros:
    such a layer hands on what it gets.

    Args:
        parts: state dicts of PARTS, in diffusers' present or older names.
        openclip: the text encoder is OpenCLIP's (Stable Diffusion 2), not CLIP's (1).
        unet: renames the first part; None = that of these models.

    Raises:
        ConversionError: a part has keys that these models do not have, or lacks keys.
    """
    unet = unet or unet_to_ldm
    text = (openclip_to_ldm if openclip else clip_to_ldm)(parts["text_encoder"])
    converted = {UNET: unet(parts["unet"]), VAE: vae_to_ldm(parts["vae"]), OPENCLIP if openclip else CLIP: text}
    return {prefix + key: value for prefix, state in converted.items() for key, value in state.items()}


TRANSFORMER = "x_embedder.proj.weight"  # a key of every published DiT


def transformer_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published DiT under the names of a model's network.

    Raises:
        ConversionError: it is something else.
    """
    if TRANSFORMER not in state:
        raise ConversionError(f"not a published DiT: it has no {TRANSFORMER}")
    return {UNET + key: value for key, value in state.items()}


def first_stage_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A first stage of Stable Diffusion by itself, in diffusers' names or CompVis', under those of a model's.

    Raises:
        ConversionError: it is something else.
    """
    if any(key.startswith("encoder.down_blocks.") for key in state):
        state = vae_to_ldm(state)
    if "post_quant_conv.weight" not in state:
        raise ConversionError("not a first stage of Stable Diffusion: it has no post_quant_conv.weight")
    return {VAE + key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}


def unet_to_ldm(state: Mapping[str, Tensor], more: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Our names of a UNet's weights; `more`: modules beside those of Stable Diffusion 1 and 2, ours -> theirs."""
    levels = _count(state, r"down_blocks\.(\d+)\.")
    attention = {i for i in range(levels) if f"up_blocks.{i}.attentions.0.norm.weight" in state}
    names = unet_names(levels, _count(state, r"down_blocks\.0\.resnets\.(\d+)\."), attention)
    return _rename("unet", state, _inverse(names | dict(more or {})))


def control_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a control network in the names of diffusers under ours, without `control_model.` before them.

    Raises:
        ConversionError: keys that a control network of Stable Diffusion 1 or 2 does not have.
    """
    levels, blocks = _count(state, r"down_blocks\.(\d+)\."), _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")
    names = control_names(levels, blocks, _count(state, r"controlnet_cond_embedding\.blocks\.(\d+)\."))
    return _rename("control network", state, _inverse(names))


def vae_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a first stage's weights."""
    blocks = _count(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    names = _inverse(vae_names(_count(state, r"encoder\.down_blocks\.(\d+)\."), blocks))
    for half in ("encoder", "decoder"):
        attention = f"{half}.mid_block.attentions.0"
        names |= {f"{attention}.{old}": names[f"{attention}.{new}"] for old, new in OLD_VAE_ATTENTION.items()}
    renamed = _rename("vae", state, names)
    return {
        key: value[:, :, None, None] if _vae_projection(key) and value.ndim == 2 else value
        for key, value in renamed.items()
    }


def _vae_projection(key: str) -> bool:
    """Whether one of our keys is a weight of the first stage's attention."""
    return re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight", key) is not None


def _text_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the `text_model.` that only transformers before version 5 writes, and without the positions."""
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    return {key: value for key, value in bare.items() if key != "embeddings.position_ids"}


def clip_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of CLIP's weights below their prefix, which are the same in both."""
    state = _text_model(state)
    return _rename("text_encoder", state, {name: name for name in CLIP_MODULES})


def openclip_to_ldm(state: Mapping[str, Tensor], unused: int = 1) -> dict[str, Tensor]:
    """Our names of OpenCLIP's weights, and as many layers of zeros behind its own as the model has but does not run."""
    state = _text_model(state)
    layers = _count(state, r"encoder\.layers\.(\d+)\.")
    ours, theirs = POSITIONS
    packed = {}
    for i in range(layers):
        for kind in ("weight", "bias"):
            inputs = [f"encoder.layers.{i}.{name}.{kind}" for name in ATTENTION_INPUTS]
            if missing := [name for name in inputs if name not in state]:
                raise ConversionError(f"text_encoder: without {', '.join(missing)}")
            packed[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat([state.pop(k) for k in inputs])
    names = _inverse(openclip_names(layers)) | {theirs: ours}
    result = _rename("text_encoder", state, names) | packed
    last = f"transformer.resblocks.{layers - 1}."
    zeros = {
        key.replace(last, f"transformer.resblocks.{layers + more}."): torch.zeros_like(value)
        for more in range(unused)
        for key, value in result.items()
        if key.startswith(last)
    }
    return result | zeros


# To a folder's parts


def is_openclip(state: Mapping[str, Tensor]) -> bool:
    """Whether a CompVis state dict has the text encoder of Stable Diffusion 2."""
    return any(key.startswith(OPENCLIP) for key in state)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The parts of a diffusers folder, in its present names, of a CompVis state dict; the inverse of `to_ldm`.

    Noise schedules, averages, training losses and unused parts of text encoders have no place there.

    Raises:
        ConversionError: a part is not there, or is not that of Stable Diffusion 1 or 2.
    """
    state = {key: value for key, value in state.items() if not NOT_IN_FOLDERS.fullmatch(key)}
    ours = parts_of(state, PARTS)
    openclip = is_openclip(state)
    text = {
        key.removeprefix(OPENCLIP if openclip else CLIP): value
        for key, value in state.items()
        if key.startswith(PARTS["text_encoder"])
    }
    text = openclip_to_diffusers(text) if openclip else clip_to_ldm(text)
    return {
        "unet": unet_to_diffusers(ours["unet"]),
        "vae": vae_to_diffusers(ours["vae"]),
        "text_encoder": {f"text_model.{key}": value for key, value in text.items()},
    }


def parts_of(state: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The weights of each part without its prefix.

    Raises:
        ConversionError: a part has none, or a weight belongs to no part.
    """
    parts = {
        part: {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    for part, weights in parts.items():
        if not weights:
            raise ConversionError(f"{part}: the checkpoint has no weights named {prefixes[part]}*")
    if strangers := [key for key in state if not key.startswith(tuple(prefixes.values()))]:
        raise ConversionError(f"keys that Stable Diffusion models do not have: {', '.join(sorted(strangers)[:4])}")
    return parts


def unet_to_diffusers(state: Mapping[str, Tensor], more: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The inverse of `unet_to_ldm`."""
    first = min(
        (int(found[1]) for key in state if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))),
        default=_count(state, r"input_blocks\.(\d+)\."),
    )
    if not first:
        raise ConversionError(f"unet: no input_blocks.*: not a UNet{some(state, 4)}")
    levels = _count(state, r"input_blocks\.(\d+)\.") // first
    attention = {i for i in range(levels) if f"output_blocks.{i * first}.1.norm.weight" in state}
    return _rename("unet", state, unet_names(levels, first - 1, attention) | dict(more or {}))


def vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vae_to_ldm`, in diffusers' present names."""
    names = vae_names(_count(state, r"encoder\.down\.(\d+)\."), _count(state, r"encoder\.down\.0\.block\.(\d+)\."))
    flat = {key: value.flatten(1) if _vae_projection(key) else value for key, value in state.items()}
    return _rename("vae", flat, names)


def openclip_to_diffusers(state: Mapping[str, Tensor], unused: int = 1) -> dict[str, Tensor]:
    """The inverse of `openclip_to_ldm`."""
    layers = _count(state, r"transformer\.resblocks\.(\d+)\.") - unused
    ours, theirs = POSITIONS
    kept, unpacked = {}, {}
    for key, value in state.items():
        found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key)
        if key.startswith(f"transformer.resblocks.{layers}."):
            continue  # the one that the model does not run
        if found is None:
            kept[key] = value
        else:
            unpacked |= {
                f"encoder.layers.{found[1]}.{name}.{found[2]}": part
                for name, part in zip(ATTENTION_INPUTS, value.chunk(3), strict=True)
            }
    return _rename("text_encoder", kept, openclip_names(layers) | {ours: theirs}) | unpacked


# The parts' settings


def diffusers_configs(
    params: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]], openclip: bool
) -> dict[str, dict[str, Any]]:
    """The content of the JSON files of a folder: for each part, and for the "scheduler".

    Args:
        params: `model.params` of the config of a `LatentDiffusion`.
        parts: result of `to_diffusers` for its weights.
        openclip: see `is_openclip`.

    Raises:
        ConversionError: a model that the folder can't describe.
    """
    unet, dd = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    if params.get("beta_schedule", "linear") != "linear" or params.get("parameterization", "eps") == "x0":
        raise ConversionError("scheduler: only the linear noise schedule and eps- or v-prediction have a place there")
    return {
        "unet": unet_config(params, unet, parts["unet"]),
        "vae": vae_config(params, dd),
        "text_encoder": text_config(parts["text_encoder"], openclip),
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": params["linear_start"],
            "beta_end": params["linear_end"],
            "num_train_timesteps": params.get("timesteps", 1000),
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[params.get("parameterization", "eps")],
        },
    }


def diffusers_unet(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the UNet of a folder.

    Args:
        params: `model.params` of the config of a `LatentDiffusion`.
        state: state dict of its `UNetModel`.

    Raises:
        ConversionError, KeyError: not a UNet of Stable Diffusion 1 or 2.
    """
    weights = unet_to_diffusers(state)
    return unet_config(params, params["unet_config"]["params"], weights), weights


def unet_config(params: Mapping[str, Any], unet: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a UNet; `params`: of the model, `unet`: of its UNet, whose weights have diffusers' names."""
    channels = [unet["model_channels"] * m for m in unet["channel_mult"]]
    levels = len(channels)
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in weights for i in range(levels)]
    width = unet.get("num_head_channels", -1)
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": params["image_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "block_out_channels": channels,
        "layers_per_block": unet["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "cross_attention_dim": unet["context_dim"],
        # In spite of its name it is the number of heads, of each level.
        "attention_head_dim": unet["num_heads"] if width == -1 else [c // width for c in channels],
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
        "use_linear_projection": bool(unet.get("use_linear_in_transformer", False)),
    }


def vae_config(params: Mapping[str, Any], dd: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a first stage; `params`: of the model, `dd`: the first stage's ddconfig."""
    levels = len(dd["ch_mult"])
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": params["image_size"] * 2 ** (levels - 1),
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "latent_channels": dd["z_channels"],
        "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
        "layers_per_block": dd["num_res_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": params["scale_factor"],
    }


def text_config(weights: Mapping[str, Tensor], openclip: bool) -> dict[str, Any]:
    """The config.json of a text encoder; `openclip`: OpenCLIP's."""
    vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
    layers = _count(weights, r"text_model\.encoder\.layers\.(\d+)\.")
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "intermediate_size": len(weights["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "max_position_embeddings": len(weights["text_model.embeddings.position_embedding.weight"]),
        "hidden_act": TEXT_ACTIVATIONS[openclip],
        "layer_norm_eps": 1e-5,
    }


# VideoFusion: ModelScope's names are ours. The projections of temporal transformers are convolutions of width 1 there,
# (C, C, 1), and linear layers in diffusers.

VIDEO_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.0.1": "transformer_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
TEMPORAL = re.compile(r"(transformer_in|.*temp_attentions\.\d+)\.proj_(in|out)\.weight")


def _video_group(ours: str, theirs: str, i: int, attended: bool) -> Iterator[tuple[str, str]]:
    """A residual block with what follows it, and where diffusers has it."""
    for own, other in RES_BLOCK.items():
        yield f"{ours}.0.{own}", f"{theirs}.resnets.{i}.{other}"
    yield f"{ours}.0.temopral_conv", f"{theirs}.temp_convs.{i}"
    if attended:
        yield f"{ours}.1", f"{theirs}.attentions.{i}"
        yield f"{ours}.2", f"{theirs}.temp_attentions.{i}"


def video_names(levels: int, blocks: int) -> dict[str, str]:
    """The modules, diffusers' name -> ModelScope's; `blocks`: residual blocks per level of the encoder."""
    pairs, place = list(VIDEO_ENDS.items()), 1
    for level in range(levels):
        down, attended = f"down_blocks.{level}", level < levels - 1
        for i in range(blocks):
            pairs += _video_group(f"input_blocks.{place}", down, i, attended)
            place += 1
        if attended:
            pairs.append((f"input_blocks.{place}.op", f"{down}.downsamplers.0.conv"))
            place += 1
    pairs += _video_group("middle_block", "mid_block", 0, True)
    second = {
        ours.replace("middle_block.0", "middle_block.3"): theirs
        for ours, theirs in _video_group("middle_block", "mid_block", 1, False)
    }
    pairs += second.items()
    for level in reversed(range(levels)):
        up, attended = f"up_blocks.{levels - 1 - level}", level < levels - 1
        for i in range(blocks + 1):
            place = (levels - 1 - level) * (blocks + 1) + i
            pairs += _video_group(f"output_blocks.{place}", up, i, attended)
        if level > 0:
            pairs.append((f"output_blocks.{place}.{3 if attended else 1}.conv", f"{up}.upsamplers.0.conv"))
    return {theirs: ours for ours, theirs in pairs}


def is_video(state: Mapping[str, Tensor]) -> bool:
    """Whether these are diffusers' names of a network of videos."""
    return "transformer_in.norm.weight" in state


def video_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under ModelScope's names, from diffusers'.

    Raises:
        ConversionError: names of another network.
    """
    levels = _count(state, r"down_blocks\.(\d+)\.")
    blocks = _count(state, r"down_blocks\.0\.resnets\.(\d+)\.")
    names, found, unknown = video_names(levels, blocks), {}, []
    for key, value in state.items():
        module = max((name for name in names if key.startswith(f"{name}.")), key=len, default=None)
        if module is None:
            unknown.append(key)
        else:
            found[names[module] + key.removeprefix(module)] = value[..., None] if TEMPORAL.fullmatch(key) else value
    if unknown:
        raise ConversionError(f"keys that VideoFusion's network does not have{some(unknown, 4)}")
    return found
