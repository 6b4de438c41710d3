"""What the denoising loop asks of a model, that for a network with its conditioning, and classifier-free guidance.

A denoiser encodes at a key node and decodes one or more nodes from those features. It has never heard of plans,
solvers or edits. Guidance wraps a denoiser and is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from math import sqrt
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ldm.models.diffusion.propagation.plan import METHODS, POLYNOMIALS, Compute, lagrange
from ldm.models.diffusion.schedule import Node, predict_x0
from ldm.modules.attention import AttentionOutputs, Context, ProjectedContext
from ldm.modules.attention_control import AttentionControl
from ldm.modules.diffusionmodules.util import Features, PartWeights, weighted_sum

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a denoiser predicts at one node.

    out:     raw, (B, C, H, W).
    offsets: where guidance is to use them again: timestep of the last key nodes, and conditional minus unconditional
        prediction there, like out; oldest first.
    """

    out: Tensor
    offsets: tuple[tuple[float, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Past:
    """At a key node, the prediction of the node before, which is of an earlier key node's group."""

    prediction: Prediction


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
        """Features of one node with the outermost `blocks` skips made anew, of x at timestep t, and what is added to
        them at every node."""

    def share(self, features: Features) -> Features:
        """The features with what the decoders of several nodes have in common, computed once; they predict the same."""

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        """The features of each of n nodes, decoded at its timestep until `blocks` blocks remain."""

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        """The prediction at each of n timesteps, from the features of each, computed as one batch.

        last: the prediction of the node before; None or `Past` if the first node is a key node.
        """

    def recording(self, outputs: dict[nn.Module, Tensor]) -> Denoiser:
        """The same denoiser; its layers of cross-attention put there what they give, for one node."""

    def gated(self, outputs: AttentionOutputs) -> Denoiser:
        """The denoiser for nodes whose layers of cross-attention give these outputs; it predicts without guidance."""

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        """The noise in x, (B, C, H, W), that the prediction at `node` stands for.

        For a solver that takes it, with the predicted variance behind it, (B, 2 C, H, W).
        """


# What a network predicts, as noise


def eps_from_eps(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return out


def eps_from_x0(out: Tensor, x: Tensor, abar: float) -> Tensor:
    return (x - sqrt(abar) * out) / sqrt(1 - abar)


def eps_from_v(out: Tensor, x: Tensor, abar: float) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 (progressive distillation, arXiv 2202.00512, appendix D)."""
    return sqrt(abar) * out + sqrt(1 - abar) * x


def v_from_eps(eps: Tensor, x: Tensor, abar: float) -> Tensor:
    return (eps - sqrt(1 - abar) * x) / sqrt(abar)


TO_EPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"eps": eps_from_eps, "x0": eps_from_x0, "v": eps_from_v}
# The inverse of each: what a network of that parameterization would predict.
FROM_EPS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "eps": eps_from_eps,
    "x0": lambda eps, x, abar: predict_x0(x, eps, abar),
    "v": v_from_eps,
}


def on_noise(convert: Callable[[Tensor, Tensor, float], Tensor], out: Tensor, x: Tensor, abar: float) -> Tensor:
    """One of the above, where there may be a predicted variance in channels behind those of x: it stays as it is."""
    channels = x.shape[1]
    if out.shape[1] == channels:
        return convert(out, x, abar)
    return torch.cat([convert(out[:, :channels], x, abar), out[:, channels:]], dim=1)


# A network with what it is conditioned on


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

    def controlled(self, control: AttentionControl | None) -> Conditioning:
        """With a control of the attention to its context, which is projected; None = as it is."""
        return self if control is None else replace(self, context=replace(self.context, control=control))

    def at(self, ts: Sequence[float]) -> Conditioning:
        """For one step at each of these timesteps, step-major: (B, ...) -> (n*B, ...); see `ProjectedContext.at`."""
        tiled = self.tile(len(ts))
        return replace(tiled, context=self.context.at(ts)) if isinstance(self.context, ProjectedContext) else tiled

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
        """The conditioning of some images of the batch."""
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


class ConditionedNetwork(Protocol):
    """A split network with its conditioning: `DiffusionWrapper` is one. t: (B,); tome: see `UNetModel.encode`."""

    def project(self, cond: Conditioning) -> Conditioning: ...

    def embed_time(self, t: Tensor) -> Tensor: ...

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> Features: ...

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float
    ) -> Features: ...

    def part_weights(self) -> Sequence[PartWeights]: ...

    def share(self, features: Features, weights: Sequence[PartWeights] | None) -> Features: ...

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Features: ...

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float) -> Tensor: ...


class Conditional:
    """A network with its conditioning.

    Args:
        network: what predicts.
        cond: conditioning of the whole batch.
        parameterization: what the network predicts: 'eps', 'x0' or 'v'.
        tome: share of tokens that the network merges for self-attention.
        variance: `to_eps` gives the variance that the network predicts too, in channels behind the noise.

    Raises:
        ValueError: unknown parameterization, or (in encode) cond is for another batch size than x.
    """

    def __init__(
        self,
        network: ConditionedNetwork,
        cond: Conditioning,
        parameterization: str = "eps",
        tome: float = 0.0,
        variance: bool = False,
    ) -> None:
        if parameterization not in TO_EPS:
            raise ValueError(f"parameterization must be one of {', '.join(TO_EPS)}; got {parameterization!r}")
        self.network = network
        self.cond = cond
        self.tome = tome
        self.variance = variance
        self._to_eps = TO_EPS[parameterization]
        self._part_weights: Sequence[PartWeights] | None = None

    @property
    def batch(self) -> int | None:
        """How many latents the conditioning is for; None = any number."""
        return self.cond.batch

    def embed_time(self, ts: Sequence[float]) -> Tensor:
        device = next((p.device for p in self.network.parameters()), None)
        return self.network.embed_time(torch.tensor(ts, device=device))

    def encode(self, x: Tensor, t: float) -> Features:
        self._check(x)
        return self.network.encode(x, self._times(x, [t]), self.cond.at([t]), self.tome)

    def refresh(self, features: Features, x: Tensor, t: float, blocks: int) -> Features:
        self._check(x)
        return self.network.refresh(features, x, self._times(x, [t]), self.cond.at([t]), blocks, self.tome)

    def share(self, features: Features) -> Features:
        if self._part_weights is None:  # once for a run
            self._part_weights = self.network.part_weights()
        return self.network.share(features, self._part_weights)

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        joined = Features.cat(features)  # n*B
        t = self._times(features[0].hidden, ts)
        return self.network.advance(joined, t, self.cond.at(ts), blocks, self.tome).chunk(len(ts))

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        t = self._times(features[0].hidden, ts)
        out = self.network.decode(Features.for_nodes(features), t, self.cond.at(ts), self.tome)  # (n*B, C, H, W)
        return [Prediction(part) for part in out.chunk(len(ts))]

    def recording(self, outputs: dict[nn.Module, Tensor]) -> Conditional:
        return self._attending(record=outputs)

    def gated(self, outputs: AttentionOutputs) -> Conditional:
        return self._attending(outputs=outputs.of_images(self.batch))

    def _attending(self, **changes: Any) -> Conditional:
        """With changes of the projected context. Raises ValueError: there is no cross-attention."""
        if not isinstance(self.cond.context, ProjectedContext):
            raise ValueError("outputs of cross-attention can be kept of networks that have it; this one has none")
        other = copy(self)
        other.cond = replace(self.cond, context=replace(self.cond.context, **changes))
        return other

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        out = prediction.out if self.variance else prediction.out[:, : x.shape[1]]
        return on_noise(self._to_eps, out, x, node.abar)

    def _times(self, like: Tensor, ts: Sequence[float]) -> Tensor:
        """The timesteps of n nodes, each for as many images as `like` has, (n*B,), step-major."""
        return torch.tensor(ts, device=like.device).repeat_interleave(len(like))

    def _check(self, x: Tensor) -> None:
        for name, part in self.cond.parts().items():
            if len(part) != len(x):
                raise ValueError(f"conditioning {name} is for a batch of {len(part)}, the latents are {len(x)}")


# Denoisers around another


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

    def share(self, features: Features) -> Features:
        return self.inner.share(features)

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        return self.inner.advance(features, ts, blocks)

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        return self.inner.decode(features, ts, last)

    def recording(self, outputs: dict[nn.Module, Tensor]) -> Denoiser:
        return self._around(self.inner.recording(outputs))

    def gated(self, outputs: AttentionOutputs) -> Denoiser:
        return self._around(self.inner.gated(outputs))

    def _around(self, denoiser: Denoiser) -> Denoiser:
        other = copy(self)
        other.inner = denoiser
        return other

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self.inner.to_eps(prediction, x, node)


class Thresholded(Wrapper):
    """The noise that is left when the clean image of every prediction is thresholded.

    Args:
        denoiser: the prediction.
        most: see `thresholded`.
    """

    def __init__(self, denoiser: Denoiser, most: float) -> None:
        super().__init__(denoiser)
        self.most = most

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        def limited(eps: Tensor, x: Tensor, abar: float) -> Tensor:
            return eps_from_x0(thresholded(predict_x0(x, eps, abar), self.most), x, abar)

        return on_noise(limited, self.inner.to_eps(prediction, x, node), x, node.abar)


def thresholded(x0: Tensor, most: float, share: float = 0.95) -> Tensor:
    """Clean images (B, ...) with their largest values scaled down, each by its own measure.

    s, the quantile of |x0| at `share`, is clamped to 1..most; x0 <- clamp(x0, -s, s) / s.

    Source: dynamic thresholding, Imagen (arXiv 2205.11487), section 2.3, with the upper limit of DeepFloyd-IF.
    """
    s = x0.flatten(1).abs().float().quantile(share, dim=1).clamp(1.0, most).to(x0.dtype)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


class BatchBackoff(Wrapper):
    """A denoiser that decodes in smaller batches when the device runs out of memory; the results stay the same.

    Args:
        denoiser: decodes.
        most: nodes in one batch; None = as many as it is given. Halved at every failure, and kept after it.

    Raises:
        torch.OutOfMemoryError: (in decode and advance) a single node is too much; or encode or refresh fails, which
            have no batch to halve.
    """

    def __init__(self, denoiser: Denoiser, most: int | None = None) -> None:
        super().__init__(denoiser)
        self.most = most

    def share(self, features: Features) -> Features:
        try:
            return super().share(features)
        except torch.OutOfMemoryError:
            return features  # sharing saves time only

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        return self._in_parts(len(ts), lambda part, _: self.inner.advance(features[part], ts[part], blocks))

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        return self._in_parts(
            len(ts), lambda part, done: self.inner.decode(features[part], ts[part], done[-1] if done else last)
        )

    def _in_parts(self, n: int, call: Callable[[slice, list[T]], list[T]]) -> list[T]:
        """call(part, results so far) for 0..n-1 in parts, in order."""
        done: list[T] = []
        while len(done) < n:
            part = slice(len(done), min(len(done) + (self.most or n), n))
            try:
                done += call(part, done)
            except torch.OutOfMemoryError:
                if part.stop - part.start == 1:
                    raise
                # The next attempt comes after this block, when nothing holds the failed one's tensors any more.
                self.most = (part.stop - part.start + 1) // 2
        return done


# Classifier-free guidance


Offsets = tuple[tuple[float, Tensor], ...]


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
            twice = compute is Compute.FULL or not (self.reuse or compute is Compute.GATED)
            counts.append(2 if guided and twice else 1)
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

    def recording(self, outputs: dict[nn.Module, Tensor]) -> Guided:
        alone = self.conditional and self.conditional.recording(outputs)
        return Guided(self.both.recording(outputs), self.guidance, alone)

    def gated(self, outputs: AttentionOutputs) -> Conditional:
        """The conditional prediction alone."""
        if self.conditional is None:
            raise ValueError("conditional must be given for nodes without cross-attention; got None")
        return self.conditional.gated(outputs)

    def to_eps(self, prediction: Prediction, x: Tensor, node: Node) -> Tensor:
        return self.both.to_eps(prediction, x, node)


def offset_at(offsets: Offsets, t: float) -> Tensor:
    """The polynomial through all of these, at timestep t."""
    if len(offsets) == 1:
        return offsets[0][1]
    times = [key_t for key_t, _ in offsets]
    return weighted_sum([offset for _, offset in offsets], lagrange(times, t, (times[0], t)))
