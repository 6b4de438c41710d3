"""What is predicted at the nodes of a batch, with as much of the network as the plan says, and what that leaves.

`History` keeps what was computed at earlier nodes and forecasts later values from it; `Cache` is all that a run keeps;
`predict` is what the loop calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import FROM_EPS, TO_EPS, Denoiser, Past, Prediction, on_noise
from ldm.models.diffusion.propagation.plan import METHODS, AnyPlan, Batch, Compute, Forecast, Method, Span
from ldm.models.diffusion.schedule import Node, log_snr
from ldm.modules.attention import AttentionOutputs
from ldm.modules.diffusionmodules.util import Features, weighted_sum


def _times(axis: str, nodes: Sequence[Node]) -> tuple[tuple[float, ...], Span]:
    """The time of every node, and where the run begins and ends."""
    if axis == "step":
        return tuple(map(float, range(len(nodes)))), (0.0, float(len(nodes)))
    if axis == "timestep":
        times = tuple(node.t for node in nodes)
    else:
        times = tuple(log_snr(node.abar) if node.abar > 0 else -float("inf") for node in nodes)
    if not all(map(isfinite, times)):
        raise ValueError("the log-SNR of this run's first or last node is infinite; the axis must be timestep or step")
    return times, (times[0], times[-1])


@dataclass(frozen=True)
class Forecaster:
    """A method on the nodes of one run; times: of every node; span: where the run begins and ends."""

    method: Method
    times: tuple[float, ...]
    span: Span

    @staticmethod
    def of(forecast: Forecast, nodes: Sequence[Node]) -> Forecaster:
        """For a run of these nodes.

        Raises:
            ValueError: the log-SNR of a node is not finite.
        """
        return Forecaster(METHODS[forecast.name], *_times(forecast.axis, nodes))

    def distinct(self, keys: Sequence[int]) -> list[int]:
        """The last of these nodes at each time: a solver that comes back to a time replaces its value."""
        last: dict[float, int] = {}
        for key in keys:
            last.pop(self.times[key], None)
            last[self.times[key]] = key
        return [*last.values()]

    def weights(self, keys: Sequence[int], i: int) -> list[float]:
        """The weights of the values at these nodes in the value at node i; at the time of the last, that value."""
        if self.times[i] == self.times[keys[-1]]:
            return [0.0] * (len(keys) - 1) + [1.0]
        return self.method.weigh([self.times[k] for k in keys], self.times[i], self.span)


class Sized(Protocol):
    def __len__(self) -> int: ...


class Tensors(Protocol):
    @property
    def tensors(self) -> tuple[Tensor, ...]: ...


T = TypeVar("T", bound=Sized)


def relative_error(guess: Tensors | Tensor, value: Tensors | Tensor) -> float:
    """|guess - value| / |value|; of several the root mean square over their tensors."""
    pairs = [(guess, value)] if isinstance(value, Tensor) else zip(guess.tensors, value.tensors, strict=True)
    squares = [_sum_of_squares(a - b) / max(_sum_of_squares(b), 1e-30) for a, b in pairs]
    return sqrt(sum(squares) / len(squares))


def _sum_of_squares(x: Tensor) -> float:
    """In single precision at least: half precision ends at 65504."""
    return float(x.to(torch.promote_types(x.dtype, torch.float32)).square().sum())


@dataclass(frozen=True, eq=False)
class History(Generic[T]):
    """What was computed at the last nodes, and what is forecast from it.

    combine: (values, weights) -> their weighted sum.
    keys:    number and value of the nodes that are kept, oldest first.

    Memory: as many values as the method takes, see `Method.keep`.
    """

    forecaster: Forecaster
    combine: Callable[[Sequence[T], Sequence[float]], T]
    keys: tuple[tuple[int, T], ...] = ()

    def key(self, i: int, value: T) -> History[T]:
        """After one more node that computed its value."""
        # Guidance that begins or ends changes the batch: values before that have nothing to say of those after.
        # Solvers that come back to a time replace its value.
        times = self.forecaster.times
        kept = [old for old in self.keys if len(old[1]) == len(value) and times[old[0]] != times[i]]
        return replace(self, keys=(*kept, (i, value))[-self.forecaster.method.keep :])

    @property
    def last(self) -> T:
        return self.keys[-1][1]

    @property
    def holds(self) -> bool:
        """Whether every forecast is the last value."""
        return self.forecaster.method is METHODS["hold"]

    def at(self, i: int) -> T:
        """The value at node i: where one was computed last, exactly that."""
        numbers = [k for k, _ in self.keys]
        if self.holds or self.forecaster.times[i] == self.forecaster.times[numbers[-1]]:
            return self.last
        weights = self.forecaster.weights(numbers, i)
        return self.last if weights == [1.0] else self.combine([value for _, value in self.keys], weights)

    def with_last(self, value: T) -> History[T]:
        """With another form of the last value."""
        return replace(self, keys=(*self.keys[:-1], (self.keys[-1][0], value)))


@dataclass(frozen=True, eq=False)
class Cache:
    """What a run keeps from the nodes before.

    features: the encoder's, of key nodes (encoder propagation, Faster Diffusion, arXiv 2312.09608).
    inner:    where the decoder stood before its outermost blocks, of key and decoder nodes (DeepCache,
        arXiv 2312.00858).
    outputs:  predictions of key nodes, in the quantity that is forecast; to be held, of all nodes where some of the
        network ran. Predictions that are themselves made of forecasts would spoil an extrapolation: they are too close
        to each other for their errors.
    attention: what cross-attention gave at key nodes, if the plan has gated nodes (T-GATE, arXiv 2404.02747).
    quantity: one of TO_EPS, or '' = as the network predicts; None = nothing is forecast, and no prediction kept.
    key_x:    the latents of the last key node, (B, C, H, W).
    last:     the prediction of the node before, for guidance that is used again.
    """

    features: History[Features]
    inner: History[Features]
    outputs: History[Tensor]
    attention: History[AttentionOutputs]
    quantity: str | None
    key_x: Tensor
    last: Prediction | Past | None = None

    @staticmethod
    def before(plan: AnyPlan, nodes: Sequence[Node], x: Tensor) -> Cache:
        """What a run from x begins with; levels that the plan does not forecast keep no more than one value.

        Raises:
            ValueError: the forecaster's axis is not finite on these nodes.
        """
        forecast = Forecast.parse(plan.propagate)
        forecaster, hold = Forecaster.of(forecast, nodes), Forecaster.of(Forecast(), nodes)
        of = {level: forecaster if level in plan.levels else hold for level in Compute}
        return Cache(
            History(of[Compute.DECODER], Features.combine),
            History(of[Compute.SHALLOW], Features.combine),
            History(of[Compute.SKIPPED], weighted_sum),
            History(of[Compute.GATED], AttentionOutputs.combine),
            forecast.quantity if Compute.SKIPPED in plan.levels else None,
            x,
        )

    def at_key(self, i: int, features: Features, x: Tensor) -> Cache:
        """At one more key node, with the encoder's features of the latents x."""
        began = self.features.keys and len(features) != len(self.features.last)  # guidance has begun or ended
        cache = replace(self, outputs=replace(self.outputs, keys=())) if began else self
        last = None if self.last is None else Past(self.last)
        return replace(cache, features=self.features.key(i, features), key_x=x, last=last)

    def eps(
        self, model: Denoiser, prediction: Prediction | None, compute: Compute, x: Tensor, i: int, node: Node
    ) -> tuple[Tensor, Cache]:
        """The noise in x, (B, C, H, W), at node i, and what the nodes after it need.

        prediction: None = nothing of the network ran; it is forecast.
        """
        if prediction is None:
            value = self.outputs.at(i)
            to_eps = TO_EPS.get(self.quantity)
            eps = on_noise(to_eps, value, x, node.abar) if to_eps else model.to_eps(Prediction(value), x, node)
            return eps, self
        eps = model.to_eps(prediction, x, node)
        if self.quantity is None or not (compute is Compute.FULL or self.outputs.holds):
            return eps, self
        from_eps = FROM_EPS.get(self.quantity)
        value = on_noise(from_eps, eps, x, node.abar) if from_eps else prediction.out
        return eps, replace(self, outputs=self.outputs.key(i, value))


