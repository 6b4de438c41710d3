"""Encoder propagation (Faster Diffusion, arXiv 2312.09608): what is predicted at the nodes of a batch, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser, Prediction
from ldm.models.diffusion.propagation.features import Propagation
from ldm.models.diffusion.propagation.plan import AnyPlan, Compute
from ldm.modules.diffusionmodules.features import Features


@dataclass(frozen=True, eq=False)
class Cache:
    """What a run keeps from the nodes before.

    features: the encoder's, of the last key nodes.
    key_x:    the latents of the last key node, (B, C, H, W).
    inner:    where the decoder stood before its outermost blocks, for shallow nodes (DeepCache).
    last:     the prediction of the node before, for nodes that compute nothing and for guidance that is used again.
    """

    features: Propagation
    key_x: Tensor
    inner: Features | None = None
    last: Prediction | None = None


def predict(
    model: Denoiser, plan: AnyPlan, compute: Compute, x: Tensor, ts: Sequence[float], cache: Cache
) -> tuple[list[Prediction], Cache]:
    """The predictions at the nodes of one batch, and what the nodes after it need.

    Args:
        compute: how much of the network runs at the first of the nodes; at the others the decoder runs.
        x: the latents at the first node, (B, C, H, W); no other node's are needed.
        ts: the nodes' timesteps, noisiest first.
    """
    if compute is Compute.FULL:  # a key node: the encoder runs
        cache = Cache(cache.features.key(ts[0], model.encode(x, ts[0])), x)
    if compute is Compute.SHALLOW and not plan.branch:
        return [cache.last], cache
    if compute is Compute.SHALLOW:
        features = [model.refresh(cache.inner, x, ts[0], plan.branch)]
    else:  # the decoders take the key node's features, or what is extrapolated from several
        held = plan.propagate == "hold" and not (plan.refresh or plan.branch)
        if held and (compute is Compute.DECODER or len(ts) > 1):
            cache = replace(cache, features=cache.features.shared(model.share))
        features = [cache.features.at(t) for t in ts]
        if plan.refresh and compute is Compute.DECODER:
            features = [model.refresh(features[0], x, ts[0], plan.refresh)]
        if plan.branch:
            features = model.advance(features, ts, plan.branch)
            cache = replace(cache, inner=features[-1].without_skips())
    predictions = model.decode(features, ts, cache.last)
    return predictions, replace(cache, last=predictions[-1])
