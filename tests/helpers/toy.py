"""A split network small enough for thousands of runs, in float64 so that laws hold to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ldm.models.diffusion.ddim import DDIM
from ldm.models.diffusion.denoiser import Conditional, Conditioning, Denoiser, Guidance, Guided
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ddim_nodes, ddim_timesteps
from ldm.models.diffusion.solvers.registry import SOLVERS, solver
from ldm.modules.diffusionmodules.util import (
    Features,
    PartWeights,
    SharedPart,
    convolve_part,
    has_parts,
    make_beta_schedule,
)

EXACT = {"rtol": 0, "atol": 1e-9}
CHANNELS = 3
# The solvers for networks that predict no variance, as this one.
OF_NOISE = [name for name, chosen in SOLVERS.items() if not chosen.takes_variance]
ABAR = torch.from_numpy(make_beta_schedule("linear", 1000, 0.00085, 0.012)).neg().add(1).cumprod(0)


class ToyNetwork(nn.Module):
    """Two blocks on each side, nonlinear in all that they are given; the lists hold the batch size of every call.

    tome has no meaning here; like everything else it changes what comes out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.ModuleList(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.float64) for _ in "12")
        self.outward = nn.ModuleList(nn.Conv2d(2 * CHANNELS, CHANNELS, 3, padding=1, dtype=torch.float64) for _ in "12")
        self.encoded: list[int] = []
        self.refreshed: list[int] = []
        self.shared: list[int] = []
        self.decoded: list[int] = []

    def embed_time(self, t: Tensor) -> Tensor:
        return torch.stack([torch.sin(t.double() / 500), torch.cos(t.double() / 500)], dim=1)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        self.encoded.append(len(x))
        skips = self._outer(x, t, cond, 2, tome)
        return Features(torch.tanh(2 * skips[-1]), skips)

    def encode_outer(
        self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> tuple[Tensor, ...]:
        self.refreshed.append(len(x))
        return self._outer(x, t, cond, blocks, tome)

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        return features.with_outer(self.encode_outer(x, t, cond, blocks, tome))

    def project(self, cond: Conditioning) -> Conditioning:
        return cond

    def _outer(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> tuple[Tensor, ...]:
        skips = [x]
        for layer in self.inward[:blocks]:
            skips.append(torch.tanh(layer(skips[-1]) + shift(t, cond) + tome))
        return tuple(skips[1:])

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        nodes = len(t) // len(features)
        h = features.hidden.repeat(nodes, 1, 1, 1)
        for i in reversed(range(blocks, len(features.skips))):
            h = torch.sin(h + 2 * shift(t, cond) + tome)
            if features.shared:
                same = features.shared[i].conv.repeat(nodes, 1, 1, 1)
                h = torch.tanh(convolve_part(self.outward[1 - i], h, 0) + same)
            else:
                h = torch.tanh(self.outward[1 - i](torch.cat([h, features.skips[i]], dim=1)))
        return Features(h, features.skips[:blocks])

    def part_weights(self) -> tuple[PartWeights, ...]:
        return ()

    def share(self, features: Features, weights: Sequence[PartWeights]) -> Features:
        self.shared.append(len(features))
        if not all(map(has_parts, self.outward)):
            return features
        convs = [convolve_part(self.outward[1 - i], skip, CHANNELS) for i, skip in enumerate(features.skips)]
        return replace(features, shared=tuple(SharedPart(conv[:, :0], conv, conv[:, :0]) for conv in convs))

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        self.decoded.append(len(t))
        return self.advance(features, t, cond, 0, tome).hidden + shift(t, cond)


def shift(t: Tensor, cond: Conditioning) -> Tensor:
    return torch.sin(t.double() / 50).view(-1, 1, 1, 1) + cond.context.mean(1)[:, :, None, None]


def toy_network() -> ToyNetwork:
    torch.manual_seed(5)
    return ToyNetwork().requires_grad_(False)


def toy_inputs(batch: int) -> tuple[Tensor, Conditioning, Conditioning]:
    """Starting latents, conditioning and unconditional one; image b is the same for every batch size."""

    def draw(seed: int, *shape: int) -> Tensor:
        streams = (torch.Generator().manual_seed(1000 * seed + b) for b in range(batch))
        return torch.stack([torch.randn(shape, generator=g, dtype=torch.float64) for g in streams])

    return draw(1, CHANNELS, 4, 4), Conditioning(draw(2, 2, CHANNELS)), Conditioning(draw(3, 2, CHANNELS))


def toy_denoiser(
    network: ToyNetwork,
    cond: Conditioning,
    uncond: Conditioning,
    guidance: float | Guidance,
    parameterization: str = "eps",
    tome: float = 0.0,
) -> Denoiser:
    """Scale 1 leaves guidance out."""
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    conditional = Conditional(network, cond, parameterization, tome)
    if guidance.scale == 1:
        return conditional
    both = Conditional(network, Conditioning.cat(uncond, cond), parameterization, tome)
    return Guided(both, guidance, conditional)


def node_noise(i: int, x: Tensor) -> Tensor:
    """Noise that depends on the node and the image's place only."""
    g = torch.Generator().manual_seed(i)
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for _ in x])


def toy_rule(steps: int, eta: float = 0.0) -> DDIM:
    return DDIM(ddim_nodes(ABAR, ddim_timesteps(steps)), eta, node_noise)


def final(model, rule, plan, x, edits=()) -> Tensor:
    """The sample of a run."""
    *_, state = denoise(model, rule, plan, x, edits)
    return state.x


def any_rule(name: str, steps: int, eta: float = 0.0) -> Rule:
    return solver(name, ABAR, steps, eta if SOLVERS[name].takes_eta else 0.0, node_noise)


@st.composite
def plans(draw, num_nodes: int) -> Plan:
    keys = draw(st.sets(st.integers(1, num_nodes - 1))) if num_nodes > 1 else set()
    return Plan(num_nodes, (0, *sorted(keys)), draw(st.integers(1, num_nodes + 1)))
