"""Packed layers: the same network, faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.diffusionmodules.dit import GELULinear
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.unet3d import FrameConvolution, VideoUNet
from ldm.modules.diffusionmodules.unet_layers import TokenConvolution
from ldm.modules.packed import (
    ContiguousConv2d,
    PackedConv2d,
    PackedLinear,
    PackedParts,
    PackedPointwise,
    convolution_shapes,
    pack,
    pack_layers,
)
from ldm.profiling.cost import unet_macs
from tests.helpers.deepfloyd import FIRST, SECOND, recipe_network
from tests.helpers.tiny_unet import TEXT_UNET, unet_config

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="only packed with oneDNN on a CPU with AVX-512",
)


def small_unet(**options) -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(**TEXT_UNET | options).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.1)
    return unet


@pytest.mark.parametrize(
    "layer, kind, shape",
    [
        (nn.Linear(12, 20), PackedLinear, (3, 5, 12)),
        (nn.Linear(12, 20, bias=False), PackedLinear, (3, 12)),
        (GELULinear(12, 20), PackedLinear, (3, 5, 12)),
        (TokenConvolution(12, 20), PackedLinear, (3, 5, 12)),
        (FrameConvolution(12), PackedConv2d, (3, 12, 6, 4)),
        (nn.Conv2d(12, 20, 1), PackedPointwise, (3, 12, 6, 4)),
        (nn.Conv2d(12, 20, 3, padding=1), PackedConv2d, (3, 12, 6, 4)),
        (nn.Conv2d(12, 20, 3, stride=2, padding=1), PackedConv2d, (3, 12, 6, 4)),
        (nn.Conv2d(12, 24, 3, groups=4), PackedConv2d, (3, 12, 6, 4)),
        (nn.Conv2d(12, 20, 1, stride=2), PackedConv2d, (3, 12, 6, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_packed_layer_computes_the_same(layer, kind, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for same in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT):
        expected, holder = layer(same), nn.Sequential(layer)
        pack_layers(holder, {"0": shape})
        assert type(holder[0]) is kind
        torch.testing.assert_close(holder(same), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_network_computes_the_same_at_every_size_and_batch():
    plain, packed = small_unet(), small_unet()
    pack(packed, (8, 8), 5)
    for batch, height, width in ((1, 8, 8), (3, 16, 8), (8, 4, 4)):
        x, context = torch.randn(batch, 4, height, width), torch.randn(batch, 5, 16)
        t = torch.arange(batch) * 100.0
        expected = plain(x, t, context)
        torch.testing.assert_close(packed(x, t, context), expected, rtol=1e-4, atol=1e-4)
        one = packed(x[-1:], t[-1:], context[-1:])
        torch.testing.assert_close(one, packed(x, t, context)[-1:], rtol=1e-4, atol=1e-4)


def test_a_packed_network_costs_the_same_and_holds_no_other_weights():
    network = small_unet()
    expected = unet_macs(network, (8, 8), 2, 5)
    pack(network, (8, 8), 5)
    assert unet_macs(network, (8, 8), 2, 5) == expected
    assert not [name for name, p in network.named_parameters() if p.ndim > 1]
    pack(network, (8, 8), 5)  # nothing is left to exchange
    assert unet_macs(network, (8, 8), 2, 5) == expected


@torch.no_grad()
def test_packed_for_another_size_it_is_as_if_it_had_been_packed_for_that_at_once():
    """To the bit, also in the convolutions that are kept in parts; what does not depend on the size is left."""
    again, once = small_unet(num_res_blocks=2), small_unet(num_res_blocks=2)
    pack(again, (8, 8), 5)
    former = dict(again.named_modules())
    pack(again, (16, 32), 5)
    pack(once, (16, 32), 5)
    kinds = {name: type(layer) for name, layer in once.named_modules()}
    assert {name: type(layer) for name, layer in again.named_modules()} == kinds and PackedParts in kinds.values()
    replaced = {type(layer) for name, layer in again.named_modules() if layer is not former[name]}
    assert replaced == {PackedConv2d, PackedParts}
    x, t, context = torch.randn(2, 4, 16, 32), torch.tensor([7.0, 500.0]), torch.randn(2, 5, 16)
    assert torch.equal(again(x, t, context), once(x, t, context))
    features = again.encode(x, t, context)
    shared = [unet.decode(unet.share(features), t, context) for unet in (again, once)]
    assert torch.equal(*shared)


def test_what_can_not_be_packed_stays():
    kept = nn.Sequential(
        nn.Linear(4, 4).double(),
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Linear(4, 4, device="meta"),
    )
    before = list(kept)
    pack_layers(kept, {str(i): (1, 4, 8, 8) for i in range(len(before))})
    assert list(kept) == before
    convolution = nn.Sequential(nn.Conv2d(4, 4, 3))
    pack_layers(convolution, {})
    assert type(convolution[0]) is nn.Conv2d, "without its shape the order of its weights is not known"


@torch.no_grad()
def test_convolutions_are_packed_for_what_they_get():
    network, found = small_unet(), {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0].shape}))
    network(torch.randn(2, 4, 16, 8), torch.zeros(2), torch.randn(2, 5, 16))
    assert convolution_shapes(network, (16, 8), 5) == found and len(found) > 10
    config = unet_config()
    of_config = convolution_shapes(config, (16, 8), 5)
    assert of_config == found and convolution_shapes(dict(config), [16, 8], 5) is of_config, "found once"
    assert convolution_shapes(config, (8, 8), 5) != found
    pack(network, (16, 8), 5, config)
    assert not [name for name, layer in network.named_modules() if type(layer) is nn.Conv2d]


@pytest.mark.parametrize("size", [(8, 8), (32, 32)], ids=str)
@torch.no_grad()
def test_no_weights_are_reordered_at_a_call(capfd, size):
    """With 96 channels their order depends on the width of the map: packed for another one each call took 20 times
    as long."""
    network = small_unet(model_channels=96)
    pack(network, size, 5)
    for batch in (2, 6):
        given = torch.randn(batch, 4, *size), torch.zeros(batch), torch.randn(batch, 5, 16)
        network(*given)
        with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
            network(*given)
        calls = [line.split(",") for line in capfd.readouterr().out.splitlines() if ",exec," in line]
        reordered = [call for call in calls if "reorder" in call and call[-2].count("x") == 3 and "3x3" in call[-2]]
        assert len(calls) > 20 and not reordered


class Operators(TorchDispatchMode):
    """The names of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [FIRST, SECOND], ids=["first", "second"])
