"""What control costs: MACs of the network of Stable Diffusion 1.5, and of the rows of the paper's table 4."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.profiling.cost import CONVENTIONS, Macs, control_macs
from tests.helpers.paths import GOLDENS

PARAMS = json.loads(gzip.decompress((GOLDENS / "controlnet_state_dicts.json.gz").read_bytes()))
UNET = Macs(236_491_407_360, 504_561_500_160, outer=(0,) * 13)  # by the paper, see test_cost.py
KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)


def made(name: str) -> ControlNet:
    with torch.device("meta"):
        return ControlNet(**PARAMS[name]["params"])


@pytest.fixture(scope="module")
def network():
    return made("controlnet_sd15")


def test_the_whole_network_costs_what_was_counted(network):
    macs = control_macs(network, (64, 64), 2, 77)
    assert macs.encode + macs.once == 283_291_975_680
    assert macs.gated < macs.encode / 2, "one prediction without guidance and cross-attention"
    assert macs.outer[1] > 0 and macs.outer[-1] < macs.encode and len(macs.outer) == network.residuals


def test_the_rows_of_the_paper(network):
    """Paper: 49500 and 31400 GFLOPs; the second is not what the released code computes."""
    both = UNET.with_control(control_macs(network, (64, 64), 2, 77, "paper"))
    plain = both.run(Plan(50, tuple(range(50)))) / 1e9
    assert plain == pytest.approx(49970, abs=1) and abs(plain / 49500 - 1) < 0.01
    assert both.run(Plan(50, KEYS)) / 1e9 == pytest.approx(29682, abs=1)
    every = both.run(Plan(50, KEYS, control=True)) / 1e9
    assert every == pytest.approx(29682 + 41 * (plain - 37052.6) / 50, abs=1)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_batch_costs_as_much_as_its_latents(convention):
    """The network is that of Stable Diffusion 2.1, whose linear layers are no products of attention."""
    network = made("controlnet_sd21")
    one, two = (control_macs(network, (16, 16), batch, 7, convention) for batch in (1, 2))
    assert (two.encode, two.once, two.gated) == (2 * one.encode, 2 * one.once, one.gated)
