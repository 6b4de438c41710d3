"""LoRA: low-rank changes of weights, read from the files of kohya's scripts and of peft and diffusers, and merged.

Source: Hu et al. (arXiv 2106.09685).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.conversion import CLIP, OPENCLIP, UNET, openclip_to_diffusers
from ldm.checkpoint.delta import diffusers_names
from ldm.checkpoint.file import CheckpointError, read_checkpoint
from ldm.io.errors import some

TEXT = "cond_stage_model."
DOWN, UP, ALPHA = "down", "up", "alpha"
KINDS = {  # the end of a key -> what it is; the longest first
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    ".alpha": ALPHA,
}
# The beginning of a key -> the part that it is of; "base_model.model." of peft is put before any of them.
PARTS = {"lora_unet_": "unet", "lora_te1_": "text", "lora_te_": "text", "unet.": "unet", "text_encoder.": "text"}
OLD_TEXT = {f"self_attn_to_{short}": f"self_attn_{short}_proj" for short in ("q", "k", "v", "out")}


@dataclass(frozen=True)
class Target:
    """A weight, or some of its rows (start, end)."""

    parameter: str
    rows: tuple[int, int] | None = None


def merge_lora(model: nn.Module, path: str | Path, weight: float = 1.0) -> list[str]:
    """Add a file's changes to a model's weights, times `weight`.

    W <- W + weight * alpha / rank * up @ down, with alpha = rank where the file has none.

    Returns:
        the keys of the file that belong to no weight of the model.

    Raises:
        CheckpointError: the file can't be read, is no LoRA, or is for another model: no key or no shape fits.
    """
    state = read_checkpoint(path)
    layers, unmatched = layers_of(state)
    if not layers:
        raise CheckpointError(f"{path}: not a LoRA of kohya's scripts, peft or diffusers{some(state, 4)}")
    targets, changes = targets_of(model), []
    for name, parts in layers.items():
        if name not in targets or not {DOWN, UP} <= parts.keys():
            unmatched += [key for key, _ in parts.values()]
        else:
            changes.append((targets[name], parts))
    if not changes:
        raise CheckpointError(
            f"{path}: made for another model: none of its {len(layers)} layers is in this one{some(layers, 4)}"
        )
    parameters = dict(model.named_parameters())
    deltas = [(target, weight * delta(path, parameters, target, parts)) for target, parts in changes]
    for target, change in deltas:  # after all have been seen to fit
        changed = parameters[target.parameter].detach().clone()  # the file's memory may be behind it
        changed[slice(*target.rows) if target.rows else slice(None)] += change.to(changed)
        parameters[target.parameter].data = changed
    return sorted(unmatched)


def layers_of(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], list[str]]:
    """By the layer's name in one spelling, the key and the tensor of each of DOWN, UP and ALPHA; and other keys."""
    layers: dict[str, dict[str, tuple[str, Tensor]]] = {}
    others = []
    for key, value in state.items():
        end = next((end for end in KINDS if key.endswith(end)), None)
        if end is None:
            others.append(key)
        else:
            layers.setdefault(layer_name(key.removesuffix(end)), {})[KINDS[end]] = (key, value)
    if any(not {DOWN, UP} & parts.keys() for parts in layers.values()):  # an alpha alone
        others += [key for parts in layers.values() if not {DOWN, UP} & parts.keys() for key, _ in parts.values()]
        layers = {name: parts for name, parts in layers.items() if {DOWN, UP} & parts.keys()}
    return layers, others


def layer_name(name: str) -> str:
    """'lora_unet_mid_block_...' and 'unet.mid_block....' in one spelling: 'unet mid_block_...'."""
    name = name.removeprefix("base_model.model.")
    begin = next((begin for begin in PARTS if name.startswith(begin)), "")
    part = PARTS.get(begin) or ("text" if name.startswith("text_model.") else "unet")
    name = re.sub(r"\.processor\.(to_\w+)$", r".\1", name.removeprefix(begin)).replace(".", "_")
    name = re.sub(r"(attn\d_to_out)$", r"\1_0", name)
    for old, new in OLD_TEXT.items():
        name = name.replace(old, new)
    return f"{part} {name}"


