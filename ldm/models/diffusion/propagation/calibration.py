"""Key steps chosen by measurement: what holding a key node's features costs at each later node, and the best keys.

The measured table lies beside the weights it was made for, in calibration/SAMPLER-STEPS-scaleSCALE.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.io.files import atomic_write, read_json
from ldm.io.schema import Number, Schema, parse
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.forecast import ForecastName
from ldm.models.diffusion.propagation.history import relative_error
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import eps_weight

DECODERS = 8  # decoder steps in one batch of the measurement
Nodes = Annotated[int, Field(ge=1, le=10_000)]  # of a run
Table = list[list[Number]]


class Calibration(Schema):
    """What was measured of one model with one sampler.

    num_nodes: of the run.
    eps:      [i][j - i]: mean squared error of the latent after node j, all else unchanged, if the decoder there gets
        the features of node i <= j.
    features: [i][j - i]: relative squared difference of the features of nodes i and j, mean over the levels.
    encoder:  share of the encoder in a whole prediction's MACs, 0..1.
    propagate: what did best between key nodes, see `Plan`.
    made_for: weights, sampler and the like that the measurement is good for.
    how:      prompts, seeds and the like, for the reader.
    """

    num_nodes: Nodes
    eps: Table
    features: Table
    encoder: Annotated[Number, Field(gt=0, lt=1)]
    propagate: ForecastName = "hold"
    made_for: dict[str, Any] = {}
    how: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_an_error_for_each_pair(self) -> Calibration:
        lengths = list(range(self.num_nodes, 0, -1))
        for name, table in (("eps", self.eps), ("features", self.features)):
            if [len(row) for row in table] != lengths:
                raise ValueError(f"{name} must have rows of {lengths[0]}, {lengths[0] - 1}, ... 1 errors")
        return self

    def plan(self, keys: int) -> Plan:
        """The plan of so many key nodes with the least total error.

        Raises:
            ValueError: keys is not in 1..num_nodes.
        """
        return Plan(self.num_nodes, best_keys(self.eps, keys), propagate=self.propagate)

    def plan_within(self, macs: float) -> Plan:
        """The plan of the most key nodes that costs at most this share of the plain run's MACs.

        Raises:
            ValueError: macs is above 1, or below what one key node costs.
        """
        least = 1 - self.encoder + self.encoder / self.num_nodes
        if not least <= macs <= 1:
            raise ValueError(
                f"the share of MACs must lie in {least:.3f}..1 for {self.num_nodes} nodes of this model; got {macs:g}"
            )
        return self.plan(int((macs - 1 + self.encoder) / self.encoder * self.num_nodes + 1e-9))

    def save(self, path: str | Path) -> None:
        with atomic_write(path) as part:
            part.write_text(json.dumps(self.model_dump()) + "\n", encoding="utf-8")


def read_calibration(path: str | Path) -> Calibration:
    """The inverse of `Calibration.save`.

    Raises:
        ValueError: the file can't be read or is no calibration.
    """
    try:
        return parse(Calibration, read_json(path))
    except OSError as error:
        raise ValueError(f"calibration {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no calibration: {error}") from None


def best_keys(errors: Sequence[Sequence[float]], keys: int) -> tuple[int, ...]:
    """The key nodes, node 0 first, for which the errors of all nodes sum to the least; exact.

    Dynamic programming over the node where a group ends: O(N^2 keys).

    Args:
        errors: [i][j - i] of node j with the features of node i.
        keys: how many, 1..N.
    """
    total = len(errors)
    if not 1 <= keys <= total:
        raise ValueError(f"keys must be 1..{total}, the nodes of this run; got {keys}")
    group = np.full((total, total + 1), np.inf)  # [i, stop]: nodes i..stop-1 with the features of i
    for i, row in enumerate(errors):
        group[i, i + 1 :] = np.cumsum(row)
    best = np.full(total + 1, np.inf)  # [stop]: the first k groups, ending before stop
    best[0] = 0.0
    came_from = []
    for _ in range(keys):
        sums = best[:-1, None] + group  # (begin of the last group, stop)
        came_from.append(sums.argmin(axis=0))
        best = sums.min(axis=0)
    chosen, stop = [], total
    for origins in reversed(came_from):
        stop = int(origins[stop])
        chosen.append(stop)
    return tuple(reversed(chosen))


@torch.no_grad()
def measure(model: Denoiser, rule: Rule, x: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """The tables `eps` and `features` of a `Calibration`, along the plain run from x, (B, C, H, W).

    Keeps the features of all nodes. Weighs a wrong prediction by how far one deterministic step follows it.
    """
    nodes = rule.nodes
    plain = Plan(len(nodes), tuple(range(len(nodes))))
    xs = [x, *(state.x for state in denoise(model, rule, plan=plain, x=x))]
    held = [model.encode(xs[i], node.t) for i, node in enumerate(nodes)]
    right = [model.to_eps(model.decode([held[j]], [node.t])[0], xs[j], node) for j, node in enumerate(nodes)]
    eps_table, feature_table = [], []
    for i in range(len(nodes)):
        errors = []
        for start in range(i, len(nodes), DECODERS):
            js = range(start, min(start + DECODERS, len(nodes)))
            predictions = model.decode([held[i]] * len(js), [nodes[j].t for j in js])
            for j, prediction in zip(js, predictions, strict=True):
                eps = model.to_eps(prediction, xs[j], nodes[j])
                weight = eps_weight(nodes[j].abar, nodes[j].abar_next) ** 2
                errors.append(0.0 if i == j else weight * float((eps - right[j]).square().mean()))
        eps_table.append(errors)
        feature_table.append([relative_error(held[i], later) ** 2 for later in held[i:]])
    return eps_table, feature_table
