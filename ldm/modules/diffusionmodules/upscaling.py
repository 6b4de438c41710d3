"""Noise augmentation: a condition is noised by a known amount, and the network gets the amount.

Source: cascaded diffusion (arXiv 2106.15282), section 4; as in the x4 upscaler and Stable unCLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.io.files import find_file
from ldm.modules.diffusionmodules.util import ForwardProcess, make_beta_schedule, timestep_embedding


def _betas(timesteps: int = 1000, beta_schedule: str = "linear", **bounds: float) -> np.ndarray:
    return make_beta_schedule(beta_schedule, timesteps, **bounds)


class ImageConcatWithNoiseAugmentation(ForwardProcess):
    """Noise a low-resolution image that the network sees beside its latents.

    Args:
        noise_schedule_config: timesteps, beta_schedule, linear_start, linear_end, cosine_s, see
            `make_beta_schedule`.
        max_noise_level: the network was trained with levels below this.

    Raises:
        ValueError: max_noise_level is not in 1..timesteps.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any], max_noise_level: int = 1000) -> None:
        super().__init__(_betas(**noise_schedule_config))
        if not 0 < max_noise_level <= self.num_timesteps:
            raise ValueError(f"max_noise_level must be in 1..{self.num_timesteps}; got {max_noise_level}")
        self.max_noise_level = max_noise_level

    def levels(self, x: Tensor, noise_level: Tensor | None) -> Tensor:
        """The levels given, (B,), checked; or random ones for training.

        Raises:
            ValueError: they are not B integers in 0..max_noise_level-1.
        """
        if noise_level is None:
            return torch.randint(0, self.max_noise_level, (len(x),), device=x.device)
        if noise_level.shape != (len(x),) or noise_level.is_floating_point():
            raise ValueError(
                f"noise_level must be integers of shape ({len(x)},); got {noise_level.dtype} {tuple(noise_level.shape)}"
            )
        if not 0 <= noise_level.min() <= noise_level.max() < self.max_noise_level:
            raise ValueError(f"noise_level must be in 0..{self.max_noise_level - 1}; got {noise_level.tolist()}")
        return noise_level.to(x.device)

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the same with noise, and the levels (B,).

        Args:
            x: in the range of the network's condition.
            noise_level: (B,) integers; None = random.
            noise: unit normal, like x; None = drawn from PyTorch's generator.
        """
        noise_level = self.levels(x, noise_level)
        return self.q_sample(x, noise_level, noise), noise_level


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Noise the CLIP embedding of an image, in units of the embeddings' spread.

    Args:
        noise_schedule_config, max_noise_level: see `ImageConcatWithNoiseAugmentation`.
        timestep_dim: width D of an embedding, and of the level's sinusoidal embedding.
        clip_stats_path: file with the mean and standard deviation of the embeddings, two tensors (D,); looked
            for by `ldm.io.files.find_file`. None = 0 and 1.

    Raises:
        ValueError: the file is missing or holds something else.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any],
        max_noise_level: int = 1000,
        timestep_dim: int = 256,
        clip_stats_path: str | Path | None = None,
    ) -> None:
        super().__init__(noise_schedule_config, max_noise_level)
        self.timestep_dim = timestep_dim
        mean, std = (
            (torch.zeros(timestep_dim), torch.ones(timestep_dim))
            if clip_stats_path is None
            else _statistics(clip_stats_path, timestep_dim)
        )
        self.register_buffer("data_mean", mean[None], persistent=False)
        self.register_buffer("data_std", std[None], persistent=False)

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D) -> the same with noise, and the embedded levels (B, D)."""
        z, noise_level = super().forward((x - self.data_mean) / self.data_std, noise_level, noise)
        return z * self.data_std + self.data_mean, timestep_embedding(noise_level, self.timestep_dim)


def _statistics(path: str | Path, dim: int) -> tuple[Tensor, Tensor]:
    try:
        stats = torch.load(find_file(path), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or cut-off pickle can make the reader fail in any way
        raise ValueError(f"clip_stats_path: {' '.join(str(error).split())}; expected a file of two tensors") from error
    if not (isinstance(stats, (tuple, list)) and [getattr(s, "shape", None) for s in stats] == [(dim,)] * 2):
        raise ValueError(f"clip_stats_path: {path}: expected two tensors of {dim} numbers")
    return tuple(s.float() for s in stats)
