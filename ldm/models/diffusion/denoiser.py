"""What the denoising loop asks of a model, for a network with conditioning and for guidance.

A denoiser encodes at a key node and decodes one or more nodes from those features. It has never heard of
plans, solvers or edits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.models.diffusion.schedule import Node
from ldm.modules.diffusionmodules.features import Features


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is conditioned on; a part that the model does not use is None.

    context: tokens for cross-attention, (B, L, D).
    concat:  image-like input beside the latent, (B, C', H, W).
    y:       class label (B,) or embedding (B, D) added to the time embedding.
    """

    context: Tensor | None = None
    concat: Tensor | None = None
    y: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """The parts that are given, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    def tile(self, n: int) -> Conditioning:
        """Repeat for n decoder steps, step-major: (B, ...) -> (n*B, ...)."""
        if n == 1:
            return self
        return Conditioning(**{name: p.repeat(n, *[1] * (p.ndim - 1)) for name, p in self.parts().items()})

    @staticmethod
    def cat(first: Conditioning, second: Conditioning) -> Conditioning:
        """Join two batches, for example [uncond | cond].

        Raises:
            ValueError: one has a part that the other lacks, or a part differs in more than its batch size.
        """
        one, two = first.parts(), second.parts()
        if one.keys() != two.keys():
            raise ValueError(f"conditionings to join must have the same parts; got {[*one]} and {[*two]}")
        for name in one:
            if one[name].shape[1:] != two[name].shape[1:]:
                raise ValueError(
                    f"conditionings to join differ in {name}: "
                    f"{tuple(one[name].shape)} and {tuple(two[name].shape)}"
                )
        return Conditioning(**{name: torch.cat([one[name], two[name]]) for name in one})


class Denoiser(Protocol):
    """What the denoising loop needs of a model, for a batch of B latents."""

    @property
    def network(self) -> nn.Module:
        """The module behind the predictions; the loop only uses it to name a layer in an error."""

    def encode(self, x: Tensor, t: float) -> Features:
        """Features of x, (B, C, H, W), at training timestep t."""

    def decode(self, features: Features, ts: Sequence[float]) -> Sequence[Tensor]:
        """The network's raw prediction at each timestep, each (B, C, H, W), computed as one batch."""

    def to_eps(self, out: Tensor, x: Tensor, node: Node) -> Tensor:
        """The noise in x, (B, C, H, W), that the raw prediction `out` at `node` stands for."""


class ConditionedNetwork(Protocol):
    """A split network with its conditioning: `DiffusionWrapper` is one. t: (B,)."""

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning) -> Features: ...

    def decode(self, features: Features, t: Tensor, cond: Conditioning) -> Tensor: ...


def eps_from_eps(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return out


def eps_from_x0(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return (x - sqrt(abar) * out) / sqrt(1 - abar)


def eps_from_v(out: Tensor, x: Tensor, abar: float) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 (progressive distillation, arXiv 2202.00512, appendix D)."""
    return sqrt(abar) * out + sqrt(1 - abar) * x


TO_EPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "eps": eps_from_eps,
    "x0": eps_from_x0,
    "v": eps_from_v,
}


class Conditional:
    """A network with its conditioning.

    Args:
        network: offers encode(x, t, cond) and decode(features, t, cond), t: (B,).
        cond: conditioning of the whole batch.
        parameterization: what the network predicts: 'eps', 'x0' or 'v'.

    Raises:
        ValueError: unknown parameterization, or (in encode) cond is for another batch size than x.
    """

    def __init__(
        self, network: ConditionedNetwork, cond: Conditioning, parameterization: str = "eps"
    ) -> None:
        if parameterization not in TO_EPS:
            raise ValueError(f"parameterization must be one of {', '.join(TO_EPS)}; got {parameterization!r}")
        self.network = network
        self.cond = cond
        self._to_eps = TO_EPS[parameterization]

    def encode(self, x: Tensor, t: float) -> Features:
        for name, part in self.cond.parts().items():
            if len(part) != len(x):
                raise ValueError(
                    f"conditioning {name} is for a batch of {len(part)}, the latents are {len(x)}"
                )
        return self.network.encode(x, torch.full((len(x),), t, device=x.device), self.cond)

    def decode(self, features: Features, ts: Sequence[float]) -> Sequence[Tensor]:
        n, batch = len(ts), len(features.hidden)
        t = torch.tensor(ts, device=features.hidden.device).repeat_interleave(batch)  # (n*B,), step-major
        return self.network.decode(features.tile(n), t, self.cond.tile(n)).chunk(n)  # n of (B, C, H, W)

    def to_eps(self, out: Tensor, x: Tensor, node: Node) -> Tensor:
        return self._to_eps(out, x, node.abar)


class Guided:
    """Classifier-free guidance: uncond + scale * (cond - uncond), on the raw prediction.

    Args:
        denoiser: predicts for the batch [uncond | cond], 2B; this class is a denoiser for B latents.
        scale: guidance scale; 1 is the conditional prediction alone, at twice the cost.

    Source: Ho and Salimans (arXiv 2207.12598), in the convention of latent diffusion.
    """

    def __init__(self, denoiser: Denoiser, scale: float) -> None:
        self.denoiser = denoiser
        self.scale = scale

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    def encode(self, x: Tensor, t: float) -> Features:
        return self.denoiser.encode(torch.cat([x, x]), t)

    def decode(self, features: Features, ts: Sequence[float]) -> Sequence[Tensor]:
        return [self._guide(*out.chunk(2)) for out in self.denoiser.decode(features, ts)]

    def _guide(self, uncond: Tensor, cond: Tensor) -> Tensor:
        return uncond + self.scale * (cond - uncond)

    def to_eps(self, out: Tensor, x: Tensor, node: Node) -> Tensor:
        return self.denoiser.to_eps(out, x, node)
