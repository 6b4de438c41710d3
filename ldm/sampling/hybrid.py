"""Conditioning on text and something else: the models of Stable Diffusion 2 that take more than a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import (
    LatentDepth2ImageDiffusion,
    LatentDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
)
from ldm.models.diffusion.denoiser import Conditioning
from ldm.models.diffusion.schedule import ImageNoise
from ldm.modules.encoders.tokenizer import AS_PUBLISHED, Reading
from ldm.sampling.generate import Item
from ldm.sampling.task import Text

AUGMENTATION_STREAM = 2  # appended to an image's seed: the noise on its condition is not the solver's noise


class Hybrid(Text):
    """What they have in common: guidance leads away from the text alone, the rest of the conditioning stays."""

    key = "hybrid"
    model_class: type[LatentDiffusion]

    def tokens(self, model: LatentDiffusion) -> int:
        self._need(
            isinstance(model, self.model_class),
            f"it is a {type(model).__name__}, expected a {self.model_class.__name__}",
        )
        return super().tokens(model)

    def unconditional(self, model: LatentDiffusion, cond: Conditioning) -> Conditioning:
        return replace(cond, context=super().unconditional(model, cond.context))


class Depth(Hybrid):
    """The depth of one image for all items, which the model's own network estimates.

    Args:
        image: (3, H, W) in [-1, 1].
        size: height and width of the latents.
        negative, reading: see `Text`.
    """

    kind, model_class = "a depth-to-image model", LatentDepth2ImageDiffusion

    def __init__(self, image: Tensor, size: tuple[int, int], negative: str = "", reading: Reading = AS_PUBLISHED):
        super().__init__(negative, reading)
        self.image, self.size = image, size

    def encode(self, model: LatentDepth2ImageDiffusion, items: Sequence[Item]) -> Conditioning:
        cond = model.condition(super().encode(model, items), self.image[None].to(model.device), self.size)
        return replace(cond, concat=cond.concat.expand(len(items), -1, -1, -1))  # (B, 1, h, w)


class TextAndMaskedImage(Hybrid):
    """What is around the masked part of an image, and the mask: inpainting by Stable Diffusion.

    The first stage's mean encoding is taken where the published script draws from its posterior.

    Args:
        images: one for each prompt_index, (N, 3, H, W) in [-1, 1]; what is masked is not seen.
        masks: 1 = to be painted, 0 = stays; (N, 1, H, W).
        negative, reading: see `Text`.
    """

    kind, model_class = "a model for inpainting from text", LatentInpaintDiffusion

    def __init__(self, images: Tensor, masks: Tensor, negative: str = "", reading: Reading = AS_PUBLISHED):
        super().__init__(negative, reading)
        self.images, self.masks = images, masks

    def encode(self, model: LatentInpaintDiffusion, items: Sequence[Item]) -> Conditioning:
        indices = [item.prompt_index for item in items]
        images, masks = (part[indices].to(model.device) for part in (self.images, self.masks))
        return model.condition(super().encode(model, items), images, masks, noise=torch.zeros(()))


class LowResolution(Hybrid):
    """A small image, noised by a known amount: the x4 upscaler. The noise belongs to the item.

    Args:
        images: one for each prompt_index, (N, 3, h, w) in [-1, 1], as high and wide as the latents.
        noise_level: 0..max_noise_level-1 of the model's low-scale model; 0 = almost none.
        negative, reading: see `Text`.
    """

    kind, key, model_class = "an upscaler that reads text", "hybrid-adm", LatentUpscaleDiffusion

    def __init__(self, images: Tensor, noise_level: int, negative: str = "", reading: Reading = AS_PUBLISHED):
        super().__init__(negative, reading)
        self.images, self.noise_level = images, noise_level

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"noise_level": self.noise_level}

    def encode(self, model: LatentUpscaleDiffusion, items: Sequence[Item]) -> Conditioning:
        low = self.images[[item.prompt_index for item in items]].to(model.device)
        noise = ImageNoise([(*item.seed, AUGMENTATION_STREAM) for item in items]).start(low.shape[1:])
        level = torch.full((len(items),), self.noise_level, device=model.device)
        return model.condition(super().encode(model, items), low, level, noise.to(model.device))
