"""The loss of the published KL first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, Reconstruction


class LPIPSWithDiscriminator(AdversarialLoss):
    """Likelihood of the image under a Laplace distribution, with a perceptual distance, KL and adversarial terms.

    The likelihood is summed over an image's elements and the KL term over its latent's, both averaged over the batch.

    Args:
        kl_weight: of the KL term.
        logvar_init: logarithm of the distribution's scale. A parameter in the published layout, but in no optimizer.
        rest: see `AdversarialLoss`.
    """

    def __init__(self, disc_start: int, kl_weight: float = 1.0, logvar_init: float = 0.0, **rest: Any):
        super().__init__(disc_start, **rest)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def reconstruction(
        self, error: Tensor, distance: Tensor, latent: DiagonalGaussianDistribution, weights: Tensor | None
    ) -> Reconstruction:
        rec = error.abs() + self.perceptual_weight * distance
        nll = rec / self.logvar.exp() + self.logvar
        weighted = nll if weights is None else weights * nll
        kl = latent.kl().mean()
        terms = {"kl_loss": kl, "rec_loss": rec.mean(), "logvar": self.logvar.detach()}
        return Reconstruction(nll.sum() / len(nll), weighted.sum() / len(nll) + self.kl_weight * kl, terms)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As published, see `AdversarialLoss.published`; `global_step` counts batches."""
        return self.published(
            inputs, reconstructions, posteriors, optimizer_idx, global_step, last_layer, cond, split, weights
        )
