"""A model's network with control networks (ControlNet)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.models.diffusion.control import Control, Controlled
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import ConditionedNetwork
from ldm.modules.diffusionmodules.controlnet import ControlNet, guess_weights
from ldm.profiling.cost import Macs, control_macs
from ldm.sampling.generate import Item
from ldm.sampling.task import Network


class Hints(Protocol):
    """Control images as control networks read them: a tensor of all, or what makes each when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: Sequence[int]) -> Tensor:
        """Those at these places, (B, 3, H, W), RGB in [0, 1]."""


@dataclass(frozen=True, eq=False)
class ControlInput:
    """What one control network is to follow.

    network: on the model's device.
    hints:   one for each prompt_index, or one for all.
    weight:  of what it adds.
    facts:   what identifies the network and the control image, as JSON values.
    """

    network: ControlNet
    hints: Hints
    weight: float
    facts: dict[str, Any]
    _last: dict[tuple[int, ...], Tensor] = field(default_factory=dict, init=False)

    def of(self, prompts: Sequence[int]) -> Tensor:
        """Those of images of these prompt_indices, (B, 3, H, W); the last ones are kept."""
        places = tuple(prompt if len(self.hints) > 1 else 0 for prompt in prompts)
        if places not in self._last:
            self._last.clear()
            # The precision of a run is not that of what finds edges or depth.
            with torch.autocast("cpu", enabled=False):
                self._last[places] = self.hints[[*places]]
        return self._last[places]


class ControlledBy(Network):
    """The model's network, and control networks that read a control image each; see `Controlled`.

    Args:
        inputs: at least one.
        guess: the release's guess mode: what is added counts less the further out it is, and not for the unconditional
            prediction.
        anew: the control networks run at every node, not at key nodes alone.
    """

    def __init__(self, inputs: Sequence[ControlInput], guess: bool = False, anew: bool = False) -> None:
        self.inputs, self.guess, self.anew = inputs, guess, anew
        self.controls = [one.network for one in inputs]

    def settings(self) -> dict[str, Any]:
        control = [one.facts | {"weight": one.weight} for one in self.inputs]
        return {"control": control} | ({"guess": True} if self.guess else {})

    @torch.no_grad()
    def prepare(self, items: Sequence[Item]) -> None:
        for one in self.inputs:
            one.of([item.prompt_index for item in items])

    def of(self, model: LatentDiffusion, items: Sequence[Item]) -> ConditionedNetwork:
        with torch.no_grad():
            controls = [self._control(one, items) for one in self.inputs]
        return Controlled(model.model, controls, self.guess, self.anew)

    def _control(self, one: ControlInput, items: Sequence[Item]) -> Control:
        network = one.network
        hints = one.of([item.prompt_index for item in items])  # (B, 3, H, W)
        weights = guess_weights(one.weight, network.residuals) if self.guess else one.weight
        return Control.of(network, hints.to(network.input_hint_block[0].weight.device), weights)

    def macs(self, unit: Macs, size: Sequence[int], tokens: int | None, guided: bool) -> Macs:
        for one in self.inputs:
            control = control_macs(one.network, size, 1, tokens)
            # In guess mode it runs once for the two predictions of guidance.
            unit = unit.with_control(control.part(2) if self.guess and guided else control)
        return unit
