"""The timestep embedding: golden numbers and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.helpers.goldens import load_case


@pytest.mark.parametrize("name, dim", [("dim320", 320), ("dim32", 32), ("dim33_odd", 33)])
def test_golden(name, dim):
    """At the golden's tolerance, plus what the last bit of a float32 frequency makes of the angle.

    exp() differs in that bit from one kind of CPU to another; at t = 1000 it turns the angle by up to 6e-5.
    """
    case, tensors = load_case("timestep_embedding")
    half = dim // 2
    last_bit = torch.from_numpy(np.spacing(10000 ** -(np.arange(half, dtype=np.float32) / half)))
    slack = tensors["t"][:, None] * torch.cat([last_bit, last_bit, torch.zeros(dim % 2)])
    error = (timestep_embedding(tensors["t"], dim) - tensors[name]).abs()
    assert (error <= case["tolerance"]["atol"] + slack).all()
    assert (error > case["tolerance"]["atol"]).float().mean() < 0.01


def test_repeat_only_golden():
    _, tensors = load_case("timestep_embedding")
    assert torch.equal(timestep_embedding(tensors["t"], 8, repeat_only=True), tensors["repeat_only8"])


def test_integer_and_equal_fractional_timesteps_agree():
    t = torch.tensor([0, 7, 999])
    assert torch.equal(timestep_embedding(t, 64), timestep_embedding(t.double(), 64))


def test_every_pair_of_cosine_and_sine_lies_on_the_unit_circle():
    cos, sin = timestep_embedding(torch.rand(5) * 1000, 64).chunk(2, dim=-1)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(5, 32))


def test_max_period_is_the_longest_period():
    half_a_period = torch.tensor([torch.pi * 100])
    slowest = timestep_embedding(half_a_period, 1000, max_period=100)[0, 499]
    assert slowest < -0.99
