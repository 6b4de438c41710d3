"""Key steps chosen by measurement, for each level of reuse and the forecaster that runs there.

What was found lies beside the weights it was made for, in calibration/SAMPLER-STEPS-scaleSCALE.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from ldm.io.files import Number, Schema, atomic_write, parse, read_json
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.propagation.plan import MEASURED, ForecastName, Plan, plan_of_level
from ldm.models.diffusion.schedule import eps_weight
from ldm.modules.diffusionmodules.util import Features

Nodes = Annotated[int, Field(ge=1, le=10_000)]  # of a run
Level = Literal[MEASURED]
Share = Annotated[Number, Field(ge=0, lt=1)]
DECODERS = 8  # decoder steps in one batch of the measurement


class Choice(Schema):
    """The best key nodes for one level and one forecaster.

    keys:   [K - 1]: K key nodes, for each K up to the nodes of the run.
    errors: by K, where whole runs were made: mean squared error of their latents to those of plain runs.
    """

    level: Level
    propagate: ForecastName
    keys: list[list[int]]
    errors: dict[str, Number] = {}


class Calibration(Schema):
    """What was found for one model with one sampler.

    num_nodes: of the run.
    rest:      what a node costs that is no key node, as a share of a whole prediction's MACs, by level.
    choices:   of key nodes.
    made_for:  weights, sampler and the like that it is good for.
    how:       prompts, seeds and the like, for the reader.
    """

    num_nodes: Nodes
    rest: dict[Level, Share]
    choices: list[Choice]
    made_for: dict[str, Any] = {}
    how: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_keys_of_every_number(self) -> Calibration:
        for choice in self.choices:
            if [len(keys) for keys in choice.keys] != [*range(1, self.num_nodes + 1)]:
                raise ValueError(f"keys of {choice.level} must be lists of 1, 2, ... {self.num_nodes} key nodes")
            if choice.level not in self.rest:
                raise ValueError(f"rest must have the cost of {choice.level}")
        return self

    def choice(self, level: str = "encoder", propagate: str | None = None, count: int = 0) -> Choice:
        """That of a level for a forecaster; None = the one that did best in whole runs with so many key nodes, or,
        where none were made, the first.

        Raises:
            ValueError: there is none.
        """
        there = [choice for choice in self.choices if choice.level == level]
        fitting = [choice for choice in there if propagate in (None, choice.propagate)]
        if fitting:
            return min(fitting, key=lambda choice: choice.errors.get(str(count), float("inf")))
        known = ", ".join(choice.propagate for choice in there)
        raise ValueError(
            f"this calibration has key timesteps of {level} for {f'the forecasters {known}' if known else 'none'}; "
            f"got {propagate or level}"
        )

    def plan(self, count: int, level: str = "encoder", propagate: str | None = None) -> Plan:
        """The plan of so many key nodes.

        Raises:
            ValueError: count is not in 1..num_nodes, or see `choice`.
        """
        if not 1 <= count <= self.num_nodes:
            raise ValueError(f"keys must be 1..{self.num_nodes}, the nodes of this run; got {count}")
        choice = self.choice(level, propagate, count)
        return plan_of_level(self.num_nodes, tuple(choice.keys[count - 1]), level, propagate=choice.propagate)

    def plan_within(self, macs: float, level: str = "encoder", propagate: str | None = None) -> Plan:
        """The plan of the most key nodes that costs at most this share of the plain run's MACs.

        Raises:
            ValueError: macs is above 1, or below what one key node costs, or see `choice`.
        """
        self.choice(level, propagate)
        rest = self.rest[level]
        least = rest + (1 - rest) / self.num_nodes
        if not least <= macs <= 1:
            raise ValueError(
                f"the share of MACs must lie in {least:.3f}..1 for {self.num_nodes} nodes of this model; got {macs:g}"
            )
        return self.plan(int((macs - rest) / (1 - rest) * self.num_nodes + 1e-9), level, propagate)

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
        raise ValueError(f"{path} is no calibration: {error}; scripts/calibrate_plan.py makes a new one") from None


@torch.no_grad()
def measure(model: Denoiser, rule: Rule, x: Tensor, levels: Sequence[str] = MEASURED) -> dict[str, list[np.ndarray]]:
    """For each of these levels the products of `NodeErrors`, along the plain run from x, (B, C, H, W).

    Keeps the features of all nodes. Weighs a wrong prediction by how far one deterministic step follows it.
    """
    nodes = rule.nodes
    xs = [x, *(state.x for state in denoise(model, rule, Plan(len(nodes), tuple(range(len(nodes)))), x))]
    features = [model.encode(xs[j], node.t) for j, node in enumerate(nodes)]
    inner = []
    if "deepcache" in levels:
        inner = [model.advance([f], [node.t], 1)[0].without_skips() for f, node in zip(features, nodes, strict=True)]

    def decoded(values: Sequence[Features], j: int) -> list[Tensor]:
        """eps at node j, from each of these."""
        alike = ([*same] for _, same in groupby(values, key=len))  # where guidance begins or ends the batch changes
        batches = (same[k : k + DECODERS] for same in alike for k in range(0, len(same), DECODERS))
        predictions = (p for batch in batches for p in model.decode(batch, [nodes[j].t] * len(batch)))
        return [model.to_eps(prediction, xs[j], nodes[j]) for prediction in predictions]

    eps = [decoded([f], j)[0] for j, f in enumerate(features)]
    products: dict[str, list[np.ndarray]] = {level: [] for level in levels}
    for j, node in enumerate(nodes):
        tried = {
            "encoder": decoded(features[:j], j),
            "deepcache": decoded([model.refresh(value, xs[j], node.t, 1) for value in inner[:j]], j),
            "skip": eps[:j],
        }
        for level in levels:
            guesses = tried[level]
            errors = torch.stack([(e - eps[j]).flatten() for e in guesses] or [x.new_zeros(0)]).double()[:j]
            weight = eps_weight(node.abar, node.abar_next) ** 2
            products[level].append((weight * (errors @ errors.T) / x.numel()).cpu().numpy())
    return products
