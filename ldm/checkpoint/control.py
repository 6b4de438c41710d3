"""Control networks (ControlNet) from their files: the release's, with a base model or alone, and diffusers folders."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.conversion import CONTROL, ConversionError, control_to_ldm
from ldm.checkpoint.file import CheckpointError, read_checkpoint
from ldm.checkpoint.model import fill, unmade
from ldm.io.errors import one_line
from ldm.modules.diffusionmodules.controlnet import ControlNet

log = logging.getLogger(__name__)

FOLDER_FILES = [
    f"diffusion_pytorch_model{variant}{suffix}" for suffix in (".safetensors", ".bin") for variant in ("", ".fp16")
]
LAYER = re.compile(r"input_hint_block\.(\d+)\.weight")
FIRST, READER = "input_blocks.0.0.weight", "input_hint_block.0.weight"
# Arguments of a UNet that its control network does not take, since it has no decoder and no label.
OF_A_DECODER = ("out_channels", "num_heads_upsample", "n_embed", "use_new_attention_order", "dims")


def control_file(path: str | Path) -> Path:
    """The file with the weights of a control network: of a diffusers folder the one inside.

    Raises:
        CheckpointError: there is none in the folder.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}; not that of a control network")
    return found[0]


def read_control(path: str | Path) -> dict[str, Tensor]:
    """The weights of a control network under our names, those of `ControlNet`.

    Args:
        path: a file that has them beside its base model's (control_model.*), or alone, or in the names of diffusers;
            or a folder of diffusers.

    Raises:
        OSError: no such file. CheckpointError: see `read_checkpoint`; or there is no control network in it.
    """
    file = control_file(path)
    state = read_checkpoint(file)
    if named := {key.removeprefix(CONTROL): value for key, value in state.items() if key.startswith(CONTROL)}:
        state = named
    try:
        state = control_to_ldm(state) if "controlnet_cond_embedding.conv_in.weight" in state else state
    except ConversionError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if any(key not in state or state[key].ndim != 4 for key in (READER, FIRST)):
        raise CheckpointError(
            f"{file}: no control network (ControlNet): expected {CONTROL}* beside a base model, {READER} or the names "
            f"of diffusers"
        )
    return state


def control_params(unet: Mapping[str, Any], hint_channels: int, hint_widths: Sequence[int]) -> dict[str, Any]:
    """The arguments of a `ControlNet` that reads such control images, for the UNet with these arguments.

    Raises:
        CheckpointError: no UNet, or one with a label, or of no latents of two dimensions.
    """
    if "model_channels" not in unet:
        raise CheckpointError("the model's network is no UNet; no control network is for such")
    if unet.get("num_classes") is not None or unet.get("dims", 2) != 2:
        raise CheckpointError("the model's UNet takes a label, or is not for images; no control network is for such")
    kept = {
        name: value for name, value in unet.items() if name not in (*OF_A_DECODER, "num_classes", "adm_in_channels")
    }
    return kept | {"hint_channels": hint_channels, "hint_widths": hint_widths}


def hint_params(state: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """The hint_channels and hint_widths of the `ControlNet` with these weights."""
    layers = sorted(int(found[1]) for key in state if (found := LAYER.fullmatch(key)))
    # A layer of each width, one to each other, and the last to the latents' width.
    widths = [len(state[f"input_hint_block.{layers[i]}.weight"]) for i in range(0, len(layers) - 1, 2)]
    return state[READER].shape[1], widths


def load_control(path: str | Path, unet: Mapping[str, Any], device: str | torch.device = "cpu") -> ControlNet:
    """The control network of a file for a model, ready to sample with.

    Args:
        path: see `read_control`.
        unet: the arguments of the UNet that it is to control, from its config.

    Raises:
        OSError, CheckpointError: see `read_control` and `control_params`; or it is for another base model.
    """
    state = read_control(path)
    params = control_params(unet, *hint_params(state))
    for name, of_model, of_file in (
        ("channels of latents", unet["in_channels"], state[FIRST].shape[1]),
        ("channels in its first layer", unet["model_channels"], state[FIRST].shape[0]),
        ("numbers of each token of the text", unet.get("context_dim"), _context_dim(state)),
    ):
        if of_model != of_file:
            raise CheckpointError(
                f"{path}: a control network for another base model: {of_file} {name}, this model's UNet has {of_model}"
            )
    network = unmade(lambda: ControlNet(**params))
    try:
        log.info("%s", fill(network, state, control_file(path), "raw", assign=True))
    except CheckpointError as error:
        raise CheckpointError(f"a control network for another base model? {one_line(error)}") from error
    return network.eval().requires_grad_(False).to(device)


def _context_dim(state: Mapping[str, Tensor]) -> int | None:
    return next((value.shape[1] for key, value in state.items() if key.endswith("attn2.to_k.weight")), None)
