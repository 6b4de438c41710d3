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

from ldm.models.diffusion.propagation.plan import Work
from ldm.models.diffusion.schedule import Node
from ldm.modules.context import Context, ProjectedContext
from ldm.modules.diffusionmodules.features import Features


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is conditioned on; a part that the model does not use is None.

    context: tokens for cross-attention, (B, L, D); or what a network has made of them for all steps.
    concat:  image-like input beside the latent, (B, C', H, W).
    y:       class label (B,) or embedding (B, D) added to the time embedding.
    """

    context: Context | None = None
    concat: Tensor | None = None
    y: Tensor | None = None

    def parts(self) -> dict[str, Context]:
        """The parts that are given, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def batch(self) -> int | None:
        """How many images it is for; None = any number."""
        return next((len(part) for part in self.parts().values()), None)

    def tile(self, n: int) -> Conditioning:
        """Repeat for n decoder steps, step-major: (B, ...) -> (n*B, ...)."""
        if n == 1:
            return self
        return Conditioning(
            **{
                name: p.tile(n) if isinstance(p, ProjectedContext) else p.repeat(n, *[1] * (p.ndim - 1))
                for name, p in self.parts().items()
            }
        )

    def images(self, which: slice) -> Conditioning:
        """Of some images of the batch."""
        return Conditioning(
            **{
                name: p.images(which) if isinstance(p, ProjectedContext) else p[which]
                for name, p in self.parts().items()
            }
        )

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
                    f"conditionings to join differ in {name}: {tuple(one[name].shape)} and {tuple(two[name].shape)}"
                )
        return Conditioning(**{name: torch.cat([one[name], two[name]]) for name in one})


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a denoiser predicts at one node.

    out:    raw, (B, C, H, W).
    offset: conditional minus unconditional prediction, like out, where guidance is to use it again; else None.
    """

    out: Tensor
    offset: Tensor | None = None


class Denoiser(Protocol):
    """What the denoising loop needs of a model, for a batch of B latents.

    Features of a node have the batch that `encode` gave them, which may be larger than B.
    """

    @property
    def network(self) -> nn.Module:
        """The module behind the predictions; the loop only uses it to name a layer in an error."""

    def embed_time(self, ts: Sequence[float]) -> Tensor:
        """What the network makes of each of n timesteps, (n, D)."""

    def encode(self, x: Tensor, t: float) -> Features:
        """Features of x, (B, C, H, W), at training timestep t."""

    def refresh(self, features: Features, x: Tensor, t: float, blocks: int) -> Features:
        """Features of one node with the outermost `blocks` skips made anew, of x at timestep t."""

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        """The features of each of n nodes, decoded at its timestep until `blocks` blocks remain."""

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None = None
    ) -> list[Prediction]:
        """The prediction at each of n timesteps, from the features of each, computed as one batch.

        last: the prediction of the node before, if it is of the same key node.
        """

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        """The noise in x, (B, C, H, W), that the prediction at `node` stands for."""


class ConditionedNetwork(Protocol):
    """A split network with its conditioning: `DiffusionWrapper` is one. t: (B,); tome: see `UNetModel.encode`."""

    def embed_time(self, t: Tensor) -> Tensor: ...

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> Features: ...

    def encode_outer(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Sequence[Tensor]: ...

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Features: ...

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float) -> Tensor: ...


def eps_from_eps(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return out


def eps_from_x0(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return (x - sqrt(abar) * out) / sqrt(1 - abar)


def eps_from_v(out: Tensor, x: Tensor, abar: float) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 (progressive distillation, arXiv 2202.00512, appendix D)."""
    return sqrt(abar) * out + sqrt(1 - abar) * x


TO_EPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"eps": eps_from_eps, "x0": eps_from_x0, "v": eps_from_v}


