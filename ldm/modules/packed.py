"""Convolutions and linear layers for inference on a CPU, their weights in the order that oneDNN computes with.

PyTorch's own layers keep the order of training and bring the weights into that of the kernel at every call. On the
small feature maps of a UNet's inner levels that takes longer than the computation.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, (..., in) -> (..., out).

    Args:
        weight: (out, in), float32 on a CPU.
        bias: (out,).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPointwise(PackedLinear):
    """A 1x1 convolution as a linear layer over the channels, (B, C, H, W) -> (B, C', H, W), channels-last.

    The order of a 1x1 convolution's weights depends on the size of the map, that of a linear layer's does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedConv2d(nn.Module):
    """What a convolution computes, (B, C, H, W) -> (B, C', H', W'), channels-last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.settings = conv.padding, conv.stride, conv.dilation, conv.groups
        packed = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach().contiguous(), *self.settings, None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.settings, "none", [], "")


def pack(network: nn.Module) -> None:
    """Exchange the network's layers for packed ones, one after the other; each gives up its former weights.

    Layers that are not float32 on a CPU with oneDNN stay as they are. Afterwards the network is for inference in
    float32 only: it has no weights to train, to save or to convert.
    """
    for name, layer in network.named_children():
        network.register_module(name, _packed(layer))
        pack(network.get_submodule(name))


def _packed(layer: nn.Module) -> nn.Module:
    if type(layer) not in (nn.Linear, nn.Conv2d) or not torch.backends.mkldnn.is_available():
        return layer
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return layer
    if type(layer) is nn.Linear:
        return PackedLinear(layer.weight, layer.bias)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return layer
    if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1:
        return PackedPointwise(layer.weight.flatten(1), layer.bias)
    return PackedConv2d(layer)
