"""A UNet without data, whose shapes can be followed and counted without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, wraps
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.util import instantiate_from_config

Given = ParamSpec("Given")
Found = TypeVar("Found")


def once_for_a_config(
    find: Callable[Concatenate[nn.Module | Mapping[str, Any], Sequence[int], Given], Found],
) -> Callable[Concatenate[nn.Module | Mapping[str, Any], Sequence[int], Given], Found]:
    """A function of a UNet without data, or of its config, and of the size of its latents.

    For a config it is computed once in a process, however often the network is built; a network is looked at anew.
    """

    @lru_cache
    def find_once(config: str, size: tuple[int, ...], *rest: Any, **named: Any) -> Found:
        return find(OmegaConf.create(config), size, *rest, **named)

    @wraps(find)
    def found(
        unet: nn.Module | Mapping[str, Any], size: Sequence[int], *rest: Given.args, **named: Given.kwargs
    ) -> Found:
        if isinstance(unet, nn.Module):
            return find(unet, size, *rest, **named)
        return find_once(OmegaConf.to_yaml(OmegaConf.create(unet), sort_keys=True), (*size,), *rest, **named)

    return found


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
