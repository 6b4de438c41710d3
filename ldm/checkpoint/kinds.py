"""What a file of weights holds: a model, a control network, a small file that changes a model, a training's state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.control import READER, control_file
from ldm.checkpoint.conversion import CONTROL, UNET
from ldm.checkpoint.file import WRAPPERS, CheckpointError, read_checkpoint, read_pickle, weight_format
from ldm.checkpoint.lora import ALPHA, KINDS

MODEL, NETWORK, LORA, DELTA, WORDS, STATE = (
    "a model",
    "a control network",
    "a LoRA",
    "a delta of Custom Diffusion",
    "an embedding",
    "the state of a training",
)
TAKES = {"ckpt": MODEL, "control_model": NETWORK, "lora": LORA, "delta": DELTA, "embedding": WORDS}  # setting -> kind


def kinds_in(path: str | Path) -> set[str]:
    """Which of these kinds a file holds, by the names in it: one, two for a model with its control network, or none.

    None if it holds something else or can't be read; and for a training of all weights, whose state is a model's.
    """
    try:
        file = control_file(path)
        kind = weight_format(file)
        content = read_checkpoint(file) if kind == "safetensors" else read_pickle(file, zipped=kind == "zip")
    except (CheckpointError, OSError):
        return set()
    return _kinds(content) if isinstance(content, Mapping) else set()


def _kinds(content: Mapping[Any, Any]) -> set[str]:
    if {"string_to_param", "emb_params", "clip_g", "clip_l"} & content.keys():
        return {WORDS}
    state = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)), content)
    names = [name for name in state if isinstance(name, str)]
    if "first_token" in state or any(name.startswith("control.") for name in names):
        return {STATE}
    if any(name.endswith(end) for name in names for end, part in KINDS.items() if part != ALPHA):
        return {LORA}
    of_attention = bool(names) and all(".attn2." in name for name in names)
    if of_attention or {"modifier_token", "embed"} & {*content, *names} or isinstance(content.get("unet"), Mapping):
        return {DELTA}
    found = {MODEL} if any(name.startswith(UNET) for name in names) else set()
    if {"controlnet_cond_embedding.conv_in.weight", READER, CONTROL + READER} & {*names}:
        return found | {NETWORK}
    if names and all("." not in name and _is_word(state[name]) for name in names):
        return {WORDS}
    return found


def _is_word(value: Any) -> bool:
    """Whether this is one vector or several, for a text encoder."""
    return isinstance(value, Tensor) and value.ndim in (1, 2) and value.shape[-1] > 1
