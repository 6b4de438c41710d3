"""The forward process: how a clean tensor becomes noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], (B,), shaped to multiply x, (B, ...)."""
    return values[t].view(-1, *[1] * (x.ndim - 1))


class ForwardProcess(nn.Module):
    """Gaussian noising in steps of variance beta, its levels as float32 buffers under their published names.

    Args:
        betas: (T,), float64, each in 0..1.

    Source: DDPM (arXiv 2006.11239), section 2.
    """

    def __init__(self, betas: np.ndarray):
        super().__init__()
        self.num_timesteps = len(betas)
        abar = np.cumprod(1.0 - betas)
        for name, values in {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": np.append(1.0, abar[:-1]),
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1),
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        return self.betas.device

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; t: (B,) integers, x_start: (B, ...)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            at(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )
