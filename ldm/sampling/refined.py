"""The last steps of a run by another model: SDXL's refiner (arXiv 2307.01952, section 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import ConditionedNetwork
from ldm.models.diffusion.propagation.plan import Forecast, Plan, with_level
from ldm.models.diffusion.schedule import Node
from ldm.sampling.engine import Cost, Engine, Ran
from ldm.sampling.generate import Item
from ldm.sampling.task import Start


class HandedOver(Start):
    """Latents that another model has brought to the noise level of the first node, (B, C, h, w)."""

    def __init__(self, latents: Tensor, strength: float):
        self.given, self.strength = latents, strength

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        return self.given


def with_key(plan: Plan, node: int) -> Plan:
    """The plan with a key node at `node`, so that no decoder of a node before it shares a batch with one behind it."""
    if not {*plan.skipped} - {node}:
        plan = replace(plan, propagate=of_features(plan.propagate))
    return with_level(plan, "full", [node])


def of_features(forecast: str) -> str:
    """The forecaster without a quantity, which is of whole predictions alone: without skipped nodes it says nothing."""
    return forecast.removesuffix(f":{Forecast.parse(forecast).quantity}")


def plan_after(plan: Plan, node: int) -> Plan:
    """The plan of the nodes from `node` on, which becomes a key node: the first of another network."""
    plan = with_key(plan, node)
    rest = {
        name: tuple(i - node for i in getattr(plan, name) if i >= node)
        for name in ("keys", "shallow", "skipped", "gated")
    }
    return replace(
        plan,
        num_nodes=plan.num_nodes - node,
        branch=plan.branch if rest["shallow"] else 0,
        propagate=plan.propagate if rest["skipped"] else of_features(plan.propagate),
        **rest,
    )


class Refined(Engine):
    """An engine whose last steps a refiner runs, under the same condition; the plan counts the steps of both.

    The first step of the refiner is a key timestep, whatever the plan says. Its features are its own.

    Args:
        base: the engine of all steps, with a `Plan`.
        refiner: the model of the last ones.
        share: of the steps, above 0 and below 1, that the refiner runs; rounded down.

    Raises:
        ValueError: one of the models is left without a step, or the refiner can't begin between two steps.
    """

    def __init__(self, base: Engine, refiner: LatentDiffusion, share: float):
        vars(self).update(vars(base))
        nodes = self.recipe.rule(self.model.alphas_cumprod, lambda i, x: x).nodes
        rest = self.recipe.rule(refiner.alphas_cumprod, lambda i, x: x, share).nodes
        self.share, self.stop = share, len(nodes) - len(rest)
        if self.stop < 1 or abs(nodes[self.stop].abar - rest[0].abar) > 1e-6:
            raise ValueError(
                f"share {share:g}: a run of {self.recipe.sampler} can't go on there with another model; expected "
                f"another sampler, or fewer steps of the refiner"
            )
        self.refiner = copy(base)
        vars(self.refiner).pop("unit", None)  # the base model's
        self.refiner.model, self.refiner.first = refiner, self.stop
        self.plan, self.refiner.plan = with_key(self.plan, self.stop), plan_after(self.plan, self.stop)

    def with_plan(self, plan: Plan) -> Refined:
        other = super().with_plan(with_key(plan, self.stop))
        other.refiner = self.refiner.with_plan(plan_after(plan, self.stop))
        return other

    def pack(self) -> None:
        super().pack()
        self.refiner.pack()

    def sampling_bytes(self, images: int) -> int:
        return max(super().sampling_bytes(images), self.refiner.sampling_bytes(images))

    def decoder_bytes(self, batch: int) -> int:
        return max(super().decoder_bytes(batch), self.refiner.decoder_bytes(batch))

    def shared_bytes(self) -> int:
        return max(super().shared_bytes(), self.refiner.shared_bytes())

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"refiner_share": self.share}

    def _run(
        self,
        items: Sequence[Item],
        network: ConditionedNetwork | None = None,
        on_node: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, Ran]:
        latents, ran = super()._run(items, network, on_node)
        refiner = copy(self.refiner)
        refiner.task = replace(refiner.task, start=HandedOver(latents, self.share))
        latents, after = refiner._run(items, on_node=on_node)
        return latents, ran._replace(after=after)

    def _cost(self, runs: Sequence[Ran]) -> Cost:
        base, after = super()._cost(runs), self.refiner._cost([run.after for run in runs])
        return Cost(base.macs + after.macs, base.critical + after.critical)
