"""Which nodes of a run are key nodes, and how many decoders share a batch.

A plan knows no solver and no tensor. The published key lists are in configs/plans/NAME.yaml:

    source: where the list was published
    note:   anything a user should know (optional)
    steps:  {50: [0-3, 5, 10]}   key nodes of a run of that many nodes, a-b inclusive; or
    every:  4                    every fourth node of any run; or
    same_as: NAME                another plan's keys under a second published name
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import yaml

PLAN_DIR = Path(__file__).parents[3] / "configs" / "plans"


@dataclass(frozen=True)
class Plan:
    """Encoder propagation over the nodes 0..num_nodes-1 of one run.

    keys:     nodes where the encoder runs; node 0 must be one.
    parallel: most decoder steps in one batch; 1 = same result, least memory.
    """

    num_nodes: int
    keys: tuple[int, ...]
    parallel: int = 1

    def __post_init__(self) -> None:
        if not self.keys or self.keys[0] != 0:
            raise ValueError(f"keys must start with node 0, which has no earlier features; got {self.keys}")
        if any(b <= a for a, b in pairwise(self.keys)):
            raise ValueError(f"keys must increase strictly; got {self.keys}")
        if self.keys[-1] >= self.num_nodes:
            raise ValueError(
                f"key {self.keys[-1]} is past the last node {self.num_nodes - 1}; "
                f"this schedule is for a longer run"
            )
        if self.parallel < 1:
            raise ValueError(f"parallel must be at least 1 decoder step per batch; got {self.parallel}")

    def batches(self) -> Iterator[tuple[int, list[range]]]:
        """Yield (key, decoder batches); the batches cover key..next key - 1."""
        for key, stop in pairwise((*self.keys, self.num_nodes)):
            yield key, [range(i, min(i + self.parallel, stop)) for i in range(key, stop, self.parallel)]


def plan_names() -> tuple[str, ...]:
    """Names that `load_plan` knows besides the general forms, sorted."""
    return tuple(sorted(path.stem for path in PLAN_DIR.glob("*.yaml")))


def load_plan(spec: str, num_nodes: int, parallel: int = 1) -> Plan:
    """The plan that `spec` names, for a run of `num_nodes` nodes.

    Args:
        spec: `off` (every node is a key node), a name of `plan_names()`, `uniform:N` (every N-th node),
            key nodes such as `0,1,2,5` or `0-3,5`, or the path of a .yaml file in the format above.
        num_nodes: network evaluations of the run; for DDIM the length of its timestep grid.
        parallel: most decoder steps in one batch.

    Named and file plans hold exactly at the run lengths they list. At other lengths the longest list is
    scaled: key k of n becomes floor(k * num_nodes / n), repeats dropped. `every` and `uniform:N` are
    not scaled.

    Raises:
        ValueError: unknown name, malformed spec or file, keys that do not start at 0, do not increase or are
            past the end of the run.
    """
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1; got {num_nodes}")
    return Plan(num_nodes, _keys(spec, num_nodes), parallel)


def _keys(spec: str, num_nodes: int) -> tuple[int, ...]:
    if spec == "off":
        return tuple(range(num_nodes))
    if uniform := re.fullmatch(r"uniform:(\d+)", spec):
        return _every(int(uniform[1]), num_nodes)
    if spec[:1].isdigit():
        return _expand(spec.split(","))
    if spec in plan_names():
        return _read(PLAN_DIR / f"{spec}.yaml").keys(num_nodes)
    if spec.endswith((".yaml", ".yml")):
        return _read(Path(spec)).keys(num_nodes)
    raise ValueError(
        f"unknown plan {spec!r}; accepted: off, uniform:N, key nodes such as 0,1,2,5, a .yaml file, "
        f"or one of {', '.join(plan_names())}"
    )


def _every(n: int, num_nodes: int) -> tuple[int, ...]:
    if n < 1:
        raise ValueError(f"a uniform plan needs a key node at least every 1 node; got {n}")
    return tuple(range(0, num_nodes, n))


def _expand(entries: Iterable[int | str]) -> tuple[int, ...]:
    """Key nodes from entries such as 7 or '0-3' (inclusive)."""
    keys: list[int] = []
    for entry in entries:
        span = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", str(entry))
        if span is None:
            raise ValueError(f"key nodes must be numbers or ranges such as 0-3; got {str(entry)!r}")
        first = int(span[1])
        keys += range(first, int(span[2] or first) + 1)
    return tuple(keys)


@dataclass(frozen=True)
class _PlanFile:
    """The contents of one plan file; exactly one of steps, every and same_as is given."""

    source: str
    note: str = ""
    steps: dict[int, list[int | str]] = field(default_factory=dict)
    every: int | None = None
    same_as: str | None = None

    def __post_init__(self) -> None:
        if sum(map(bool, (self.steps, self.every, self.same_as))) != 1:
            raise ValueError("give exactly one of steps, every, same_as")
        if not isinstance(self.steps, dict) or not all(
            isinstance(keys, list) for keys in self.steps.values()
        ):
            raise ValueError(f"steps must be {{number of nodes: [key nodes]}}; got {self.steps!r}")
        if not isinstance(self.every, int | None) or not isinstance(self.same_as, str | None):
            raise ValueError(
                f"every must be a number and same_as a name; got {self.every!r}, {self.same_as!r}"
            )

    def keys(self, num_nodes: int) -> tuple[int, ...]:
        if self.same_as is not None:
            return _keys(self.same_as, num_nodes)
        if self.every is not None:
            return _every(self.every, num_nodes)
        if num_nodes in self.steps:
            return _expand(self.steps[num_nodes])
        longest = max(self.steps)
        keys = _expand(self.steps[longest])
        Plan(longest, keys)  # a faulty list is reported as written, before scaling can hide its fault
        return tuple(sorted({k * num_nodes // longest for k in keys}))


def _read(path: Path) -> _PlanFile:
    try:
        return _PlanFile(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"plan file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(f"plan file {path} is not a plan: {' '.join(str(error).split())}") from None