def targets_of(model: nn.Module) -> dict[str, Target]:
    """The weights that a LoRA can change, by `layer_name`, under our names and under those of diffusers."""
    found: dict[str, Target] = {}
    weights = {key: p for key, p in model.named_parameters() if key.endswith("weight") and p.ndim > 1}
    for part, prefix in (("unet", UNET), ("text", TEXT)):
        own = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
        found |= {_spelled(part, name): Target(key) for name, key in own.items()}
    unet = {key.removeprefix(UNET): p for key, p in model.named_parameters() if key.startswith(UNET)}
    theirs = diffusers_names(unet).items()
    found |= {_spelled("unet", name): Target(UNET + own) for name, own in theirs if UNET + own in weights}
    clip = {key.removeprefix(CLIP): key for key in weights if key.startswith(CLIP)}
    found |= {_spelled("text", f"text_model.{name}"): Target(key) for name, key in clip.items()}
    return found | openclip_targets(model)


def openclip_targets(model: nn.Module) -> dict[str, Target]:
    """Those of OpenCLIP's text encoder, whose queries, keys and values are rows of one weight."""
    named = {key.removeprefix(OPENCLIP): p for key, p in model.named_parameters() if key.startswith(OPENCLIP)}
    own = {key: p for key, p in named.items() if key not in ("logit_scale", "text_projection")}
    if not own:
        return {}
    # The rows of all weights are counted through, so that a part of a weight tells which rows it has.
    starts, total = {}, 0
    for name, p in own.items():
        starts[total], total = name, total + len(p)
    counted = dict(zip(own, torch.arange(total, dtype=torch.float64).split([*map(len, own.values())]), strict=True))
    found = {}
    for theirs, rows in openclip_to_diffusers(counted).items():
        begin = max(start for start in starts if start <= rows[0])
        first = int(rows[0]) - begin
        found[_spelled("text", f"text_model.{theirs}")] = Target(OPENCLIP + starts[begin], (first, first + len(rows)))
    return found


def _spelled(part: str, key: str) -> str:
    return f"{part} {key.removesuffix('.weight').replace('.', '_')}"


def delta(path: str | Path, parameters: Mapping[str, Tensor], target: Target, parts: Mapping) -> Tensor:
    """alpha / rank * up @ down, in the shape of the target.

    Raises:
        CheckpointError: another shape, or an alpha that is not one number.
    """
    (key, down), (_, up), (_, alpha) = parts[DOWN], parts[UP], parts.get(ALPHA, ("", None))
    if min(down.ndim, up.ndim) < 2 or not len(down) or (alpha is not None and alpha.numel() != 1):
        raise CheckpointError(
            f"{path}: {key}: expected two matrices and one alpha; got {tuple(down.shape)}, {tuple(up.shape)}"
            + ("" if alpha is None else f" and an alpha of shape {tuple(alpha.shape)}")
        )
    rank = len(down)
    scale = 1.0 if alpha is None else float(alpha) / rank
    wanted = parameters[target.parameter].shape
    wanted = (target.rows[1] - target.rows[0], *wanted[1:]) if target.rows else tuple(wanted)
    outs, inside = up.shape[0], tuple(down.shape[1:])
    inside = inside[:1] if set(inside[1:]) <= {1} else inside
    flat = wanted[1:2] if set(wanted[2:]) <= {1} else wanted[1:]
    if up.shape[1] != rank or (outs, *inside) != (wanted[0], *flat):
        raise CheckpointError(
            f"{path}: made for another model: {key} changes a weight of {(outs, *inside)}, here it is {wanted}"
        )
    return scale * (up.flatten(1).float() @ down.flatten(1).float()).view(wanted)
