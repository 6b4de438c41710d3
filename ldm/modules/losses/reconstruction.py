"""Reconstruction loss of a small KL autoencoder, without a perceptual network or a discriminator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class ReconstructionLoss(nn.Module):
    """L1 + squared error + L1 of the image gradients + a little KL.

    The gradient term keeps outlines sharp, which flat artwork lives by; the KL term (nats per latent
    element) keeps the latents smooth enough to diffuse.

    Args:
        gradient_weight, kl_weight: shares of the two terms beside L1 and squared error, which count 1.
    """

    def __init__(self, gradient_weight: float = 1.0, kl_weight: float = 1e-3):
        super().__init__()
        self.gradient_weight, self.kl_weight = gradient_weight, kl_weight

    def forward(
        self, image: Tensor, reconstruction: Tensor, posterior: DiagonalGaussianDistribution
    ) -> dict[str, Tensor]:
        """Images and reconstructions (B, C, H, W) in [-1, 1] -> scalars: `loss` and its parts."""
        difference = reconstruction - image
        gradient = sum(d.abs().mean() for d in (difference.diff(dim=-1), difference.diff(dim=-2)))
        parts = {
            "l1": difference.abs().mean(),
            "mse": F.mse_loss(reconstruction, image),
            "gradient": gradient,
            "kl": posterior.kl().sum() / posterior.mean.numel(),
        }
        loss = parts["l1"] + parts["mse"] + self.gradient_weight * parts["gradient"] + self.kl_weight * parts["kl"]
        return {"loss": loss, **parts}
