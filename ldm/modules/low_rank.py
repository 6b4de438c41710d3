"""Linear layers with a low-rank change that is trained, LoRA (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import CrossAttention


class LowRankLinear(nn.Linear):
    """A linear layer, frozen, and a change of low rank beside it: x -> W x + b + up (down x).

    Args:
        layer: whose weights are taken.
        rank: of the change, which begins as zero.
    """

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def with_low_rank(network: nn.Module, rank: int) -> None:
    """Exchange the linear layers of all attention of a network for such layers."""
    attention = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, CrossAttention)]
    for name, layer in attention:
        for inner, linear in [*layer.named_modules()]:
            if type(linear) is nn.Linear:
                network.set_submodule(f"{name}.{inner}", LowRankLinear(linear, rank))
