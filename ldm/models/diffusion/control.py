"""What stands between a run and a model's network: control networks, attention between frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.util import Features, PartWeights


@dataclass(frozen=True, eq=False)
class Control:
    """One control network with the control images of a batch.

    read:    what it made of them, see `ControlNet.read`; (B, C, h, w).
    weights: of each of its residuals, first to last; the middle's is the last.
    """

    network: ControlNet
    read: Tensor
    weights: Sequence[float]

    @staticmethod
    def of(network: ControlNet, hint: Tensor, weights: float | Sequence[float] = 1.0) -> Control:
        """From the control images, (B, 3, H, W) in [0, 1]; one weight is that of all residuals.

        Raises:
            ValueError: see `ControlNet.read`; or not as many weights as residuals.
        """
        weights = [weights] * network.residuals if isinstance(weights, float | int) else weights
        if len(weights) != network.residuals:
            raise ValueError(f"weights must be {network.residuals}, one of each residual; got {len(weights)}")
        return Control(network, network.read(hint), weights)


class WrappedNetwork(nn.Module):
    """A `ConditionedNetwork` that is another one in all that a subclass does not change."""

    def __init__(self, network: ConditionedNetwork) -> None:
        super().__init__()
        self.inner = network

    def project(self, cond: Conditioning) -> Conditioning:
        return self.inner.project(cond)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.inner.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return self.inner.encode(x, t, cond, tome)

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        return self.inner.refresh(features, x, t, cond, blocks, tome)

    def part_weights(self) -> Sequence[PartWeights]:
        return self.inner.part_weights()

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        return self.inner.share(features, weights)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.inner.advance(features, t, cond, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self.inner.decode(features, t, cond, tome)


class CrossFrame(WrappedNetwork):
    """A network for videos: all frames attend to the first one in self-attention.

    Args:
        frames: of each video; a batch is whole videos, one after the other.

    Source: Text2Video-Zero (arXiv 2303.13439).
    """

    def __init__(self, network: ConditionedNetwork, frames: int) -> None:
        super().__init__(network)
        self.frames = frames

    def project(self, cond: Conditioning) -> Conditioning:
        projected = super().project(cond)
        return replace(projected, context=replace(projected.context, frames=self.frames))


class Controlled(WrappedNetwork):
    """A `ConditionedNetwork` to whose encoder control networks add what they make of their control images.

    They are a part of the encoder: they run where it runs, as far as it runs, and what they add is held with its
    features, as in the release of Faster Diffusion (arXiv 2312.09608). With a plan of which `Plan.control` is true they
    run anew at the nodes between.

    Args:
        network: whose encoder is helped; merging of tokens is for it alone.
        controls: their residuals are added up.
        guess: the unconditional half of a guided batch goes without control, as in the guess mode of the release.
        anew: for a plan of which `Plan.control` is true: keep the encoder's features without what is added to them.

    A batch may be the control images' own, or twice that: [unconditional | conditional].

    Source: Zhang et al. (arXiv 2302.05543).
    """

    def __init__(
        self, network: ConditionedNetwork, controls: Sequence[Control], guess: bool = False, anew: bool = False
    ) -> None:
        super().__init__(network)
        self.networks = nn.ModuleList(control.network for control in controls)
        self.controls, self.guess, self.anew = tuple(controls), guess, anew

    def project(self, cond: Conditioning) -> Conditioning:
        projected = super().project(cond)
        if cond.context is None:
            return projected
        keys_values = dict(projected.context.keys_values)
        for network in self.networks:
            keys_values |= network.project(cond.context).keys_values
        return replace(projected, context=replace(projected.context, keys_values=keys_values))

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        alone = self.inner.encode(x, t, cond, tome)
        features = alone.plus(self._residuals(x, t, cond))
        return replace(features, alone=alone) if self.anew else features

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        """The outermost `blocks` skips anew with what is added to them; with `anew`, that of all, see `Controlled`."""
        if features.alone is not None:
            alone = self.inner.refresh(features.alone, x, t, cond, blocks, tome) if blocks else features.alone
            return alone.plus(self._residuals(x, t, cond))
        outer = self.inner.refresh(features, x, t, cond, blocks, tome)
        added = zip(outer.skips, self._residuals(x, t, cond, blocks), strict=False)
        return outer.with_outer([skip + more for skip, more in added])

    def _residuals(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int | None = None) -> list[Tensor]:
        """What is added to the outputs of the first `blocks` input blocks; None = of all, and of the middle."""
        images = len(self.controls[0].read)
        if self.guess and len(x) == 2 * images:
            half = slice(images, None)
            added = self._residuals(x[half], t[half], cond.images(half), blocks)
            return [torch.cat([torch.zeros_like(more), more]) for more in added]
        sums: list[Tensor] = []
        for control in self.controls:
            read = control.read.repeat(len(x) // images, 1, 1, 1)
            added = control.network.encode(x, read, t, cond.context, blocks)
            scaled = [more * weight for more, weight in zip(added, control.weights, strict=False)]
            sums = [a + b for a, b in zip(sums, scaled, strict=True)] if sums else scaled
        return sums
