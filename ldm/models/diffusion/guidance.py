"""Classifier-free guidance: where and how strongly; the denoiser that applies it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import Conditional, Past, Prediction
from ldm.models.diffusion.propagation.plan import METHODS, POLYNOMIALS, Compute, lagrange
from ldm.models.diffusion.schedule import Node
from ldm.modules.diffusionmodules.features import Features, weighted_sum

Offsets = tuple[tuple[float, Tensor], ...]


def offset_at(offsets: Offsets, t: float) -> Tensor:
    """The polynomial through all of these, at timestep t."""
    if len(offsets) == 1:
        return offsets[0][1]
    times = [key_t for key_t, _ in offsets]
    return weighted_sum([offset for _, offset in offsets], lagrange(times, t, (times[0], t)))


@dataclass(frozen=True)
class Guidance:
    """How classifier-free guidance is applied.

    scale:    guidance scale; 1 is the conditional prediction alone.
    interval: training timesteps (low, high) between which there is guidance, both included; a key node decides for
        the nodes that use its features (Kynkaanniemi et al., arXiv 2404.07724).
    reuse:    compute the unconditional prediction at key nodes only; the nodes that follow add (scale - 1) *
        (conditional - unconditional) to their conditional prediction: True = the key node's, or, by one of POLYNOMIALS,
        the polynomial in the timestep through that of the last key nodes.
    channels: how many of the prediction's channels are guided, the first ones; the others, such as a variance, are
        those of the conditional prediction. None = all.
    """

    scale: float
    interval: tuple[float, float] | None = None
    reuse: bool | str = False
    channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reuse, bool) and self.reuse not in POLYNOMIALS:
            raise ValueError(f"a guidance offset can be used again by {', '.join(POLYNOMIALS)}; got {self.reuse!r}")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"the guidance interval must be low,high; got {self.interval[0]:g},{self.interval[1]:g}")

    def kept(self, offsets: Offsets, t: float, offset: Tensor) -> Offsets:
        """The offsets that are kept after that of one more key node."""
        count = METHODS["hold" if self.reuse is True else self.reuse].keep
        return (*(old for old in offsets if old[0] != t), (t, offset))[-count:]

    def guided(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """The prediction that guidance makes of two, each (B, C, H, W)."""
        if self.channels is None or self.channels >= cond.shape[1]:
            return uncond + self.scale * (cond - uncond)
        uncond, rest = uncond[:, : self.channels], cond[:, self.channels :]
        return torch.cat([uncond + self.scale * (cond[:, : self.channels] - uncond), rest], dim=1)

    def offset(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """What guidance adds to the conditional prediction, for each unit of scale above 1; (B, C, H, W)."""
        offset = cond - uncond
        if self.channels is not None:
            offset[:, self.channels :] = 0
        return offset

    def at(self, key_t: float) -> bool:
        """Whether nodes that use the features of a key node at this timestep are guided."""
        return self.interval is None or self.interval[0] <= key_t <= self.interval[1]

    def images(self, computes: Sequence[Compute], ts: Sequence[float]) -> list[int]:
        """How many predictions, 1 or 2, each node of a run makes for one image; ts are the nodes' timesteps."""
        counts, guided = [], False
        for compute, t in zip(computes, ts, strict=True):
            guided = self.scale != 1 and self.at(t) if compute is Compute.FULL else guided
            counts.append(2 if guided and (compute is Compute.FULL or not self.reuse) else 1)
        return counts


class Guided:
    """Classifier-free guidance: uncond + scale * (cond - uncond), on the raw prediction.

    Args:
        both: predicts for the batch [uncond | cond], 2B; this class is a denoiser for B latents.
        conditional: predicts for cond alone, B; needed where guidance is not computed at every node.
        guidance: how.

    Raises:
        ValueError: `guidance` needs the conditional denoiser, or (in refresh and advance) its offset would be used
            again at nodes that run more than the decoder.

    Source: Ho and Salimans (arXiv 2207.12598), in the convention of latent diffusion.
    """

    def __init__(self, both: Conditional, guidance: Guidance, conditional: Conditional | None = None) -> None:
        if conditional is None and (guidance.interval or guidance.reuse):
            raise ValueError("conditional must be given for guidance with an interval or with reuse; got None")
        self.both, self.conditional, self.guidance = both, conditional, guidance

    @property
    def network(self) -> nn.Module:
        return self.both.network

    def embed_time(self, ts: Sequence[float]) -> Tensor:
        return self.both.embed_time(ts)

    def encode(self, x: Tensor, t: float) -> Features:
        return self.both.encode(torch.cat([x, x]), t) if self.guidance.at(t) else self.conditional.encode(x, t)

    def refresh(self, features: Features, x: Tensor, t: float, blocks: int) -> Features:
        self._check_no_reuse()
        if self._unguided(features):
            return self.conditional.refresh(features, x, t, blocks)
        return self.both.refresh(features, torch.cat([x, x]), t, blocks)

    def share(self, features: Features) -> Features:
        return self.both.share(features)

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        self._check_no_reuse()
        denoiser = self.conditional if self._unguided(features[0]) else self.both
        return denoiser.advance(features, ts, blocks)

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        if self._unguided(features[0]):
            return self.conditional.decode(features, ts)
        if not self.guidance.reuse:
            return [Prediction(self.guidance.guided(*p.out.chunk(2))) for p in self.both.decode(features, ts)]
        before = last.prediction if isinstance(last, Past) else last
        predictions, offsets = [], before.offsets if before else ()
        if last is None or isinstance(last, Past):  # the first is a key node
            uncond, cond = self.both.decode(features[:1], ts[:1])[0].out.chunk(2)
            offsets = self.guidance.kept(offsets, ts[0], self.guidance.offset(uncond, cond))
            predictions, features, ts = [Prediction(self.guidance.guided(uncond, cond), offsets)], features[1:], ts[1:]
        if ts:
            halves = {f: f.images(slice(len(f) // 2, None)) for f in dict.fromkeys(features)}
            alone = self.conditional.decode([halves[f] for f in features], ts)
            predictions += [
                Prediction(p.out + (self.guidance.scale - 1) * offset_at(offsets, t), offsets)
                for p, t in zip(alone, ts, strict=True)
            ]
        return predictions

    def _unguided(self, features: Features) -> bool:
        return self.conditional is not None and len(features) == self.conditional.batch

    def _check_no_reuse(self) -> None:
        if self.guidance.reuse:
            raise ValueError(
                "reuse of the guidance offset needs decoder nodes only; the plan has shallow or refreshed nodes"
            )

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self.both.to_eps(prediction, x, node)