def forecast_error(plan: AnyPlan, before: Cache, after: Cache, i: int) -> float:
    """The largest relative error, over the levels that the plan forecasts, of the forecasts at key node i.

    Args:
        before, after: what the run kept before that node, and with its values.

    0 where guidance begins or ends at the node: the values before have nothing to say of those there.
    """
    if len(before.features.last) != len(after.features.last):
        return 0.0
    levels = {
        Compute.DECODER: (before.features, after.features),
        Compute.SHALLOW: (before.inner, after.inner),
        Compute.SKIPPED: (before.outputs, after.outputs),
        Compute.GATED: (before.attention, after.attention),
    }
    return max(relative_error(past.at(i), now.last) for level, (past, now) in levels.items() if level in plan.levels)


def predict(
    model: Denoiser, plan: AnyPlan, batch: Batch, x: Tensor, ts: Sequence[float], cache: Cache
) -> tuple[list[Prediction | None], Cache]:
    """The predictions at the nodes of one batch, None where they are to be forecast, and what the nodes after it need.

    Args:
        x: the latents at the first node, (B, C, H, W); no other node's are needed.
        ts: the nodes' timesteps, noisiest first.
    """
    if batch.compute is Compute.SKIPPED:
        return [None] * len(ts), cache
    i = batch.nodes.start
    if batch.compute is Compute.GATED:
        gated = model.gated(cache.attention.at(i))
        return gated.decode([gated.encode(x, ts[0])], ts), cache
    if record := batch.compute is Compute.FULL and Compute.GATED in plan.levels:
        model = model.recording(kept := {})
    if batch.compute is Compute.FULL:  # a key node: the encoder runs
        cache = cache.at_key(i, model.encode(x, ts[0]), x)
    if batch.compute is Compute.SHALLOW:
        features = [model.refresh(cache.inner.at(i), x, ts[0], plan.branch)]
    else:
        features, cache = _decoder_features(model, plan, batch, x, ts, cache)
    predictions = model.decode(features, ts, cache.last)
    if record:
        cache = replace(cache, attention=cache.attention.key(i, AttentionOutputs(kept)))
    return predictions, replace(cache, last=predictions[-1])


def _decoder_features(
    model: Denoiser, plan: AnyPlan, batch: Batch, x: Tensor, ts: Sequence[float], cache: Cache
) -> tuple[list[Features], Cache]:
    """What the decoders of a batch take: the key node's features, or what is forecast from several."""
    if _shares(plan, cache) and (batch.compute is Compute.DECODER or len(ts) > 1) and not cache.features.last.shared:
        cache = replace(cache, features=cache.features.with_last(model.share(cache.features.last)))
    features = [cache.features.at(i) for i in batch.nodes]
    if plan.waits and batch.compute is Compute.DECODER:
        features = [model.refresh(features[0], x, ts[0], plan.refresh)]
    if plan.branch:
        features = model.advance(features, ts, plan.branch)
        inner = cache.inner
        for i, at in zip(batch.nodes, features, strict=True):
            inner = inner.key(i, at.without_skips())
        cache = replace(cache, inner=inner)
    return features, cache


def _shares(plan: AnyPlan, cache: Cache) -> bool:
    """Whether the decoders of a group take the same features."""
    return cache.features.holds and not (plan.waits or plan.branch)
