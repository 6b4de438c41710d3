"""Stable Diffusion 2's models that see more than a text (a mask, depth, low resolution, an image's embedding), and XL.

Stable Diffusion XL has two text encoders, and a vector that says how the image is framed (arXiv 2307.01952).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.ddpm.latent import LatentDiffusion
from ldm.models.diffusion.denoiser import Conditioning
from ldm.util import instantiate_from_config


class LatentInpaintDiffusion(LatentDiffusion):
    """Paints the masked part of an image; the network sees the mask and what is around it.

    Args:
        finetune_keys: null; widening the first layer of another model's weights is not supported.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, finetune_keys: Sequence[str] | None = None, **rest: Any):
        if finetune_keys is not None:
            raise ValueError(f"finetune_keys must be null; got {finetune_keys}")
        super().__init__(**rest)

    def condition(self, context: Tensor, image: Tensor, mask: Tensor, noise: Tensor | None = None) -> Conditioning:
        """The condition of B images.

        Args:
            context: of their text, (B, L, D).
            image, mask, noise: see `seen`.
        """
        return Conditioning(context, self.seen(image, mask, noise))

    @torch.no_grad()
    def seen(self, image: Tensor, mask: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mask and the latents of what is around it, (B, 1 + C, h, w).

        Args:
            image: (B, 3, H, W) in [-1, 1].
            mask: (B, 1, H, W), above 0.5 where the image is to be painted; what is there is not seen.
            noise: unit normal like the latents, for the first stage's posterior; None = PyTorch's generator.

        Raises:
            ValueError: image and mask differ in size.
        """
        if mask.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(f"mask must have the shape {(len(image), 1, *image.shape[2:])}; got {tuple(mask.shape)}")
        painted = (mask > 0.5).to(image)
        seen = self.get_first_stage_encoding(self.encode_first_stage(image * (1 - painted)), noise)
        return torch.cat([F.interpolate(painted, size=seen.shape[-2:]), seen], dim=1)


class LatentDepth2ImageDiffusion(LatentDiffusion):
    """Images of a given depth.

    Args:
        depth_stage_config: estimates the depth of an image.
        finetune_keys: null; widening the first layer of another model's weights is not supported.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, depth_stage_config: Mapping[str, Any], finetune_keys: Sequence[str] | None = None, **rest: Any):
        if finetune_keys is not None:
            raise ValueError(f"finetune_keys must be null; got {finetune_keys}")
        super().__init__(**rest)
        self.depth_model = instantiate_from_config(depth_stage_config)

    def condition(self, context: Tensor, image: Tensor, size: tuple[int, int]) -> Conditioning:
        """The condition of B images.

        Args:
            context: of their text, (B, L, D).
            image: whose depth is taken, (B, 3, H, W) in [-1, 1].
            size: height and width of the latents.
        """
        depth = F.interpolate(self.depth_model(image), size=size, mode="bicubic")  # (B, 1, h, w)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        # Each image's own range to [-1, 1]; the published 0.001 keeps a flat one finite.
        return Conditioning(context, 2 * (depth - low) / (high - low + 0.001) - 1)


class LatentUpscaleDiffusion(LatentDiffusion):
    """Enlarges an image; the network sees it, with some noise, beside the latents.

    Args:
        low_scale_config: an `ImageConcatWithNoiseAugmentation`.
        low_scale_key: name of the low-resolution image in a batch.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, low_scale_config: Mapping[str, Any], low_scale_key: str = "LR", **rest: Any):
        super().__init__(**rest)
        self.low_scale_key = low_scale_key
        self.low_scale_model = instantiate_from_config(low_scale_config).eval().requires_grad_(False)

    def condition(self, context: Tensor, low: Tensor, noise_level: Tensor, noise: Tensor | None = None) -> Conditioning:
        """The condition of B images.

        Args:
            context: of their text, (B, L, D).
            low: low resolution, (B, 3, h, w) in [-1, 1], as high and wide as the latents.
            noise_level: (B,) integers below the low-scale model's max_noise_level; 0 = almost none.
            noise: unit normal like low; None = PyTorch's generator.
        """
        noised, level = self.low_scale_model(low, noise_level, noise)
        return Conditioning(context, noised, level)


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Varies an image; the network gets its CLIP embedding, with some noise, beside the text.

    Args:
        embedder_config: the image encoder.
        noise_aug_config: a `CLIPEmbeddingNoiseAugmentation`; None = the embedding as it is.
        embedding_key: name of the image in a batch.
        embedding_dropout: share of the embeddings that are zero in training, for guidance.
        freeze_embedder: take no gradients of the encoder.
        rest: see `LatentDiffusion`.
    """

    def __init__(
        self,
        embedder_config: Mapping[str, Any],
        noise_aug_config: Mapping[str, Any] | None = None,
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        **rest: Any,
    ):
        super().__init__(**rest)
        self.embedding_key, self.embedding_dropout = embedding_key, embedding_dropout
        self.embedder = instantiate_from_config(embedder_config)
        if freeze_embedder:
            self.embedder.eval().requires_grad_(False)
        self.noise_augmentor = None if noise_aug_config is None else instantiate_from_config(noise_aug_config)

    def condition(
        self, context: Tensor, image: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> Conditioning:
        """The condition of B images.

        Args:
            context: of their text, (B, L, D).
            image: (B, 3, H, W) in [-1, 1], of any size.
            noise_level: (B,) integers; 0 = almost no noise; None = random, as in training.
            noise: unit normal like the embeddings; None = PyTorch's generator.
        """
        y = self.embedder(image)  # (B, D)
        if self.noise_augmentor is not None:
            y = torch.cat(self.noise_augmentor(y, noise_level, noise), dim=1)  # (B, 2 D)
        if self.training:
            y = y * (torch.rand(len(y), 1, device=y.device) >= self.embedding_dropout)
        return Conditioning(context, y=y)


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
