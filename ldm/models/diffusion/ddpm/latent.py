"""Diffusion on the latents of a first stage (arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm.diffusion import DDPM
from ldm.models.diffusion.ddpm.published import PublishedMethods
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import instantiate_from_config


class LatentDiffusion(DDPM, PublishedMethods):
    """A diffusion on the latents of a first stage, under a condition from a conditioning stage.

    Args:
        first_stage_config: the autoencoder; always frozen.
        cond_stage_config: the conditioner; "__is_first_stage__" encodes the condition with the first stage,
            "__is_unconditional__" means there is none.
        cond_stage_key: name of the condition in a batch.
        cond_stage_trainable: the conditioner is trained together with the network.
        concat_mode: meaning of conditioning_key None with a conditioner: "concat", else "crossattn".
        scale_factor: latents are the first stage's times this.
        scale_by_std: the scale factor is a buffer, measured by the training on its first batch.
        normalize_latents: latents have mean 0 and standard deviation 1 in every channel, by the buffers latent_mean and
            latent_std, which the training measures; instead of a scale factor.
        num_timesteps_cond: 1; shortened conditioning schedules are not supported.
        rest: see `DDPM`.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        unet_config: Mapping[str, Any],
        num_timesteps_cond: int = 1,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        normalize_latents: bool = False,
        **rest: Any,
    ) -> None:
        if num_timesteps_cond != 1:
            raise ValueError(f"num_timesteps_cond must be 1; got {num_timesteps_cond}")
        if conditioning_key is None and cond_stage_config != "__is_unconditional__":
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(unet_config, conditioning_key=conditioning_key, **rest)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        if normalize_latents and (scale_by_std or scale_factor != 1.0):
            raise ValueError("normalize_latents: takes the place of scale_by_std and scale_factor; give one of them")
        self.scale_by_std, self.normalize_latents = scale_by_std, normalize_latents
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        if normalize_latents:
            channels = self.channels  # (C, 1, 1) each
            self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))
            self.register_buffer("latent_std", torch.ones(channels, 1, 1))
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        if cond_stage_config == "__is_unconditional__":
            conditioner = None
        elif cond_stage_config == "__is_first_stage__":
            conditioner = self.first_stage_model
        else:
            conditioner = instantiate_from_config(cond_stage_config)
            if not cond_stage_trainable:
                conditioner.eval().requires_grad_(False)
        self._add_conditioner(conditioner)

    def _add_conditioner(self, conditioner: nn.Module | None) -> None:
        """Under the name that it has in published files."""
        self.cond_stage_model = conditioner

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def get_learned_conditioning(self, c: Any) -> Any:
        """The conditioner's output for a raw condition (prompts, labels, images, …).

        Raises:
            ValueError: the model has no conditioner.
        """
        if self.cond_stage_model is None:
            raise ValueError("c: this model is unconditional, it takes no condition")
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        c = encode(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what the first stage encodes them to, not yet scaled."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoded: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Latents (B, C, h, w): a sample of the posterior (with `noise` if given) or the code, scaled or normalized."""
        z = encoded.sample(noise) if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        if self.normalize_latents:
            return (z - self.latent_mean) / self.latent_std
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False, tile: int | None = None) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f*h, f*w), about [-1, 1], not clamped.

        tile: height and width of tiles in pixels, see `decode_tiled`; None = the whole image at once.
        """
        return self._decoded(z, force_not_quantize, tile)

    def _decoded(self, z: Tensor, force_not_quantize: bool, tile: int | None = None) -> Tensor:
        quantized = {"force_not_quantize": True} if force_not_quantize else {}  # which a KL first stage does not take
        z = z * self.latent_std + self.latent_mean if self.normalize_latents else z / self.scale_factor
        return self.first_stage_model.decode(z, tile=tile, **quantized)


class Layout2ImgDiffusion(LatentDiffusion):
    """`LatentDiffusion` under the name that configs of models of bounding boxes may give.

    Raises:
        ValueError: the condition in a batch is not boxes.
    """

    def __init__(self, cond_stage_key: str = "coordinates_bbox", **rest: Any):
        if cond_stage_key != "coordinates_bbox":
            raise ValueError(f"cond_stage_key must be coordinates_bbox; got {cond_stage_key!r}")
        super().__init__(cond_stage_key=cond_stage_key, **rest)
