"""The moving average against the published implementation."""

from __future__ import annotations

import torch
from torch import nn

from ldm.modules.ema import LitEma
from tests.helpers.goldens import load_case


def two_layers(golden: dict[str, torch.Tensor], prefix: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model.load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    return model


def test_golden():
    case, golden = load_case("ema")
    model = two_layers(golden, "init.")
    ema = LitEma(model, decay=0.9999)
    for step in range(3):
        model.load_state_dict(two_layers(golden, f"step{step}.param.").state_dict())
        ema(model)
        state = ema.state_dict()
        wanted = {k.removeprefix(f"step{step}.ema."): v for k, v in golden.items() if k.startswith(f"step{step}.ema.")}
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=case["tolerance"]["atol"])


def test_applied_averages_are_taken_back():
    model = nn.Linear(2, 2)
    ema = LitEma(model)
    average = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()
    with ema.applied_to(model):
        assert torch.equal(model.weight, average)
    assert torch.equal(model.weight, own)
