"""Stable Diffusion XL: two text encoders, and a vector that says how the image is framed (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm.latent import LatentDiffusion
from ldm.models.diffusion.ddpm.stable_diffusion_2 import LatentInpaintDiffusion
from ldm.models.diffusion.denoiser import Conditioning

SCORE = "aesthetic_score"


class StableDiffusionXL(LatentDiffusion):
    """The base model, and the refiner, which finishes the images of a base model.

    The conditioner is called `conditioner`, as in the published files.

    Args:
        cond_stage_config: a `GeneralConditioner`.
        disable_first_stage_autocast: compute the first stage in float32 even where the rest runs in a lower precision:
            in float16 the published first stage overflows.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, disable_first_stage_autocast: bool = True, **rest: Any):
        super().__init__(**rest)
        self.disable_first_stage_autocast = disable_first_stage_autocast

    @property
    def cond_stage_model(self) -> nn.Module:
        return self.conditioner

    def _add_conditioner(self, conditioner: nn.Module | None) -> None:
        self.conditioner = conditioner

    @property
    def refines(self) -> bool:
        """Whether this is the refiner: it knows how much people like an image, and not how large it is to be."""
        return SCORE in self.conditioner.numbers

    @torch.no_grad()
    def get_learned_conditioning(self, c: Mapping[str, Any]) -> Conditioning:
        """The condition of prompts ("txt") and numbers, see `GeneralConditioner.forward`."""
        context, vector = self.conditioner(c)
        return Conditioning(context, y=vector)

    def encode_first_stage(self, x: Tensor) -> Any:
        with self._first_stage_precision(x):
            return super().encode_first_stage(x)

    def _decoded(self, z: Tensor, force_not_quantize: bool, tile: int | None = None) -> Tensor:
        with self._first_stage_precision(z):
            return super()._decoded(z.float() if self.disable_first_stage_autocast else z, force_not_quantize, tile)

    def _first_stage_precision(self, like: Tensor) -> torch.autocast:
        kept = torch.is_autocast_enabled(like.device.type) and not self.disable_first_stage_autocast
        return torch.autocast(like.device.type, enabled=kept)


class StableDiffusionXLInpaint(StableDiffusionXL, LatentInpaintDiffusion):
    """Paints the masked part of an image; the network sees the mask and what is around it."""
