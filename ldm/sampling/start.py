"""Where the latents of a run begin, and what of an image is kept: noise, an image, an image with a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.edits import Edit
from ldm.models.diffusion.sampler import mask_edits
from ldm.models.diffusion.schedule import Node, diffuse
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.sampling.generate import Item


class Start:
    """Noise, and what every start offers.

    strength: share of the steps that are run, the last ones; 1 = all.
    """

    strength: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What images depend on beside the items, as JSON values."""
        return {}

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        """The latents at the first node, from the items' noise x_T; both (B, C, h, w)."""
        return x_T

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        """What is changed on the way."""
        return ()

    def finish(self, images: Tensor, items: Sequence[Item]) -> Tensor:
        """The images as they are shown, from those that were decoded; both (B, 3, H, W)."""
        return images


class ImageStart(Start):
    """One image for all items, noised to the level where the run begins: image to image.

    The first stage's mean encoding is taken where the published script draws from its posterior. The noise
    level is that of the first step run, where the published script's is one step noisier, see
    `DDIMSampler.stochastic_encode`.

    Args:
        image: (3, H, W) in [-1, 1].
        strength: 0..1; 1 keeps next to nothing of the image.

    Source: SDEdit (arXiv 2108.01073).
    """

    def __init__(self, image: Tensor, strength: float):
        self.image, self.strength = image, strength

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        return diffuse(mean_latents(model, self.image[None]), x_T, node.abar)


class KeepOutsideMask(Start):
    """Images whose unmasked part is put back, to the pixel, when the run is finished.

    Args:
        images: one for each prompt_index, (N, 3, H, W) in [-1, 1].
        masks: 1 = to be painted, 0 = stays as it is, to the pixel; (N, 1, H, W).
    """

    def __init__(self, images: Tensor, masks: Tensor):
        self.images, self.masks = images, masks

    def finish(self, images: Tensor, items: Sequence[Item]) -> Tensor:
        height, width = images.shape[-2:]
        originals, masks = (part[..., :height, :width].to(images) for part in self._chosen(items))
        return torch.where(masks > 0, images, originals)

    def _chosen(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        indices = [item.prompt_index for item in items]
        return self.images[indices], self.masks[indices]


class LatentInpaint(KeepOutsideMask):
    """The same for a model that takes no mask: the rest is kept in the latents too, see `inpainting`.

    A latent is painted if any of its pixels is.
    """

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        originals, masks = (part.to(model.device) for part in self._chosen(items))
        x0 = mean_latents(model, originals)  # (B, C, h, w)
        kept = 1 - F.adaptive_max_pool2d(masks, x0.shape[-2:])  # (B, 1, h, w)
        return mask_edits(kept, x0, nodes, [item.seed for item in items])


@torch.no_grad()
def mean_latents(model: LatentDiffusion, images: Tensor) -> Tensor:
    """The latents (B, C, h, w) of images (B, 3, H, W); of a posterior its mean."""
    encoded = model.encode_first_stage(images.to(model.device))
    mean = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
    return model.get_first_stage_encoding(mean)
