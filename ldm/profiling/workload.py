"""A model's UNet with random weights, and runs of it that can be timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.denoiser import Conditional, Conditioning, Denoiser, Guidance, Guided
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.diffusionmodules.util import make_beta_schedule

SCALE = 7.5


@dataclass(frozen=True)
class Workload:
    """What is run: a guided DDIM run from random latents, under random conditions.

    params: of the `LatentDiffusion` config.
    network: with random weights.
    x: starting latents, (B, C, H, W).
    context: [unconditional | conditional] tokens, (2B, L, D); None for a network that takes none.
    """

    params: Mapping[str, Any]
    network: DiffusionWrapper
    x: Tensor
    context: Tensor | None
    steps: int

    @staticmethod
    def of(
        params: Mapping[str, Any],
        network: DiffusionWrapper,
        size: tuple[int, int],
        batch: int,
        tokens: int | None,
        steps: int,
    ) -> Workload:
        unet, generator = network.diffusion_model, torch.Generator().manual_seed(0)
        x = torch.randn(batch, unet.in_channels, *size, generator=generator)
        width = unet.context_dim
        context = None if width is None else torch.randn(2 * batch, tokens, width, generator=generator)
        return Workload(params, network, x, context, steps)

    @property
    def abar(self) -> Tensor:
        p = self.params
        betas = make_beta_schedule(
            p.get("beta_schedule", "linear"),
            p.get("timesteps", 1000),
            p.get("linear_start", 1e-4),
            p.get("linear_end", 2e-2),
        )
        return torch.from_numpy(1 - betas).cumprod(0)

    @property
    def denoiser(self) -> Denoiser:
        parameterization = self.params.get("parameterization", "eps")
        both = Conditional(self.network, self.network.project(Conditioning(self.context)), parameterization)
        return Guided(both, Guidance(SCALE))

    def run(self, plan: AnyPlan) -> Tensor:
        """The latents at the end."""
        rule = solver("ddim", self.abar.float(), self.steps, 0.0, lambda i, x: x)
        *_, state = denoise(self.denoiser, rule, plan, self.x)
        return state.x


def random_network(params: Mapping[str, Any]) -> DiffusionWrapper:
    """The network of a config, its weights drawn so that features keep their size.

    Raises:
        ValueError: it takes more than latents and tokens.
    """
    takes_tokens = params["unet_config"]["params"].get("context_dim") is not None
    key = params.get("conditioning_key") or ("crossattn" if takes_tokens else None)
    if key not in (None, "crossattn"):
        raise ValueError(
            f"only networks that take latents, or latents and tokens, can be measured; this one's "
            f"conditioning_key is {key}"
        )
    with torch.device("meta"):
        network = DiffusionWrapper(params["unet_config"], key)
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    return network
