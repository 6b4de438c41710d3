"""Convolutions and linear layers for inference on a CPU, their weights in the order that oneDNN computes with.

PyTorch's own layers keep the order of training and bring the weights into that of the kernel at every call. On the
small feature maps of a UNet's inner levels that takes longer than the computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.dit import GELULinear
from ldm.modules.diffusionmodules.openaimodel import meta_unet, once_for_a_config, without_data
from ldm.modules.diffusionmodules.unet3d import FrameConvolution
from ldm.modules.diffusionmodules.unet_layers import TokenConvolution
from ldm.modules.diffusionmodules.util import PartedConvolution

NO_ACTIVATION, GELU_TANH = ("none", [], ""), ("gelu", [], "tanh")


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, (..., in) -> (..., out), and an activation of it.

    Args:
        weight: (out, in), float32 on a CPU.
        bias: (out,).
        activation: in oneDNN's terms.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: tuple[str, list[float], str] = NO_ACTIVATION
    ) -> None:
        super().__init__()
        self.activation = activation
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation)


class PackedPointwise(PackedLinear):
    """A 1x1 convolution as a linear layer over the channels, (B, C, H, W) -> (B, C', H, W), channels-last.

    The order of a 1x1 convolution's weights depends on the size of the map, that of a linear layer's does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PackedConv2d(nn.Module):
    """What a convolution computes, (B, C, H, W) -> (B, C', H', W'), channels-last.

    The order of the weights depends on the width of the map. At another width the result is the same, but oneDNN may
    reorder at every call, element by element: 48 ms for 96 x 96 channels that take 0.2 ms to compute.

    Args:
        weight: (C', C / groups, kh, kw), float32 on a CPU.
        bias: (C',).
        settings: padding, stride, dilation, groups.
        shape: of the inputs it is packed for.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, settings: tuple[Any, Any, Any, int], shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.settings, self.size = settings, tuple(shape[2:])
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight.detach().contiguous(), *settings, shape)
        self.register_buffer("weight", packed, persistent=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.settings, "none", [], "")

    def packed_for(self, shape: Sequence[int]) -> PackedConv2d:
        """The same for inputs of another height and width, bit for bit as if it had been packed for them at once."""
        if tuple(shape[2:]) == self.size:
            return self
        channels = self.weight.shape[1] * self.settings[-1]
        return PackedConv2d(self.weight.to_dense(), self.bias, self.settings, (shape[0], channels, *shape[2:]))


class ContiguousConv2d(nn.Conv2d):
    """A convolution that is not packed, between packed layers; (B, C, H, W) -> (B, C', H', W'), channels-last.

    For many maps of at most 8 x 8, such as those of a video's frames, oneDNN's kernels for channels-last maps reach a
    third to two thirds of the rate of those for contiguous ones.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        kinds = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
        super().__init__(conv.in_channels, conv.out_channels, **kinds, bias=False, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


class PackedParts(PartedConvolution):
    """A packed convolution of all input channels, or of those before some channel or from it on alone.

    The weights are kept twice: packed, they are in an order out of which some channels can not be taken.
    """

    def __init__(self, whole: nn.Module, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.whole, self.first, self.last = whole, first, last

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)

    def part(self, x: Tensor, start: int) -> Tensor:
        return self.last(x) if start else self.first(x)

    def packed_for(self, shape: Sequence[int]) -> PackedParts:
        """See `PackedConv2d`."""
        parts = self.whole, self.first, self.last
        others = [part.packed_for(shape) if isinstance(part, PackedConv2d) else part for part in parts]
        return self if all(map(is_, others, parts)) else PackedParts(*others)


def pack(
    unet: nn.Module, size: Sequence[int], context_length: int | None = None, config: Mapping[str, Any] | None = None
) -> None:
    """Exchange a UNet's layers for packed ones, one after the other; each gives up its former weights.

    Of a network that is packed for another size, the layers are exchanged that depend on it.

    Layers that are not float32 on a CPU stay as they are, and so do all on a CPU without AVX-512, where the order of a
    convolution's weights depends on the batch too. Afterwards the network is for inference in float32 only: it has no
    weights to train, to save or to convert. The first convolutions of the decoder's residual blocks are kept in parts,
    too, for what several nodes share (`UNetModel.share`): 22 % more weights for Stable Diffusion's shapes.

    Args:
        unet: a `UNetModel`.
        size: height and width of the latents; at others the network computes the same, but may be much slower.
        context_length: tokens of the context, for a UNet with cross-attention.
        config: that the UNet was built from, for which shapes are found once in a process; None = by the UNet itself.
    """
    if torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512":
        shapes = convolution_shapes(config or unet, size, context_length)
        pack_layers(unet, shapes, unet.shared_from(), unet.small_map)


@once_for_a_config
def convolution_shapes(
    unet: nn.Module | Mapping[str, Any], size: Sequence[int], context_length: int | None = None
) -> Mapping[str, Sequence[int]]:
    """The shapes that each two-dimensional convolution of a UNet gets, by its name; arguments as for `pack`."""
    shapes: dict[str, Sequence[int]] = {}
    with without_data():
        copy, x, inputs = meta_unet(unet, size, 2, context_length, tome=0.0)
        for name, layer in copy.named_modules():
            if isinstance(layer, nn.Conv2d | FrameConvolution | PackedConv2d | PackedParts):
                layer.register_forward_pre_hook(lambda _, given, name=name: shapes.update({name: given[0].shape}))
        copy.decode(copy.encode(x, **inputs), **inputs)
    return MappingProxyType(shapes)


def pack_layers(
    network: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    parts: Mapping[str, int] = MappingProxyType({}),
    small_map: int = 0,
) -> None:
    """Exchange the layers of any network.

    Args:
        network: its layers are exchanged, not the network itself.
        shapes: of the inputs of its convolutions, by their names; one without a shape stays as it is.
        parts: the input channel at which a convolution is also kept in two parts, by its name.
        small_map: the widest map whose convolutions are left as `ContiguousConv2d`.
    """
    for name in [name for name, _ in network.named_modules()]:  # without the layers, to let go of each
        layer = network.get_submodule(name)
        packed = _packed(layer, shapes.get(name), small_map)
        if packed is not layer and name in parts and not isinstance(layer, PackedParts):
            packed = PackedParts(packed, *_packed_parts(layer, shapes[name], parts[name]))
        if packed is not layer:
            network.set_submodule(name, packed)


def _packed_parts(conv: nn.Conv2d, shape: Sequence[int], start: int) -> Iterator[nn.Module]:
    """Packed convolutions of the input channels before `start`, with the bias, and of the others."""
    batch, _, *size = shape
    for weight, bias in ((conv.weight[:, :start], conv.bias), (conv.weight[:, start:], None)):
        outs, ins, *kernel = weight.shape
        part = nn.Conv2d(ins, outs, kernel, conv.stride, conv.padding, bias=False, device="meta")
        part.weight, part.bias = nn.Parameter(weight, requires_grad=False), bias
        yield _packed(part, (batch, ins, *size))


def _packed(layer: nn.Module, shape: Sequence[int] | None, small_map: int = 0) -> nn.Module:
    if isinstance(layer, PackedConv2d | PackedParts) and shape is not None:
        return layer.packed_for(shape)
    if type(layer) not in (nn.Linear, GELULinear, TokenConvolution, nn.Conv2d, FrameConvolution, ContiguousConv2d):
        return layer
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return layer
    if type(layer) is GELULinear:
        return PackedLinear(layer.weight, layer.bias, GELU_TANH)
    if type(layer) in (nn.Linear, TokenConvolution):
        return PackedLinear(layer.weight.flatten(1), layer.bias)
    if shape is None or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return layer
    if layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1:
        return PackedPointwise(layer.weight.flatten(1), layer.bias)
    if type(layer) is FrameConvolution:
        return PackedConv2d(layer.weight[..., 0], layer.bias, (layer.padding[:2], (1, 1), (1, 1), 1), shape)
    if shape[3] <= small_map:
        return layer if type(layer) is ContiguousConv2d else ContiguousConv2d(layer)
    settings = layer.padding, layer.stride, layer.dilation, layer.groups
    return PackedConv2d(layer.weight, layer.bias, settings, shape)
