"""The Gaussian posterior of the KL autoencoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """A Gaussian with diagonal covariance from `parameters` = [mean | log-variance] on the channels.

    Args:
        parameters: (B, 2C, ...); the log-variance is clamped to [-30, 20].
        deterministic: variance 0, as for a plain autoencoder.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = self.std.square()

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise, with standard normal noise of the mean's shape unless given."""
        return self.mean + self.std * (torch.randn_like(self.mean) if noise is None else noise)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence to `other` (default: the standard normal), summed per sample: (B,), in nats."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        if other is None:
            terms = self.mean.square() + self.var - 1.0 - self.logvar
        else:
            terms = (
                (self.mean - other.mean).square() / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
            )
        return 0.5 * terms.flatten(1).sum(1)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood of `sample`, summed per sample: (B,), in nats."""
        if self.deterministic:
            return self.mean.new_zeros(len(self.mean))
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return 0.5 * terms.flatten(1).sum(1)
