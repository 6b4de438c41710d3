"""Which part of the network runs at which node, how many decoders share a batch, and what stands in for the rest.

First the plans, then the forecasters: what stands in for a value at a node that does not compute it, made of those at
the nodes before. A forecaster is a row of weights over past values. It is written NAME[:AXIS][:QUANTITY], as in
quadratic:logsnr:eps: the method, what it takes for time, and, for whole predictions, the quantity that is forecast.

Neither knows a solver or a tensor: `predict` sums values with these weights. How plans are named and read: `load`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations, pairwise
from math import comb, factorial
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from pydantic import AfterValidator

from ldm.io.errors import did_you_mean, shown


class Compute(Enum):
    """How much of the network runs at a node."""

    FULL = "full"  # all of it: a key node
    DECODER = "decoder"  # the decoder, on the encoder's features of earlier key nodes
    SHALLOW = "shallow"  # the outermost blocks of both, on the inner decoder's output of earlier nodes
    SKIPPED = "skipped"  # nothing; the prediction is made of those of earlier nodes
    GATED = "gated"  # all but cross-attention, whose outputs are those of earlier key nodes; without guidance


# What runs at nodes that are no key nodes, and how the rest is forecast unless it is given: as published, or what did
# best in our measurements (docs/benchmark.md).
LEVELS = {"encoder": Compute.DECODER, "deepcache": Compute.SHALLOW, "skip": Compute.SKIPPED, "tgate": Compute.GATED}
USUAL = {"encoder": "hold", "deepcache": "hold", "skip": "quadratic:logsnr:eps", "tgate": "hold"}
USUAL_WITH_NOISE = USUAL | {"skip": "linear:timestep:x0"}  # in runs whose solver adds noise at every step
MEASURED = ("encoder", "deepcache", "skip")  # levels whose errors a calibration measures


@dataclass(frozen=True)
class Batch:
    """Nodes that are predicted together. Of a FULL batch the first is a key node, the others are decoded with it."""

    nodes: range
    compute: Compute

    def computes(self) -> Iterator[Compute]:
        """What runs at each node."""
        for i in self.nodes:
            yield Compute.DECODER if self.compute is Compute.FULL and i > self.nodes.start else self.compute


@dataclass(frozen=True)
class Plan:
    """Which parts of the network run at the nodes 0..num_nodes-1 of one run, and what stands in for the others.

    keys:      nodes where the encoder runs; node 0 must be one.
    parallel:  most decoder steps in one batch; 1 = same result, least memory.
    shallow:   nodes where only the outermost `branch` blocks of encoder and decoder run (DeepCache,
        arXiv 2312.00858).
    branch:    input blocks that run at a shallow node, and as many output blocks.
    skipped:   nodes where nothing runs. At the nodes of no other kind the whole decoder runs (Faster Diffusion,
        arXiv 2312.09608).
    gated:     nodes where all runs but cross-attention, for one prediction without guidance (T-GATE, arXiv 2404.02747).
    propagate: how what does not run is forecast from what ran before, see `Forecast`: at decoder nodes the encoder's
        features, at shallow ones the inner decoder's, at skipped ones the prediction, at gated ones the outputs of
        cross-attention. 'hold' = those of the last node that computed them (the papers); 'zeros' = no features (table
        14 of the first, to show that they are needed).
    refresh:   input blocks that run anew at every decoder node, for the outermost skips; their decoders wait for the
        latent before them, so none share a batch. 0 = the paper.
    sizes:     how many decoder steps a batch may have beside 1, see `with_few_sizes`; () = any number up to `parallel`.
    control:   control networks run at every decoder node too, on the latent before it, so none share a batch; without
        it what they add is held with the features, as released.
    """

    num_nodes: int
    keys: tuple[int, ...]
    parallel: int = 1
    shallow: tuple[int, ...] = ()
    branch: int = 0
    propagate: str = "hold"
    refresh: int = 0
    sizes: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    control: bool = False
    gated: tuple[int, ...] = ()
    per_image: ClassVar[bool] = False
    measures: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_nodes()
        self._check_batches()

    def _check_nodes(self) -> None:
        if not self.keys or self.keys[0] != 0:
            raise ValueError(f"keys must start with node 0, which has no earlier features; got {self.keys}")
        kinds = {"keys": self.keys, "shallow": self.shallow, "skipped": self.skipped, "gated": self.gated}
        for name, nodes in kinds.items():
            if any(b <= a for a, b in pairwise(nodes)):
                raise ValueError(f"{name} must increase strictly; got {nodes}")
        if self.keys[-1] >= self.num_nodes:
            raise ValueError(
                f"key {self.keys[-1]} is past the last node {self.num_nodes - 1}; this schedule is for a longer run"
            )
        for name, nodes, kinds, others in (
            ("shallow", self.shallow, "key", {*self.keys}),
            ("skipped", self.skipped, "key or shallow", {*self.keys, *self.shallow}),
            ("gated", self.gated, "key, shallow or skipped", {*self.keys, *self.shallow, *self.skipped}),
        ):
            if wrong := [i for i in nodes if i in others or not 0 < i < self.num_nodes]:
                raise ValueError(f"{name} nodes must be 1..{self.num_nodes - 1} and no {kinds} nodes; got {wrong}")
        after = {i + 1 for i in self.gated} - {*self.gated, *self.keys, self.num_nodes}
        if after:  # what it would take is of predictions with guidance
            raise ValueError(f"after a step at the level tgate comes another or a key step; got {min(after)}")

    def _check_batches(self) -> None:
        if self.parallel < 1:
            raise ValueError(f"parallel must be at least 1 decoder step per batch; got {self.parallel}")
        if bool(self.shallow) != (self.branch > 0):
            raise ValueError(f"branch must be at least 1 with shallow nodes, and 0 without; got {self.branch}")
        check_forecast(Forecast.parse(self.propagate), self.levels)
        if self.refresh < 0:
            raise ValueError(f"refresh must be at least 0 input blocks; got {self.refresh}")
        if self.control and (self.propagate != "hold" or self.levels - {Compute.DECODER}):
            raise ValueError("control networks run at every step only with plans that hold features for the decoder")
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"sizes must be at least 1 decoder step per batch; got {self.sizes}")

    @property
    def plain(self) -> bool:
        """Whether every node is a key node."""
        return len(self.keys) == self.num_nodes

    @property
    def waits(self) -> bool:
        """Whether a decoder node waits for the latent before it."""
        return self.refresh > 0 or self.control

    @property
    def levels(self) -> frozenset[Compute]:
        """What runs at nodes that are no key nodes."""
        kinds = {Compute.SHALLOW: len(self.shallow), Compute.SKIPPED: len(self.skipped), Compute.GATED: len(self.gated)}
        kinds[Compute.DECODER] = self.num_nodes - len(self.keys) - sum(kinds.values())
        return frozenset(kind for kind, count in kinds.items() if count)

    def computes(self) -> tuple[Compute, ...]:
        """What runs at every node."""
        return tuple(compute for batch in self.batches() for compute in batch.computes())

    def batches(self, change: Change | None = None) -> Iterator[Batch]:
        """The run's batches in order; together they cover every node once."""
        return self.batches_of(range(self.num_nodes))

    def batches_of(self, nodes: range) -> Iterator[Batch]:
        """The batches of some nodes that follow each other, in order."""
        kinds = (
            dict.fromkeys(range(self.num_nodes), Compute.DECODER)
            | dict.fromkeys(self.keys, Compute.FULL)
            | dict.fromkeys(self.shallow, Compute.SHALLOW)
            | dict.fromkeys(self.skipped, Compute.SKIPPED)
            | dict.fromkeys(self.gated, Compute.GATED)
        )
        # Outputs of cross-attention are kept of one node.
        most = 1 if self.waits or self.gated else self.parallel
        i = nodes.start
        while i < nodes.stop:
            stop = i + 1
            if kinds[i] in (Compute.FULL, Compute.DECODER):
                while stop < min(i + most, nodes.stop) and kinds[stop] is Compute.DECODER:
                    stop += 1
            if self.sizes:
                stop = i + max(size for size in (1, *self.sizes) if size <= stop - i)
            yield Batch(range(i, stop), kinds[i])
            i = stop

    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON values: all but `parallel` and `sizes`."""
        if self.plain:
            return {"keys": None}
        # Runs that only hold have always named skipped nodes so; they can be resumed.
        skipped = "shallow" if self.propagate == "hold" and not self.shallow else "skipped"
        return {"keys": [*self.keys], "propagate": self.propagate} | {
            name: value
            for name, value in (
                ("shallow", [*self.shallow]),
                ("branch", self.branch),
                (skipped, [*self.skipped]),
                ("gated", [*self.gated]),
                ("refresh", self.refresh),
                ("control_at_every_node", self.control),
            )
            if value
        }


def plan_of_level(num_nodes: int, keys: tuple[int, ...], level: str, branch: int = 1, *, propagate: str) -> Plan:
    """The plan of these key nodes with all others at a level."""
    others = tuple(sorted({*range(num_nodes)} - {*keys}))
    if not others or level == "encoder":
        return Plan(num_nodes, keys, propagate=propagate)
    if level == "tgate":
        return Plan(num_nodes, keys, propagate=propagate, gated=others)
    if level == "skip" or not branch:
        return Plan(num_nodes, keys, propagate=propagate, skipped=others)
    return Plan(num_nodes, keys, propagate=propagate, shallow=others, branch=branch)


def with_level(plan: Plan, level: str, nodes: Iterable[int], branch: int = 1) -> Plan:
    """The plan with these nodes at one of LEVELS, or `full`.

    Raises:
        ValueError: a node is out of range or is node 0, which is a key node; or shallow nodes of two numbers of blocks.
    """
    nodes = {*nodes}
    if outside := sorted(nodes - {*range(level != "full", plan.num_nodes)}):
        raise ValueError(
            f"steps at the level {level} must be {int(level != 'full')}..{plan.num_nodes - 1}; got {outside[0]}"
        )
    at = {"full": plan.keys, "deepcache": plan.shallow, "skip": plan.skipped, "tgate": plan.gated}
    at = {name: tuple(sorted({*old} | nodes if name == level else {*old} - nodes)) for name, old in at.items()}
    others = {*plan.shallow} - nodes
    if level == "deepcache" and others and branch != plan.branch:
        raise ValueError(f"all deepcache steps run the same number of blocks; got {plan.branch} and {branch}")
    branch = branch if level == "deepcache" else plan.branch if others else 0
    return replace(plan, keys=at["full"], shallow=at["deepcache"], skipped=at["skip"], gated=at["tgate"], branch=branch)


def check_forecast(forecast: Forecast, levels: frozenset[Compute]) -> None:
    """Raise ValueError if there is nothing of the kind that a forecaster is for; a run of key nodes takes any."""
    if forecast.name == "zeros" and levels - {Compute.DECODER}:
        raise ValueError(
            "zeros can stand for the encoder's features only; this plan forecasts inner features or predictions"
        )
    if forecast.quantity and levels and Compute.SKIPPED not in levels:
        raise ValueError(
            f"{forecast.quantity} is a quantity of whole predictions, and this plan forecasts features; a plan that "
            f"forecasts predictions is skip:uniform:3"
        )


SIZES = 2  # of decoder batches beside 1 that a plan is cut into at most
CALLS = 5  # decoder calls that a size must save


def with_few_sizes(plan: Plan, most: int) -> Plan:
    """The plan with decoder batches of at most `most` nodes, of few different sizes.

    The first batch of each size in a process is slow: the libraries below prepare their kernels for its shapes. So a
    size must save at least CALLS calls of the decoder; what is left of a group is decoded node by node, in batches of
    the size that the plain run has.
    """
    groups = Counter(len(batch.nodes) for batch in replace(plan, parallel=plan.num_nodes).batches())
    possible = range(2, min(most, max(groups)) + 1)
    choices = (sizes for n in range(SIZES + 1) for sizes in combinations(possible, n))
    sizes = min(
        choices,
        key=lambda sizes: CALLS * len(sizes) + sum(count * calls_of(group, sizes) for group, count in groups.items()),
    )
    return replace(plan, parallel=max(sizes, default=1), sizes=sizes)


def calls_of(group: int, sizes: Sequence[int]) -> int:
    """How many batches a group of nodes makes: as many of the largest size as fit, then of the next, the rest alone."""
    calls = 0
    for size in sorted(sizes, reverse=True):
        calls, group = calls + group // size, group % size
    return calls + group


def check_blocks(plan: AnyPlan, blocks: int) -> None:
    """Raise ValueError if a plan asks for more blocks than a network has on each side."""
    if max(plan.branch, plan.refresh) > blocks:
        raise ValueError(
            f"{max(plan.branch, plan.refresh)} blocks are to run anew; this network has {blocks} on each side"
        )


class Change(Protocol):
    """How much has changed since a key node, for a plan that decides on the way."""

    def __call__(self, probe: str, i: int, key: int) -> float:
        """Relative change of the probe from node `key`, the last key node, to node i, when all before i are done.

        The probe 'forecast' is the relative error of what was forecast at key node i, when it is done.
        """


class AnyPlan(Protocol):
    """What the loop needs of a plan."""

    num_nodes: int
    parallel: int
    branch: int
    propagate: str
    refresh: int
    control: bool
    waits: bool  # decoder nodes, for the latent before them
    plain: bool  # every node is a key node
    levels: frozenset[Compute]  # what may run at nodes that are no key nodes
    per_image: bool  # what runs when depends on the image
    measures: bool  # forecasts at key nodes are compared with what is computed there, and batches may go back

    def batches(self, change: Change | None = None) -> Iterator[Batch]: ...

    def settings(self) -> dict[str, Any]: ...


# Forecasters: they weigh past values

Times = Sequence[float]
Span = tuple[float, float]


def lagrange(times: Times, t: float, span: Span) -> list[float]:
    """The polynomial of degree len(times) - 1 through all past values, at t; the weights sum to 1."""
    weights = []
    for i, here in enumerate(times):
        weight = 1.0
        for other in [*times[:i], *times[i + 1 :]]:
            weight *= (t - other) / (here - other)
        weights.append(weight)
    return weights


def zeros(times: Times, t: float, span: Span) -> list[float]:
    return [0.0] * len(times)


def taylor(times: Times, t: float, span: Span) -> list[float]:
    """A Taylor polynomial at the last key node, its derivatives by differences; the weights sum to 1.

    The i-th derivative at a key node is the difference of the (i-1)-th ones there and at the key node before, over the
    time between the two. It is exact for degree 1: a backward difference is not the derivative where it is used.

    Source: TaylorSeer (arXiv 2503.06923); the recursion is its released code's.
    """
    rows = np.eye(len(times))  # [i]: the value at key node i, as weights over the values
    derivatives: list[np.ndarray] = []  # at the key node reached, the value first
    for i, row in enumerate(rows):
        new = [row]
        for before in derivatives:
            new.append((new[-1] - before) / (times[i] - times[i - 1]))
        derivatives = new
    step = t - times[-1]
    return sum(step**i / factorial(i) * row for i, row in enumerate(derivatives)).tolist()


def adams_bashforth(times: Times, t: float, span: Span) -> list[float]:
    """Binomial weights, 2 and -1 of the last two values, 3, -3 and 1 of the last three, at every distance.

    They continue equally spaced values by one distance, exactly for polynomials of degree len(times) - 1, and sum to 1.

    Source: AB-Cache (arXiv 2504.10540). The weights of two values are those of its released code as others describe it;
    the paper's higher orders are taken to be the same rule, which has the error O(h^k) that it states.
    """
    k = len(times)
    return [float((-1) ** (j + 1) * comb(k, j)) for j in range(k, 0, -1)]


BASES, RIDGE = 4, 0.1  # highest Chebyshev polynomial and ridge weight of Spectrum's released configuration


def chebyshev(times: Times, t: float, span: Span) -> list[float]:
    """The Chebyshev polynomials T_0..T_4 fitted to all past values by ridge regression, at t.

    The span of the run is mapped to [-1, 1]. The ridge shrinks the constant too: the weights sum to less than 1, with
    few values by a tenth. Of a single value nothing is fitted: it is held.

    Source: Spectrum (arXiv 2603.01623), with M = 4 and lambda = 0.1 as in its released configuration. That maps step
    0..50 to [-1, 1] whatever the run; here it is 0..steps (on the axis `step`).
    """
    if len(times) < 2:
        return [1.0]
    first, last = span
    taus = (2 * np.array([*times, t]) - first - last) / (last - first)
    basis = np.polynomial.chebyshev.chebvander(taus, BASES)
    past, new = basis[:-1], basis[-1]
    return (new @ np.linalg.solve(past.T @ past + RIDGE * np.eye(BASES + 1), past.T)).tolist()


def spectrum(times: Times, t: float, span: Span, share: float = 0.5) -> list[float]:
    """`chebyshev` and the line through the last two values, mixed.

    Source: Spectrum (arXiv 2603.01623); the share of 0.5 is that of the released script for Stable Diffusion XL.
    """
    line = [0.0] * (len(times) - 2) + lagrange(times[-2:], t, span)
    return [share * a + (1 - share) * b for a, b in zip(chebyshev(times, t, span), line, strict=True)]


@dataclass(frozen=True)
class Method:
    """A forecaster's rule.

    weigh: (times of past values, new time, first and last time of the run) -> weight of each value. With fewer values
        than `keep` it is that of the lower degree or order that they allow.
    keep:  past values that it takes at most.
    axis:  what is time, unless it is given.
    """

    weigh: Callable[[Times, float, Span], list[float]]
    keep: int
    axis: str = "timestep"


METHODS = {
    "hold": Method(lagrange, 1),
    "linear": Method(lagrange, 2),
    "quadratic": Method(lagrange, 3),
    "cubic": Method(lagrange, 4),
    "taylor1": Method(taylor, 2, "step"),
    "taylor2": Method(taylor, 3, "step"),
    "taylor3": Method(taylor, 4, "step"),
    "ab2": Method(adams_bashforth, 2, "step"),
    "ab3": Method(adams_bashforth, 3, "step"),
    "ab4": Method(adams_bashforth, 4, "step"),
    "chebyshev": Method(chebyshev, 100, "step"),
    "spectrum": Method(spectrum, 100, "step"),
    "zeros": Method(zeros, 1),
}
POLYNOMIALS = ("hold", "linear", "quadratic", "cubic")  # of METHODS
AXES = ("timestep", "logsnr", "step")
QUANTITIES = ("v", "eps", "x0")
GRAMMAR = "NAME[:AXIS][:QUANTITY]"


@dataclass(frozen=True)
class Forecast:
    """How values between key nodes are forecast.

    name:     one of METHODS.
    axis:     what is time: 'timestep' as the network gets it, 'logsnr' = log(alpha / sigma), 'step' = the number of
        the node.
    quantity: of whole predictions, what is forecast: 'v', 'eps', 'x0', or '' = what the network predicts.
    """

    name: str = "hold"
    axis: str = "timestep"
    quantity: str = ""

    @staticmethod
    def parse(text: str) -> Forecast:
        """The forecaster that a text such as quadratic:logsnr:eps names.

        Raises:
            ValueError: a word is unknown, or out of place.
        """
        name, *words = text.split(":") if isinstance(text, str) else [text]
        if name not in METHODS:
            known = did_you_mean(name, METHODS) if isinstance(name, str) else ""
            raise ValueError(f"a forecaster must be one of {', '.join(METHODS)}; got {shown(name)}{known}")
        forecast = Forecast(name, METHODS[name].axis)
        for field, known in (("axis", AXES), ("quantity", QUANTITIES)):
            if words and words[0] in known:
                forecast = replace(forecast, **{field: words.pop(0)})
        if words:
            raise ValueError(
                f"a forecaster is {GRAMMAR}, with the axis one of {', '.join(AXES)} and the quantity one of "
                f"{', '.join(QUANTITIES)}; got {shown(text)}"
            )
        return forecast


def _checked(text: str) -> str:
    try:
        Forecast.parse(text)
    except ValueError as error:
        raise ValueError(f"should be a forecaster: {error}") from None
    return text


ForecastName = Annotated[str, AfterValidator(_checked)]  # for what is read from files
