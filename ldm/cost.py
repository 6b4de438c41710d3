"""What a run costs in multiply-accumulates (MACs), counted without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.diffusion.plan import Plan
from ldm.util import instantiate_from_config


@dataclass(frozen=True)
class Macs:
    """MACs of one prediction of a batch: convolutions, linear layers, and both products of attention.

    encode: what a non-key node saves: input blocks, middle block and time embedding.
    decode: what every node pays: output blocks, output layer and time embedding.
    """

    encode: int
    decode: int

    @property
    def whole(self) -> int:
        """One prediction with nothing saved."""
        return self.encode + self.decode

    def run(self, plan: Plan) -> int:
        """All predictions of a run."""
        return len(plan.keys) * self.encode + plan.num_nodes * self.decode


def count_macs(call: Callable[[], Any]) -> int:
    """MACs of everything that call() does on tensors (1 MAC = 2 FLOPs)."""
    # Fused attention, counted as a whole on some devices only, is taken apart into its two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() // 2


def unet_macs(unet: nn.Module | Mapping[str, Any], size: Sequence[int], batch: int = 1,
              context_length: int | None = None) -> Macs:
    """MACs of one encode and one decode of a UNet.

    Args:
        unet: a `UNetModel`, which is left as it is, or its config (`target`, `params`).
        size: height and width of the latent, multiples of the UNet's `downsampling`.
        batch: latents per prediction; guidance doubles it.
        context_length: tokens of the context, for a UNet with cross-attention.

    Source of the convention: Faster Diffusion (arXiv 2312.09608), table 1, counts MACs too, but leaves out
    the product of queries and keys.
    """
    with torch.device("meta"), torch.no_grad():
        unet = instantiate_from_config(unet) if isinstance(unet, Mapping) else _on_meta(unet)
        inputs = {"timesteps": torch.zeros(batch), "context": None, "y": None}
        if context_length is not None:
            inputs["context"] = torch.zeros(batch, context_length, unet.context_dim)
        if unet.num_classes is not None:
            inputs["y"] = _label(unet, batch)
        x = torch.zeros(batch, unet.in_channels, *size)
        features = []
        encode = count_macs(lambda: features.append(unet.encode(x, **inputs)))
        decode = count_macs(lambda: unet.decode(features[0], **inputs))
    return Macs(encode, decode)


def plan_macs(unet: nn.Module | Mapping[str, Any], plan: Plan, size: Sequence[int], batch: int = 1,
              context_length: int | None = None) -> int:
    """MACs of all of a run's predictions; arguments as for `unet_macs`."""
    return unet_macs(unet, size, batch, context_length).run(plan)


def _label(unet: nn.Module, batch: int) -> Tensor:
    if isinstance(unet.num_classes, int):
        return torch.zeros(batch, dtype=torch.long)
    return torch.zeros(batch, unet.adm_in_channels or 1)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module without its data."""
    tensors = chain(module.parameters(), module.buffers())
    memo = {id(t): nn.Parameter(t.detach().to("meta"), requires_grad=False) if isinstance(t, nn.Parameter)
            else t.detach().to("meta") for t in tensors}
    return copy.deepcopy(module, memo)
