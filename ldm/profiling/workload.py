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
from ldm.profiling.timing import CPU

SCALE = 7.5


@dataclass(frozen=True)
class Workload:
    """What is run: a guided DDIM run from random latents, under random conditions.

    params: of the `LatentDiffusion` config.
    network: with random weights.
    x: starting latents, (B, C, H, W).
    context: [unconditional | conditional] tokens, (2B, L, D); None for a network that takes none.
    y: the vectors of SDXL, (2B, D); None for a network that takes none.
    """

    params: Mapping[str, Any]
    network: DiffusionWrapper
    x: Tensor
    context: Tensor | None
    steps: int
    y: Tensor | None = None

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
        place = {"device": unet.time_embed[0].weight.device, "dtype": unet.dtype}

        def draw(*shape: int | None) -> Tensor | None:
            return None if None in shape else torch.randn(shape, generator=generator)

        x, context = draw(batch, unet.in_channels, *size), draw(2 * batch, tokens, unet.context_dim)
        y = draw(2 * batch, unet.adm_in_channels)
        context, y = (part if part is None else part.to(**place) for part in (context, y))
        return Workload(params, network, x.to(place["device"]), context, steps, y)

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
        cond = self.network.project(Conditioning(self.context, y=self.y))
        halves = (cond, cond.images(slice(len(self.x), None)))
        both, alone = (Conditional(self.network, half, parameterization) for half in halves)
        return Guided(both, Guidance(SCALE), alone)

    def run(self, plan: AnyPlan) -> Tensor:
        """The latents at the end."""
        rule = solver("ddim", self.abar.float(), self.steps, 0.0, lambda i, x: x)
        *_, state = denoise(self.denoiser, rule, plan, self.x)
        return state.x


def random_network(
    params: Mapping[str, Any], device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> DiffusionWrapper:
    """The network of a config, its weights drawn so that features keep their size.

    Raises:
        ValueError: it takes more than latents and tokens.
    """
    takes_tokens = params["unet_config"]["params"].get("context_dim") is not None
    key = params.get("conditioning_key") or ("crossattn" if takes_tokens else None)
    if key not in (None, "crossattn", "crossattn-adm"):
        raise ValueError(
            f"only networks that take latents, or latents and tokens, can be measured, with or without a vector; this "
            f"one's conditioning_key is {key}"
        )
    with torch.device("meta"):
        network = DiffusionWrapper(params["unet_config"], key)
    network = network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    return network
