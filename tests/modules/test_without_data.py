"""Networks without data, whose shapes are followed: quickly, and with what they have of data as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.diffusionmodules.openaimodel import UNetModel, meta_unet, without_data
from ldm.modules.diffusionmodules.util import Unfilled
from tests.helpers.tiny_unet import TEXT_UNET, unet_config


class Operations(TorchDispatchMode):
    """The names of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_layers_without_data_are_not_filled():
    with Operations() as done, Unfilled():
        nn.Conv2d(3, 4, 3, device="meta")
        nn.init.normal_(nn.Linear(3, 4, device="meta").weight)
    assert done.names and not [name for name in done.names if not name.startswith("aten::empty")]


def test_layers_with_data_are_filled_as_ever():
    one = nn.Linear(3, 4)
    torch.manual_seed(0)
    with Unfilled():
        other = nn.Linear(3, 4)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_what_norms_and_sums_put_out_is_as_with_data(layout):
    def shapes(device):
        x = torch.zeros(2, 4, 3, 5, device=device).to(memory_format=layout)
        whole, part = x + x, x + x[:, :, :1]
        outs = whole, part, x.half() + x, x + 1, torch.add(x, x, alpha=2), nn.GroupNorm(2, 4, device=device)(x).detach()
        return [(out.shape, out.stride(), out.dtype) for out in outs]

    with without_data():
        found = shapes("meta")
    assert found[:5] == shapes("cpu")[:5] and found[5][0] == (2, 4, 3, 5)


@torch.no_grad()
def test_a_network_is_followed_as_it_runs():
    network, seen = UNetModel(**TEXT_UNET), {}
    with without_data():
        copy, x, inputs = meta_unet(unet_config(), (8, 8), 2, 5, tome=0.0)
        followed = copy.encode(x, **inputs)
        seen["out"] = copy.decode(followed, **inputs).shape
    ran = network.encode(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 5, 16))
    assert [t.shape for t in followed.tensors] == [t.shape for t in ran.tensors] and seen["out"] == (2, 4, 8, 8)
