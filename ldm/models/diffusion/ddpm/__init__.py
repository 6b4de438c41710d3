"""Diffusion models under their published names: the network with its condition, and what surrounds it."""

from ldm.compatibility import disabled_train
from ldm.models.diffusion.ddpm.latent import (
    DDPM,
    ConditionLike,
    DiffusionWrapper,
    LatentDiffusion,
    Layout2ImgDiffusion,
    MinimalRETRODiffusion,
)
from ldm.models.diffusion.ddpm.stable_diffusion import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    StableDiffusionXL,
    StableDiffusionXLInpaint,
)

__all__ = [
    "ConditionLike",
    "DDPM",
    "DiffusionWrapper",
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "Layout2ImgDiffusion",
    "MinimalRETRODiffusion",
    "StableDiffusionXL",
    "StableDiffusionXLInpaint",
    "disabled_train",
]
