"""A UNet without data, whose shapes can be followed and counted without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config


def meta_unet(
    unet: nn.Module | Mapping[str, Any], size: Sequence[int], batch: int, context_length: int | None, tome: float
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The UNet without data, an x for it, and the other arguments of its `encode`; to be called on the meta device."""
    unet = instantiate_from_config(unet) if isinstance(unet, Mapping) else on_meta(unet)
    inputs = {"timesteps": torch.zeros(batch), "context": None, "y": None, "tome": tome}
    if context_length is not None:
        inputs["context"] = torch.zeros(batch, context_length, unet.context_dim)
    if unet.num_classes is not None:
        inputs["y"] = _label(unet, batch)
    return unet, torch.zeros(batch, unet.in_channels, *size), inputs


def _label(unet: nn.Module, batch: int) -> Tensor:
    if isinstance(unet.num_classes, int):
        return torch.zeros(batch, dtype=torch.long)
    return torch.zeros(batch, unet.adm_in_channels or 1)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module without its data."""
    tensors = chain(module.parameters(), module.buffers())
    memo = {}
    for tensor in tensors:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
