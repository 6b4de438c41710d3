"""The discriminator of the first stages: a PatchGAN (arXiv 1611.07004), as taming-transformers trains it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn


class ActNorm(nn.Module):
    """A scale and a shift for each channel: set by the first training batch to make it normal, then learned.

    Source: Glow (arXiv 1807.03039), section 3.1.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        x = of_all_processes(x)  # else each would have a scale of its own from then on
        self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
        self.scale.copy_(1.0 / (x.std((0, 2, 3), keepdim=True) + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if self.training and not self.initialized:
            self.initialize(x.float())
        return self.scale * (x + self.loc)


def of_all_processes(x: Tensor) -> Tensor:
    """The batches (B, ...) of all processes that train together as one."""
    if not distributed.is_available() or not distributed.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class NLayerDiscriminator(nn.Module):
    """Images -> a logit for each patch: positive for real ones.

    Args:
        input_nc: channels of the images, and of the condition that is joined to them.
        ndf: channels of the first layer; each layer has twice those of the one before, up to 8 * ndf.
        n_layers: layers that halve the resolution; with 3 a patch has 70 x 70 pixels.
        use_actnorm: normalise by `ActNorm`; otherwise by BatchNorm.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3, use_actnorm: bool = False):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            before, width = width, ndf * min(2**n, 8)
            layers += [
                nn.Conv2d(before, width, 4, stride=2 if n < n_layers else 1, padding=1, bias=use_actnorm),
                ActNorm(width) if use_actnorm else nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.apply(initialize)

    def forward(self, x: Tensor) -> Tensor:
        """(B, input_nc, H, W) in [-1, 1] -> logits (B, 1, H', W')."""
        return self.main(x)


def initialize(layer: nn.Module) -> None:
    """Weights of kernels from N(0, 0.02), of BatchNorm from N(1, 0.02), as published."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)
        nn.init.zeros_(layer.bias)


def hinge_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator for its logits of real and generated images: a scalar (arXiv 1705.02894)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_d_loss(real: Tensor, fake: Tensor) -> Tensor:
    """As `hinge_d_loss`, by cross-entropy (arXiv 1406.2661)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