class Conditional:
    """A network with its conditioning.

    Args:
        network: what predicts.
        cond: conditioning of the whole batch.
        parameterization: what the network predicts: 'eps', 'x0' or 'v'.
        tome: share of tokens that the network merges for self-attention.

    Raises:
        ValueError: unknown parameterization, or (in encode) cond is for another batch size than x.
    """

    def __init__(
        self, network: ConditionedNetwork, cond: Conditioning, parameterization: str = "eps", tome: float = 0.0
    ) -> None:
        if parameterization not in TO_EPS:
            raise ValueError(f"parameterization must be one of {', '.join(TO_EPS)}; got {parameterization!r}")
        self.network = network
        self.cond = cond
        self.tome = tome
        self._to_eps = TO_EPS[parameterization]

    @property
    def batch(self) -> int | None:
        """How many latents the conditioning is for; None = any number."""
        return self.cond.batch

    def embed_time(self, ts: Sequence[float]) -> Tensor:
        device = next((p.device for p in self.network.parameters()), None)
        return self.network.embed_time(torch.tensor(ts, device=device))

    def encode(self, x: Tensor, t: float) -> Features:
        self._check(x)
        return self.network.encode(x, self._times(x, [t]), self.cond, self.tome)

    def refresh(self, features: Features, x: Tensor, t: float, blocks: int) -> Features:
        self._check(x)
        return features.with_outer(self.network.encode_outer(x, self._times(x, [t]), self.cond, blocks, self.tome))

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        joined = Features.cat(features)  # n*B
        t = self._times(joined.hidden, ts)
        return self.network.advance(joined, t, self.cond.tile(len(ts)), blocks, self.tome).chunk(len(ts))

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None = None
    ) -> list[Prediction]:
        joined = Features.cat(features)  # n*B
        t = self._times(joined.hidden, ts)
        out = self.network.decode(joined, t, self.cond.tile(len(ts)), self.tome)  # (n*B, C, H, W)
        return [Prediction(part) for part in out.chunk(len(ts))]

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self._to_eps(prediction.out, x, node.abar)

    def _times(self, like: Tensor, ts: Sequence[float]) -> Tensor:
        """A timestep for each of a batch of len(ts) nodes, (n*B,), step-major."""
        return torch.tensor(ts, device=like.device).repeat_interleave(len(like) // len(ts))

    def _check(self, x: Tensor) -> None:
        for name, part in self.cond.parts().items():
            if len(part) != len(x):
                raise ValueError(f"conditioning {name} is for a batch of {len(part)}, the latents are {len(x)}")


@dataclass(frozen=True)
class Guidance:
    """How classifier-free guidance is applied.

    scale:    guidance scale; 1 is the conditional prediction alone.
    interval: training timesteps (low, high) between which there is guidance, both included; a key node decides for
        the nodes that use its features (Kynkaanniemi et al., arXiv 2404.07724).
    reuse:    compute the unconditional prediction at key nodes only; the nodes that follow add the key node's
        (scale - 1) * (conditional - unconditional) to their conditional prediction.
    """

    scale: float
    interval: tuple[float, float] | None = None
    reuse: bool = False

    def __post_init__(self) -> None:
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"the guidance interval must be low,high; got {self.interval[0]:g},{self.interval[1]:g}")

    def at(self, key_t: float) -> bool:
        """Whether nodes that use the features of a key node at this timestep are guided."""
        return self.interval is None or self.interval[0] <= key_t <= self.interval[1]

    def images(self, works: Sequence[Work], ts: Sequence[float]) -> list[int]:
        """How many predictions, 1 or 2, each node of a run makes for one image; ts are the nodes' timesteps."""
        counts, guided = [], False
        for work, t in zip(works, ts, strict=True):
            guided = self.scale != 1 and self.at(t) if work is Work.FULL else guided
            counts.append(2 if guided and (work is Work.FULL or not self.reuse) else 1)
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

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        self._check_no_reuse()
        denoiser = self.conditional if self._unguided(features[0]) else self.both
        return denoiser.advance(features, ts, blocks)

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None = None
    ) -> list[Prediction]:
        if self._unguided(features[0]):
            return self.conditional.decode(features, ts)
        if not self.guidance.reuse:
            return [self._guide(*p.out.chunk(2)) for p in self.both.decode(features, ts)]
        predictions = []
        if last is None:
            predictions = [self._guide(*p.out.chunk(2)) for p in self.both.decode(features[:1], ts[:1])]
            last, features, ts = predictions[0], features[1:], ts[1:]
        if ts:
            push = (self.guidance.scale - 1) * last.offset
            conditional = [f.images(slice(len(f) // 2, None)) for f in features]
            predictions += [Prediction(p.out + push, last.offset) for p in self.conditional.decode(conditional, ts)]
        return predictions

    def _guide(self, uncond: Tensor, cond: Tensor) -> Prediction:
        offset = cond - uncond
        return Prediction(uncond + self.guidance.scale * offset, offset if self.guidance.reuse else None)

    def _unguided(self, features: Features) -> bool:
        return self.conditional is not None and len(features) == self.conditional.batch

    def _check_no_reuse(self) -> None:
        if self.guidance.reuse:
            raise ValueError(
                "reuse of the guidance offset needs decoder nodes only; the plan has shallow or refreshed nodes"
            )

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self.both.to_eps(prediction, x, node)


class Wrapper:
    """A denoiser that is another one in all that a subclass does not change."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.inner = denoiser

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    def embed_time(self, ts: Sequence[float]) -> Tensor:
        return self.inner.embed_time(ts)

    def encode(self, x: Tensor, t: float) -> Features:
        return self.inner.encode(x, t)

    def refresh(self, features: Features, x: Tensor, t: float, blocks: int) -> Features:
        return self.inner.refresh(features, x, t, blocks)

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        return self.inner.advance(features, ts, blocks)

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | None = None
    ) -> list[Prediction]:
        return self.inner.decode(features, ts, last)

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self.inner.to_eps(prediction, x, node)
