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


def gaussian_divergence(mean: Tensor, logvar: Tensor, other_mean: Tensor, other_logvar: Tensor) -> Tensor:
    """KL divergence of each element of a Gaussian to another, in nats; all arguments broadcast together."""
    difference = (mean - other_mean).square() * torch.exp(-other_logvar)
    return 0.5 * (other_logvar - logvar - 1.0 + torch.exp(logvar - other_logvar) + difference)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of each element of 8-bit images in [-1, 1] under a Gaussian that is rounded to their levels.

    The normal distribution function is approximated as in the published code. Source: DDPM (arXiv 2006.11239), eq. 13.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inverse = torch.exp(-log_std)
    above, below = (cdf(inverse * (x - mean + side / 255.0)) for side in (1, -1))
    inside = torch.where(x > 0.999, 1.0 - below, torch.where(x < -0.999, above, above - below))
    return inside.clamp(min=1e-12).log()
