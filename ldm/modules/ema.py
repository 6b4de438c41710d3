"""Exponential moving average of weights, under the names that published checkpoints use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class LitEma(nn.Module):
    """Moving average of every trainable parameter of `model`.

    Buffers are the parameters' names with all dots removed, plus `decay` and `num_updates`. The decay of
    update n (from 1) is min(decay, (1 + n) / (10 + n)), so that a young average follows quickly.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must lie in [0, 1]; got {decay}")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int32))
        for name, parameter in trainable(model):
            self.register_buffer(ema_name(name), parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Take one step towards the present parameters of `model`."""
        self.num_updates += 1
        n = self.num_updates.item()
        decay = min(self.decay.item(), (1 + n) / (10 + n))
        averages, parameters = self._pairs(model)
        if averages:  # where all is frozen there are none
            torch._foreach_lerp_(averages, parameters, 1.0 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` with the averages."""
        averages, parameters = self._pairs(model)
        if averages:
            torch._foreach_copy_(parameters, averages)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """`model` holds the averages inside the block and its own parameters again after it."""
        kept = [p.detach().clone() for _, p in trainable(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                if kept:
                    torch._foreach_copy_([p.detach() for _, p in trainable(model)], kept)

    def _pairs(self, model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        named = list(trainable(model))
        return [self.get_buffer(ema_name(n)) for n, _ in named], [p.detach() for _, p in named]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def ema_name(parameter: str) -> str:
    """Name of a parameter's average: buffer names can hold no dots."""
    return parameter.replace(".", "")