@torch.no_grad()
def test_a_stage_of_deepfloyd_is_packed_whole_and_attends_in_one_kernel(stage):
    """Keys and values in an order that the kernel does not take cost a quarter of a prediction."""
    network = recipe_network(stage, 1, 1.0)
    size, t, states = (stage["sample_size"],) * 2, torch.tensor([7, 500]), torch.randn(2, 5, 32)
    context, y = network.condition(states, None if network.aug_proj is None else t)
    x, context = torch.randn(2, network.in_channels, *size), network.project(context)
    expected = network(x, t, context, y)
    pack(network, size, 5)
    with Operators() as operators:
        found = network(x, t, context, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators.names
    assert not [name for name in operators.names if "bmm" in name or "softmax" in name]


@torch.no_grad()
def test_a_network_of_videos_is_packed_whole_but_for_its_small_maps():
    """Those of 8 x 8 and below; packed for larger ones it is packed whole."""
    torch.manual_seed(0)
    sizes = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": 16}
    network = VideoUNet(in_channels=4, out_channels=4, context_dim=16, **sizes).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.1)
    for side, kept in ((8, True), (32, False)):
        x, t, context = torch.randn(2, 4, 3, side, side), torch.tensor([7.0, 500.0]), torch.randn(2, 5, 16)
        expected = network(x, t, context)
        pack(network, (side, side), 5)
        torch.testing.assert_close(network(x, t, context), expected, rtol=1e-4, atol=1e-4)
        layers = [layer for _, layer in network.named_modules()]
        assert not [layer for layer in layers if type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)]
        assert not [layer for layer in layers if isinstance(layer, TokenConvolution | FrameConvolution)]
        assert any(isinstance(layer, ContiguousConv2d) for layer in layers) == kept
