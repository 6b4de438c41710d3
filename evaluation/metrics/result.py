"""Results that say what they are of: values with the protocol that gave them. Only like is compared with like.

The protocol is everything that changes a number without being the thing that is measured: the measure, its network and
weights, the resize, the number of images, the reference. How the samples were made (plan, seeds, weights of the model)
is what a comparison is about; it is kept beside the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldm.io.errors import one_line
from ldm.io.files import flat, json_sha256, read_json, write_json


class ResultError(ValueError):
    """Results that can't be read, or can't be compared."""


@dataclass(frozen=True)
class Result:
    """What a measure found, as JSON values."""

    values: Mapping[str, Any]  # name (fid_real, fid_vs_plain, ...) -> number, or a list of two for an interval
    protocol: Mapping[str, Any]  # what values of different samples must have in common to be compared
    samples: Mapping[str, Any]  # how the images were made: plan, seeds, weights, ...; None = not known
    warnings: Sequence[str] = field(default_factory=list)  # what to bear in mind, in words
    settings: Mapping[str, Any] = field(default_factory=dict)  # those that change no value, such as of resampling

    @property
    def protocol_sha256(self) -> str:
        return json_sha256(self.protocol)

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, {"protocol_sha256": self.protocol_sha256, **asdict(self)})


def read_result(path: str | Path) -> Result:
    """A result that `Result.write` wrote.
    Raises ResultError: not such a file, or one that was changed: its protocol no longer has the hash that it states."""
    try:
        content = read_json(path)
        stated = content.pop("protocol_sha256")
        result = Result(**content)
        for name in ("values", "protocol", "samples", "settings"):
            if not isinstance(getattr(result, name), Mapping):
                raise ValueError(f"{name} must be an object; got {getattr(result, name)!r}")
        if not isinstance(stated, str):
            raise ValueError(f"protocol_sha256 must be text; got {stated!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a result: {one_line(error)}") from error
    if result.protocol_sha256 != stated:
        raise ResultError(f"{path}: its protocol is not the one that its hash {stated[:12]} names; it was changed")
    return result


def comparable(results: Mapping[str, Result]) -> None:
    """Check that results, by name, may stand in one table.
    Raises ResultError: their protocols differ; it names the fields, and what each result has there."""
    protocols = {name: flat(result.protocol) for name, result in results.items()}
    differ = []
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        found = {name: protocol.get(key) for name, protocol in protocols.items()}
        if len({json.dumps(value, sort_keys=True) for value in found.values()}) > 1:
            differ.append(f"{key} ({', '.join(f'{name}: {value}' for name, value in found.items())})")
    if differ:
        raise ResultError(f"different protocols can't be compared; they differ in {'; '.join(differ)}")


# 95 % intervals


NORMAL = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


def bootstrap(features: np.ndarray, measure: Callable[[np.ndarray], float], count: int, seed: int = 0) -> np.ndarray:
    """The measure on `count` draws of N out of N images with replacement, (count,). Two sets of the same N are drawn
    alike, so that paired differences may be taken. `features`: (N, D). Source: Efron (1979)."""
    random, n = np.random.default_rng(seed), len(features)
    return np.array([measure(features[random.integers(0, n, n)]) for _ in range(count)])


def normal_interval(value: float, resampled: np.ndarray) -> list[float]:
    """The interval from the standard deviation of the resampled values. Not from their quantiles: the Fréchet distance
    of a resample, in which images repeat, is too large, which moves the quantiles but hardly the deviation."""
    half = NORMAL * float(np.std(resampled, ddof=1))
    return [value - half, value + half]


def mean_interval(values: np.ndarray, groups: Sequence[Any] | None = None) -> list[float]:
    """The interval of the mean of values (N,), N > 1. Values are independent of each other, or their groups are, of
    which there are at least two, such as prompts of images.
    Source: the cluster-robust variance of Liang and Zeger (1986); without groups it is the usual one."""
    middle = float(np.mean(values))
    sums = values - middle
    if groups is not None:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], sums)
    half = NORMAL * (len(sums) / (len(sums) - 1) * float(np.square(sums).sum())) ** 0.5 / len(values)
    return [middle - half, middle + half]


def share_interval(hits: int, n: int) -> list[float]:
    """The interval of a share: `hits` of `n` independent cases. Source: Wilson's score interval (1927)."""
    z2 = NORMAL**2
    middle = (hits + z2 / 2) / (n + z2)
    half = (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5 / (n + z2)
    return [middle - half, middle + half]


def mean_values(name: str, values: np.ndarray, groups: Sequence[Any] | None = None) -> dict[str, Any]:
    """The mean of values (N,) under that name (None if N = 0), and its interval where there is one; see
    `mean_interval`."""
    if len(values) < 2 or (groups is not None and len({*groups}) < 2):
        return {name: float(values.mean()) if len(values) else None}
    return {name: float(values.mean()), f"{name}_interval": mean_interval(values, groups)}
