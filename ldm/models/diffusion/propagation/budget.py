"""An error budget: where a forecast turns out to be too far off, it is made again from more key nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ldm.models.diffusion.propagation.plan import Batch, Change, Compute, Plan


@dataclass(frozen=True)
class BudgetPlan:
    """A plan whose groups are redone while the forecast at the key node behind them misses by more than a budget.

    At a key node the true value is there, so the error of what the nodes before it were given is known. If it is above
    the budget, the run goes back to the key node before and makes the node half-way a key node too; and so on, down to
    groups without a forecast. The last node is a key node, so that every group has one behind it.

    plan:     its key nodes, levels and forecaster.
    budget:   largest relative error of a forecast at a key node, see `forecast_error`; > 0.
    parallel: as in `Plan`.

    The choice belongs to one image: a run of several together is refused.

    Raises:
        ValueError: the budget is not above 0 and finite, or the plan forecasts nothing that could be compared.
    """

    plan: Plan
    budget: float
    parallel: int = 1
    measures: ClassVar[bool] = True
    per_image: ClassVar[bool] = True
    plain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.budget < float("inf"):
            raise ValueError(f"an error budget must be above 0 and finite; got {self.budget:g}")
        if not isinstance(self.plan, Plan):
            raise ValueError("an error budget needs key timesteps that are known before; an online plan has none")
        if not self.plan.levels or self.num_nodes < 3:
            raise ValueError("an error budget needs forecasts to compare; this plan makes none")

    @property
    def num_nodes(self) -> int:
        return self.plan.num_nodes

    @property
    def branch(self) -> int:
        return self.plan.branch

    @property
    def propagate(self) -> str:
        return self.plan.propagate

    @property
    def refresh(self) -> int:
        return self.plan.refresh

    @property
    def control(self) -> bool:
        return self.plan.control

    @property
    def waits(self) -> bool:
        return self.plan.waits

    @property
    def levels(self) -> frozenset[Compute]:
        return self.plan.levels

    def batches(self, change: Change) -> Iterator[Batch]:
        """The run's batches; one that begins before the last one's end goes back there."""
        plan = replace(self.plan, parallel=self.parallel)
        here, ahead = 0, [*reversed(sorted({*self.plan.keys[1:], self.num_nodes - 1}))]
        yield Batch(range(1), Compute.FULL)
        while ahead:
            there = ahead[-1]
            yield from plan.batches_of(range(here + 1, there))
            yield Batch(range(there, there + 1), Compute.FULL)
            if there - here > 1 and change("forecast", there, here) > self.budget:
                ahead.append((here + there) // 2)
            else:
                here = ahead.pop()

    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON values."""
        return self.plan.settings() | {"error_budget": self.budget}
