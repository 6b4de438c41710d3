"""The denoising loop, the only one here, and its edits: changes of the latents beside the solver's own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.propagation.plan import AnyPlan, Compute
from ldm.models.diffusion.propagation.predict import Cache, forecast_error, predict
from ldm.models.diffusion.schedule import Node, diffuse


@dataclass(frozen=True, eq=False)
class State:
    """Where a run stands between two nodes.

    x:      the latents, (B, C, H, W).
    memory: what a rule keeps between nodes.
    x0:     the rule's estimate of the clean latents at the node just stepped, for previews; None at first.
    compute: which part of the network ran for the node just stepped; None at first.
    node: its number; -1 at first. A run that measures its forecasts may come back to a node.
    error: the largest relative error of a forecast that this run has let pass so far; None if it measures none.
    """

    x: Tensor
    memory: tuple[Tensor, ...] = ()
    x0: Tensor | None = None
    compute: Compute | None = None
    node: int = -1
    error: float | None = None


class Rule(Protocol):
    """A solver: its nodes, noisiest first, and a pure update from each to the next."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...

    def step(self, state: State, i: int, eps: Tensor) -> State:
        """The state after node i, whose predicted noise is eps, (B, C, H, W)."""


class NonFiniteLatents(ValueError):
    """The latents overflowed or became NaN; the message names the node and the layer."""


@torch.no_grad()
def denoise(
    model: Denoiser,
    rule: Rule,
    plan: AnyPlan,
    x: Tensor,
    edits: Sequence[Edit] = (),
    agreed: Callable[[float], float] = float,
) -> Iterator[State]:
    """Run a solver from x, yielding the state after every node; the last one holds the sample.

    A plan that measures its forecasts yields the states of nodes that it redoes as well.

    Args:
        model: predicts at every node, with as much of the network as the plan says.
        rule: the solver.
        plan: see `Plan`; every node a key node is the plain solver.
        x: starting latents, (B, C, H, W).
        edits: changes of the latents, those of one moment in the order given.
        agreed: makes of each change that a plan decides by what it decides by, see `first_process`.

    At a decoder node the prediction depends on key nodes' features and its own t, never on a later latent:
    `plan.parallel` changes speed and memory, not the result. At a skipped node it depends on predictions before.

    Raises:
        ValueError: the plan is for another number of nodes, or x is not finite; a plan that goes by the latent meets
            several at once; or the plan's forecaster can't be used on these nodes.
        NonFiniteLatents: the latents are not finite after some node.
    """
    nodes, trail = rule.nodes, _Trail()
    _check(plan, nodes, x)
    state, cache = _edited(State(x), nodes[0], edits, "before"), Cache.before(plan, nodes, x)

    def change(probe: str, i: int, key: int) -> float:
        """How far a probe has moved between a key node and node i, for plans that decide on the way."""
        if probe == "forecast":
            return agreed(trail.errors[i])
        before, now = (cache.key_x, state.x) if probe == "latent" else model.embed_time([nodes[key].t, nodes[i].t])
        return agreed(float((now - before).norm() / before.norm()))

    for batch in plan.batches(change):
        if batch.nodes.start <= state.node:
            state, cache = trail.back(batch.nodes.start)
        ts, before = [nodes[i].t for i in batch.nodes], cache
        predictions, cache = predict(model, plan, batch, state.x, ts, cache)
        for i, compute, prediction in zip(batch.nodes, batch.computes(), predictions, strict=True):
            state = _edited(state, nodes[i], edits, "after")
            eps, cache = cache.eps(model, prediction, compute, state.x, i, nodes[i])
            if plan.measures and compute is Compute.FULL:
                trail.measure(plan, before, cache, i)
            error = trail.error if plan.measures else None
            state = replace(rule.step(state, i, eps), compute=compute, node=i, error=error)
            state = _edited(state, nodes[i], edits, "update")
            if not torch.isfinite(state.x).all():
                raise NonFiniteLatents(_diagnosis(model, cache.key_x, nodes, ts[0], i))
            yield state
            if i + 1 < len(nodes):
                state = _edited(state, nodes[i + 1], edits, "before")
        if plan.measures and batch.compute is Compute.FULL:
            trail.marks = [*trail.marks, (state, cache)][-2:]  # it never goes back further


