"""What pictures are painted on: where their latents begin, what of them is kept."""

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


class Canvas:
    """Nothing: latents begin as noise; and what every canvas offers.

    strength: share of the steps that are run, the last ones; 1 = all.
    """

    strength: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What pictures depend on beside the items, as JSON values."""
        return {}

    def start(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        """The latents at the first node, from the items' noise x_T; both (B, C, h, w)."""
        return x_T

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        """What is changed on the way."""
        return ()

    def finish(self, pictures: Tensor, items: Sequence[Item]) -> Tensor:
        """The pictures as they are shown, from those that were decoded; both (B, 3, H, W)."""
        return pictures


class Picture(Canvas):
    """One picture for all items, brought to the noise level where the run begins: image to image.

    The first stage's mean encoding is taken where the published script draws from its posterior. The noise
    level is that of the first step run, where the published script's is one step noisier, see
    `DDIMSampler.stochastic_encode`.

    Args:
        picture: (3, H, W) in [-1, 1].
        strength: 0..1; 1 keeps next to nothing of the picture.

    Source: SDEdit (arXiv 2108.01073).
    """

    def __init__(self, picture: Tensor, strength: float):
        self.picture, self.strength = picture, strength

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def start(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        return diffuse(mean_latents(model, self.picture[None]), x_T, node.abar)


class Frame(Canvas):
    """Pictures of which all but the masked part is put back when the rest is finished.

    Args:
        pictures: one for each prompt_index, (N, 3, H, W) in [-1, 1].
        masks: 1 = to be painted, 0 = stays as it is, to the pixel; (N, 1, H, W).
    """

    def __init__(self, pictures: Tensor, masks: Tensor):
        self.pictures, self.masks = pictures, masks

    def finish(self, pictures: Tensor, items: Sequence[Item]) -> Tensor:
        height, width = pictures.shape[-2:]
        originals, masks = (part[..., :height, :width].to(pictures) for part in self._chosen(items))
        return torch.where(masks > 0, pictures, originals)

    def _chosen(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        indices = [item.prompt_index for item in items]
        return self.pictures[indices], self.masks[indices]


class MaskedFrame(Frame):
    """The same for a model that knows no masks: the rest is kept in its latents, too, see `inpainting`.

    A latent is painted if any of its pixels is.
    """

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        originals, masks = (part.to(model.device) for part in self._chosen(items))
        x0 = mean_latents(model, originals)  # (B, C, h, w)
        kept = 1 - F.adaptive_max_pool2d(masks, x0.shape[-2:])  # (B, 1, h, w)
        return mask_edits(kept, x0, nodes, [item.seed for item in items])


@torch.no_grad()
def mean_latents(model: LatentDiffusion, pictures: Tensor) -> Tensor:
    """The latents (B, C, h, w) of pictures (B, 3, H, W); of a posterior its mean."""
    encoded = model.encode_first_stage(pictures.to(model.device))
    mean = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
    return model.get_first_stage_encoding(mean)
