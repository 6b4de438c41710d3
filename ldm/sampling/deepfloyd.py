"""Conditions of DeepFloyd-IF: the states of texts, and for its second stage a low-resolution image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import Conditioning
from ldm.models.diffusion.schedule import ImageNoise, diffuse
from ldm.modules.diffusionmodules.deepfloyd import DeepFloydUNet
from ldm.sampling.generate import Item
from ldm.sampling.hybrid import AUGMENTATION_STREAM
from ldm.sampling.task import Condition


class TextStates(Condition):
    """States of the items' prompts, made before by T5.

    Args:
        states: of each prompt_index, (N, L, D).
        negative: states of what guidance leads away from, (L, D).
        text: what images depend on beside the prompts, as JSON values: the negative prompt, and which T5 it was.
    """

    kind, key = "a first stage of DeepFloyd-IF", "crossattn-adm"

    def __init__(self, states: Tensor, negative: Tensor, text: dict[str, Any]) -> None:
        self.states, self.negative, self.text = states, negative, text

    def tokens(self, model: LatentDiffusion) -> int:
        super().tokens(model)
        network = model.model.diffusion_model
        self._need(isinstance(network, DeepFloydUNet), f"its network is a {type(network).__name__}")
        given = self.states.shape[-1]
        self._need(network.encoder_dim == given, f"it reads states of width {network.encoder_dim}, T5's have {given}")
        return self.states.shape[1]

    def settings(self) -> dict[str, Any]:
        return self.text

    def cut(self, model: LatentDiffusion, texts: Sequence[str]) -> int:
        return 0  # said where they were encoded

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Conditioning:
        return self._conditioning(model, self.states[[item.prompt_index for item in items]])

    def unconditional(self, model: LatentDiffusion, cond: Conditioning) -> Conditioning:
        negative = self._conditioning(model, self.negative.expand(len(cond.y), -1, -1))
        return replace(negative, concat=cond.concat)

    def noise_level(self, count: int) -> Tensor | None:
        """The noise level of the low-resolution images, which conditions the network, (B,)."""
        return None

    @torch.no_grad()
    def _conditioning(self, model: LatentDiffusion, states: Tensor) -> Conditioning:
        level = self.noise_level(len(states))
        level = None if level is None else level.to(model.device)
        context, y = model.model.diffusion_model.condition(states.to(model.device), level)
        return Conditioning(context, y=y)


class TextStatesAndImage(TextStates):
    """The same, and an image that is made larger; the noise on it belongs to the item.

    Args:
        images: one for each prompt_index, (N, 3, h, w) in [-1, 1].
        level: how much noise is added, a timestep of the model's schedule.
        rest: see `TextStates`.
    """

    kind, key = "a second stage of DeepFloyd-IF", "hybrid-adm"

    def __init__(self, images: Tensor, level: int, *rest: Any) -> None:
        super().__init__(*rest)
        self.images, self.level = images, level

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"noise_level": self.level}

    def noise_level(self, count: int) -> Tensor:
        return torch.full((count,), self.level)

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Conditioning:
        small = self.images[[item.prompt_index for item in items]].to(model.device)
        large = F.interpolate(small, size=(model.image_size,) * 2, mode="bilinear", align_corners=True)
        noise = ImageNoise([(*item.seed, AUGMENTATION_STREAM) for item in items]).start(large.shape[1:])
        noised = diffuse(large, noise.to(large), float(model.alphas_cumprod[self.level]))
        return replace(super().encode(model, items), concat=noised)