class _Trail:
    """Where a run that measures its forecasts can go back to, and the errors at its key nodes.

    marks:  the state after each of the last two key nodes, and what the nodes after it need.
    errors: of the forecasts that reached a key node, by its number.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[State, Cache]] = []
        self.errors: dict[int, float] = {}

    @property
    def error(self) -> float:
        return max(self.errors.values(), default=0.0)

    def measure(self, plan: AnyPlan, before: Cache, after: Cache, i: int) -> None:
        if before.features.keys and before.features.keys[-1][0] < i - 1:
            self.errors[i] = forecast_error(plan, before, after, i)

    def back(self, i: int) -> tuple[State, Cache]:
        """Where the run stood before node i, which follows a key node; what came after it is forgotten."""
        self.marks = [mark for mark in self.marks if mark[0].node < i]
        self.errors = {key: error for key, error in self.errors.items() if key < i}
        return self.marks[-1]


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


# Edits


Moment = Literal["before", "after", "update"]


@dataclass(frozen=True)
class Edit:
    """A change of the latents at one moment of every node.

    apply: (x, node) -> latents of the same shape, (B, C, H, W); never changes x in place.
    when:  'before': when the node begins, so that a key node's encoder sees the change;
           'after': after the prediction, just before the solver's step;
           'update': after the solver's step; `node` is the node just stepped.
    """

    apply: Callable[[Tensor, Node], Tensor]
    when: Moment = "before"

    def __post_init__(self) -> None:
        if self.when not in get_args(Moment):
            raise ValueError(f"when must be one of {', '.join(get_args(Moment))}; got {self.when!r}")

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        return self.apply(x, node)


def prior_noise(x_T: Tensor, weight: float = 0.003, below: float = 500, when: Moment = "before") -> Edit:
    """Add a little of the starting noise back late in sampling.

    x <- x + weight * x_T   for nodes with t < below

    Args:
        x_T: the latent that sampling began from, (B, C, H, W), unit variance.
        weight: share of x_T per node, dimensionless; 0 = off.
        below: training timestep, 0..T-1; half of T = 1000 as published.
        when: published orders: 'before' the prediction (serial release), 'after' it (parallel and ControlNet
            releases), 'update' (the latent-diffusion fork, with below=150).

    Raises:
        ValueError: weight is negative, or (when called) x and x_T differ in shape.

    Source: Faster Diffusion (arXiv 2312.09608), prior noise injection.
    """
    if weight < 0:
        raise ValueError(f"noise weight must be 0 or more; got {weight}")

    def inject(x: Tensor, node: Node) -> Tensor:
        if x.shape != x_T.shape:
            raise ValueError(f"x_T {tuple(x_T.shape)} and the latents {tuple(x.shape)} must have the same shape")
        return x + weight * x_T if node.t < below else x

    return Edit(inject, when)


def inpainting(x0: Tensor, mask: Tensor, noise: Callable[[Tensor, Node], Tensor]) -> Edit:
    """Keep a region: before every prediction it is replaced by x0 at the node's noise level.

    x <- mask * diffuse(x0) + (1 - mask) * x

    There is no replacement after the last step, as published.

    Args:
        x0: clean latent to keep, (B, C, H, W).
        mask: 1 keeps x0, 0 is painted anew; (B, 1, H, W) or anything that broadcasts to x0.
        noise: (x, node) -> unit normal noise like x.
    """

    def keep(x: Tensor, node: Node) -> Tensor:
        return mask * diffuse(x0, noise(x, node), node.abar) + (1 - mask) * x

    return Edit(keep, "before")
