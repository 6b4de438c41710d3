"""Packed layers: the same network, faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.cost import unet_macs
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.packed import PackedConv2d, PackedLinear, PackedPointwise, pack

UNET = dict(image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, channel_mult=[1, 2],
            attention_resolutions=[2], num_heads=2, use_spatial_transformer=True, context_dim=16)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch without oneDNN")


def small_unet(**options) -> UNetModel:
    torch.manual_seed(0)
    unet = UNetModel(**UNET | options).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.1)
    return unet


@pytest.mark.parametrize("layer, kind, shape", [
    (nn.Linear(12, 20), PackedLinear, (3, 5, 12)), (nn.Linear(12, 20, bias=False), PackedLinear, (3, 12)),
    (nn.Conv2d(12, 20, 1), PackedPointwise, (3, 12, 6, 4)),
    (nn.Conv2d(12, 20, 3, padding=1), PackedConv2d, (3, 12, 6, 4)),
    (nn.Conv2d(12, 20, 3, stride=2, padding=1), PackedConv2d, (3, 12, 6, 4)),
    (nn.Conv2d(12, 24, 3, groups=4), PackedConv2d, (3, 12, 6, 4)),
    (nn.Conv2d(12, 20, 1, stride=2), PackedConv2d, (3, 12, 6, 4))], ids=str)
@torch.no_grad()
def test_a_packed_layer_computes_the_same(layer, kind, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for same in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.mT.contiguous().mT):
        expected, holder = layer(same), nn.Sequential(layer)
        pack(holder)
        assert type(holder[0]) is kind
        torch.testing.assert_close(holder(same), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_network_computes_the_same_at_every_size_and_batch():
    plain, packed = small_unet(), small_unet()
    pack(packed)
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
    pack(network)
    assert unet_macs(network, (8, 8), 2, 5) == expected
    assert not [name for name, p in network.named_parameters() if p.ndim > 1]
    pack(network)       # nothing is left to exchange
    assert unet_macs(network, (8, 8), 2, 5) == expected


def test_what_can_not_be_packed_stays():
    kept = nn.Sequential(nn.Linear(4, 4).double(), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 3, padding="same"),
                         nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(4, 4, device="meta"))
    before = list(kept)
    pack(kept)
    assert list(kept) == before
