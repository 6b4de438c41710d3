"""The denoising loop. There is no other in this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.edits import Edit, Moment
from ldm.models.diffusion.propagation.features import Propagation
from ldm.models.diffusion.propagation.plan import AnyPlan, Compute
from ldm.models.diffusion.propagation.predict import Cache, predict
from ldm.models.diffusion.schedule import Node


@dataclass(frozen=True, eq=False)
class State:
    """Where a run stands between two nodes.

    x:      the latents, (B, C, H, W).
    memory: what a rule keeps between nodes.
    x0:     the rule's estimate of the clean latents at the node just stepped, for previews; None at first.
    compute: what of the network ran for the node just stepped; None at first.
    """

    x: Tensor
    memory: tuple[Tensor, ...] = ()
    x0: Tensor | None = None
    compute: Compute | None = None


class Rule(Protocol):
    """A solver: its nodes, noisiest first, and a pure update from each to the next."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...

    def step(self, state: State, i: int, eps: Tensor) -> State:
        """The state after node i, whose predicted noise is eps, (B, C, H, W)."""


class NonFiniteLatents(ValueError):
    """The latents overflowed or became NaN; the message names the node and the layer."""


@torch.no_grad()
def denoise(model: Denoiser, rule: Rule, plan: AnyPlan, x: Tensor, edits: Sequence[Edit] = ()) -> Iterator[State]:
    """Run a solver from x, yielding the state after every node; the last one holds the sample.

    Args:
        model: predicts at every node, with as much of the network as the plan says.
        rule: the solver.
        plan: see `Plan`; every node a key node is the plain solver.
        x: starting latents, (B, C, H, W).
        edits: changes of the latents, those of one moment in the order given.

    At a decoder node the prediction depends on key nodes' features and its own t, never on a later latent:
    `plan.parallel` changes speed and memory, not the result.

    Raises:
        ValueError: the plan is for another number of nodes, or x is not finite; or a plan that goes by the latent
            meets several at once.
        NonFiniteLatents: the latents are not finite after some node.
    """
    nodes = rule.nodes
    _check(plan, nodes, x)
    state, cache = _edited(State(x), nodes[0], edits, "before"), Cache(Propagation.named(plan.propagate), x)

    def change(probe: str, i: int, key: int) -> float:
        """How far a probe has moved between a key node and node i, for plans that decide on the way."""
        before, now = (cache.key_x, state.x) if probe == "latent" else model.embed_time([nodes[key].t, nodes[i].t])
        return float((now - before).norm() / before.norm())

    for batch in plan.batches(change):
        ts = [nodes[i].t for i in batch.nodes]
        predictions, cache = predict(model, plan, batch.compute, state.x, ts, cache)
        for i, compute, prediction in zip(batch.nodes, batch.computes(), predictions, strict=True):
            state = _edited(state, nodes[i], edits, "after")
            eps = model.to_eps(prediction, state.x, nodes[i])
            state = _edited(replace(rule.step(state, i, eps), compute=compute), nodes[i], edits, "update")
            if not torch.isfinite(state.x).all():
                raise NonFiniteLatents(_diagnosis(model, cache.key_x, nodes, ts[0], i))
            yield state
            if i + 1 < len(nodes):
                state = _edited(state, nodes[i + 1], edits, "before")


def _check(plan: AnyPlan, nodes: Sequence[Node], x: Tensor) -> None:
    if plan.num_nodes != len(nodes):
        raise ValueError(f"the plan is for {plan.num_nodes} nodes, the solver has {len(nodes)}")
    if not torch.isfinite(x).all():
        raise ValueError("x, the starting latents, must be finite; they hold NaN or infinity")
    if plan.per_image and len(x) > 1:
        raise ValueError(f"a plan that goes by the latent is for one image at a time; got a batch of {len(x)}")


def _edited(state: State, node: Node, edits: Sequence[Edit], moment: Moment) -> State:
    x = state.x
    for edit in edits:
        if edit.when == moment:
            x = edit(x, node)
    return replace(state, x=x)


def _diagnosis(model: Denoiser, key_x: Tensor, nodes: Sequence[Node], key_t: float, i: int) -> str:
    layer = first_nonfinite_layer(model.network, lambda: model.decode([model.encode(key_x, key_t)], [nodes[i].t]))
    cause = f"first in layer {layer}" if layer else "though every layer's output is finite: the update overflowed"
    return f"latents are not finite after node {i} of {len(nodes)} (t = {nodes[i].t:g}), {cause}"


def first_nonfinite_layer(network: nn.Module, run: Callable[[], object]) -> str | None:
    """Call run() and name the first submodule of `network` whose output is not finite, None if all are."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
