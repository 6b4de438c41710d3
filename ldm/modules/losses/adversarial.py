"""What the losses of both kinds of first stages share: reconstruction, perceptual distance and a discriminator.

Source: VQGAN (arXiv 2012.09841), section 3.2, as taming-transformers and latent diffusion train it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.modules.losses.discriminator import DISCRIMINATOR_LOSSES, NLayerDiscriminator
from ldm.modules.losses.lpips import Perceptual, perceptual

GREATEST_WEIGHT = 1e4  # of the adversarial term, before disc_weight


class Reconstruction(NamedTuple):
    """The loss without its adversarial term.

    nll:   scalar, against which the adversarial term is balanced.
    loss:  scalar.
    terms: by the names under which they are logged.
    """

    nll: Tensor
    loss: Tensor
    terms: dict[str, Tensor]


class AdversarialLoss(nn.Module, ABC):
    """Loss of a first stage and of its discriminator.

    Args:
        disc_start: batches before the discriminator counts; up to then its loss and the adversarial term are 0.
        disc_factor, disc_weight: factors of the adversarial term; disc_factor also of the discriminator's loss.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: see `NLayerDiscriminator`.
        disc_conditional: the discriminator sees a condition too, joined to the images.
        disc_loss: hinge or vanilla.
        perceptual_weight: of the perceptual distance beside the error of the pixels; 0 = it is not computed.
        perceptual: vgg16 (LPIPS, as published), efficientnet-lite0, none, or a module.
        perceptual_weights: file with the weights of vgg16, see `ldm.modules.losses.lpips.lpips`.
        pixelloss_weight: accepted for published configs, which state it; without effect there too.

    Raises:
        ValueError: an unknown name, or a perceptual distance whose weights can't be had.
    """

    def __init__(
        self,
        disc_start: int,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_ndf: int = 64,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_weight: float = 1.0,
        perceptual: str | Perceptual = "vgg16",
        perceptual_weights: str | None = None,
        pixelloss_weight: float = 1.0,
    ):
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise ValueError(f"disc_loss: {disc_loss!r} is not one of {', '.join(DISCRIMINATOR_LOSSES)}")
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = distance(perceptual if perceptual_weight > 0.0 else "none", perceptual_weights)
        self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
        self.disc_start, self.disc_factor, self.disc_weight = disc_start, disc_factor, disc_weight
        self.disc_conditional, self.disc_loss = disc_conditional, DISCRIMINATOR_LOSSES[disc_loss]

    @abstractmethod
    def reconstruction(self, error: Tensor, distance: Tensor, latent: Any, weights: Tensor | None) -> Reconstruction:
        """The loss without the adversarial term.

        Args:
            error: images minus reconstructions, (B, C, H, W).
            distance: perceptual distances, (B, 1, 1, 1), not yet weighted.
            latent: the second thing that the first stage's `forward` returns.
            weights: of the elements of the error, broadcast to them; None = 1.
        """

    @property
    def always_balanced(self) -> bool:
        """Whether the weight of the adversarial term is computed even where disc_factor makes it 0."""
        return False

    def factor(self, batches: int) -> float:
        """disc_factor after this number of batches."""
        return self.disc_factor if batches >= self.disc_start else 0.0

    def generator(
        self,
        images: Tensor,
        reconstruction: Tensor,
        latent: Any,
        batches: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of the first stage: `total_loss` and its terms, scalars.

        Args:
            images, reconstruction: (B, C, H, W) in [-1, 1].
            latent: the second thing that the first stage's `forward` returns.
            batches: seen before this one.
            last_layer: weight at which the gradients of the adversarial and the other terms are balanced.
            cond: joined to the images for the discriminator, (B, C', H, W).
            weights: see `reconstruction`.
        """
        reconstruction = reconstruction.float()
        between = images.new_zeros(len(images), 1, 1, 1)
        if self.perceptual_loss is not None:
            between = self.perceptual_loss(images, reconstruction).float()
        without = self.reconstruction(images - reconstruction, between, latent, weights)
        g_loss = -self.discriminator(self.disc_input(reconstruction, cond)).float().mean()
        d_weight = images.new_zeros(())
        if torch.is_grad_enabled() and last_layer is not None and (self.disc_factor > 0.0 or self.always_balanced):
            d_weight = self.adaptive_weight(without.nll, g_loss, last_layer)
        factor = self.factor(batches)
        return {
            "total_loss": without.loss + d_weight * factor * g_loss,
            **without.terms,
            "nll_loss": without.nll,
            "d_weight": d_weight,
            "disc_factor": images.new_tensor(factor),
            "g_loss": g_loss,
        }

    def adaptive_weight(self, nll: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
        """disc_weight times the ratio of the two gradients' norms at the last layer (arXiv 2012.09841, equation 7)."""
        of_nll, of_g = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll, g_loss))
        return (of_nll / (of_g + 1e-4)).clamp(0.0, GREATEST_WEIGHT).detach() * self.disc_weight

    def disc_terms(
        self, images: Tensor, reconstruction: Tensor, batches: int, cond: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss of the discriminator, `disc_loss`, and its mean logits; arguments as for `generator`."""
        real, fake = (
            self.discriminator(self.disc_input(x.contiguous().detach(), cond)).float()
            for x in (images, reconstruction.float())
        )
        return {
            "disc_loss": self.factor(batches) * self.disc_loss(real, fake),
            "logits_real": real.mean().detach(),
            "logits_fake": fake.mean().detach(),
        }

    def disc_input(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if (cond is not None) != self.disc_conditional:
            raise ValueError(f"disc_conditional is {self.disc_conditional}; a condition goes with True only, and must")
        return images if cond is None else torch.cat([images, cond], dim=1)

    def published(
        self,
        images: Tensor,
        reconstruction: Tensor,
        latent: Any,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
        split: str,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an optimizer (0: first stage, 1: discriminator), and what is logged, as published code has it."""
        if optimizer_idx == 0:
            terms = self.generator(images, reconstruction, latent, global_step, last_layer, cond, weights)
        else:
            terms = self.disc_terms(images, reconstruction, global_step, cond)
        loss = next(iter(terms.values()))
        return loss, {f"{split}/{name}": value.detach() for name, value in terms.items()}


def distance(given: str | Perceptual, weights: str | None) -> Perceptual | None:
    return perceptual(given, weights) if isinstance(given, str) else given
