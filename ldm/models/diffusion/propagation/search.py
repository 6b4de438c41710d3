"""The search for key nodes: a dynamic program over the errors of single nodes, then exchange over whole runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ldm.models.diffusion.propagation.predict import Forecaster

Keys = tuple[int, ...]
PAIRS = 100  # nodes up to which the program tells ways apart by their last two key nodes


@dataclass(frozen=True, eq=False)
class NodeErrors:
    """What a forecast at one node costs: the mean squared error that it leaves in the latents after that node.

    products: [j]: (j, j), mean products of the errors of those latents with the values of nodes 0 to j - 1 in place of
        node j's. The squared error of a weighted sum of values is a quadratic form in them, exactly for predictions and
        to first order for features. So one measurement serves all forecasters whose weights sum to 1, and all keys.
    """

    products: Sequence[np.ndarray]
    forecaster: Forecaster

    @property
    def keep(self) -> int:
        return self.forecaster.method.keep

    def __call__(self, keys: Keys, nodes: range) -> np.ndarray:
        """At each of these nodes, all after the last of the key nodes, (n,)."""
        used = self.forecaster.distinct(keys)[-self.keep :]
        errors = []
        for j in nodes:
            weights = np.array(self.forecaster.weights(used, j))
            errors.append(weights @ self.products[j][np.ix_(used, used)] @ weights)
        return np.maximum(errors, 0.0)


def best_keys(errors: NodeErrors | Callable[[Keys, range], np.ndarray], num_nodes: int, keep: int) -> list[Keys]:
    """For every number of key nodes, node 0 first, those for which the errors of all nodes sum to the least.

    Dynamic programming over the last two key nodes, O(N^4); over the last one, O(N^3), in runs of more than PAIRS
    nodes. Exact where the errors depend on no more than these. What a forecaster takes from before them is that of the
    best way to them, so with more values the result need not be the least.

    Args:
        errors: (key nodes, nodes after the last of them) -> their errors.
        keep: key nodes that the errors depend on at most.

    Returns:
        [K - 1]: K key nodes, for K in 1..N.
    """
    told_apart = min(keep, 2 if num_nodes <= PAIRS else 1)

    @cache
    def sums(keys: Keys) -> np.ndarray:
        """[n]: of the n nodes after the last key node."""
        return np.concatenate([[0.0], np.cumsum(errors(keys, range(keys[-1] + 1, num_nodes)))])

    best, ways = [], {(0,): (0.0, (0,))}  # by the last key nodes: error of the nodes before the last, all key nodes
    for _ in range(num_nodes):
        best.append(min((total + sums(keys[-keep:])[-1], keys) for total, keys in ways.values())[1])
        longer: dict[Keys, tuple[float, Keys]] = {}
        for total, keys in ways.values():
            until = total + sums(keys[-keep:])
            for key in range(keys[-1] + 1, num_nodes):
                way = (until[key - keys[-1] - 1], (*keys, key))
                state = way[1][-told_apart:]
                longer[state] = min(way, longer.get(state, way))
        ways = longer
    return best


def exchange(keys: Keys, num_nodes: int, error_of: Callable[[Keys], float], sweeps: int = 2) -> tuple[Keys, float]:
    """Move single key nodes to a neighbouring node where that lowers the error; a local optimum, or near one.

    Args:
        error_of: of a whole run with these key nodes.
        sweeps: over all key nodes, at most.

    Returns:
        the key nodes, and their error.
    """
    least = error_of(keys)
    for _ in range(sweeps):
        before = keys
        for place in range(1, len(keys)):
            for moved in (keys[place] - 1, keys[place] + 1):
                if not keys[place - 1] < moved < (*keys[place + 1 :], num_nodes)[0]:
                    continue
                tried = (*keys[:place], moved, *keys[place + 1 :])
                if (error := error_of(tried)) < least:
                    keys, least = tried, error
        if keys == before:
            break
    return keys, least
