"""`--list-plans`: the named plans with what each would cost a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from ldm.models.diffusion.propagation.load import FORMS, RunFacts, load_plan, plan_names
from ldm.models.diffusion.propagation.plan import AXES, GRAMMAR, METHODS, QUANTITIES, AnyPlan, Compute
from ldm.profiling.cost import Kept, Macs

RULES = (
    "off",
    "uniform:2",
    "uniform:4",
    "pro",
    "deepcache:3",
    "deepcache:5",
    "skip:2",
    "skip:3",
    "skip:6",
    "tgate:10",
    "tgate:25",
)


def spans(nodes: Sequence[int]) -> str:
    """Increasing numbers with runs of three or more as a-b: 0-3,5,10."""
    parts = []
    for _, run in groupby(enumerate(nodes), key=lambda pair: pair[1] - pair[0]):
        run = [node for _, node in run]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return ",".join(parts)


def plan_table(
    unit: Macs, kept: Kept, nodes: int, images: int = 1, run: RunFacts | None = None, control: bool = False
) -> Iterator[str]:
    """Lines of a table: plan, MACs and critical path as a share of the plain run's, what is kept beyond it, what is
    between, key timesteps. Plans that the network can't follow have no line: with blocks that run alone, for a
    transformer.

    Args:
        unit, kept: of one prediction.
        nodes: of the run.
        images: how often each node predicts for one image, 2 with guidance.
        run: see `load_plan`.
        control: control networks run at every step; plans that this does not go with have no line.
    """
    plain = unit.plain(nodes)
    costs = f"{'MACs':>7}{'critical path':>15}{'MB more':>9}"
    yield f"{'plan':<24}{costs}  {'between key timesteps':<32}key timesteps of {nodes}"
    plans = {name: load_plan(name, nodes, run=run) for name in (*RULES, *plan_names())}
    for name, plan in plans.items():
        plan = with_control(plan) if control else plan
        if plan is None or not runs_on(unit, plan):
            continue
        each = [1 if compute is Compute.GATED else images for compute in plan.computes()]
        macs, critical = (cost(plan, images=each) / (images * plain) for cost in (unit.run, unit.critical_path))
        yield (
            f"{name:<24}{macs:>7.1%}{critical:>15.1%}"
            f"{kept.added(plan, images) / 1e6:>9.2f}  {between(plan):<32}"
            f"{spans(plan.keys)}"
        )
    yield (
        f"100 % = {images * plain / 1e9:.2f} GMAC of the UNet for one image; critical path: what must be "
        f"computed one after the other when decoders that share features run at the same time; MB more: what is kept "
        f"from step to step beyond the plain run, for one image, without batches of decoders"
    )
    yield f"forms: {', '.join(FORMS)}; KEYS: a name, N for uniform:N, uniform:N, pro, numbers as 0,3,8, or a file"
    yield f"--forecast {GRAMMAR}: {', '.join(METHODS)}; {', '.join(AXES)}; with skip {', '.join(QUANTITIES)}"


def runs_on(unit: Macs, plan: AnyPlan) -> bool:
    """Whether the network has the blocks, and the cross-attention, that the plan asks for."""
    return max(plan.branch, plan.refresh) < len(unit.outer) and not (
        Compute.GATED in plan.levels and unit.gated is None
    )


def with_control(plan: AnyPlan) -> AnyPlan | None:
    """The plan with control networks at every step; None = it does not go with that."""
    try:
        return replace(plan, control=True)
    except ValueError:
        return None


def between(plan: AnyPlan) -> str:
    """What runs at nodes that are no key nodes, and how the rest is forecast: `decoder, hold`."""
    kinds = {
        Compute.DECODER: "decoder",
        Compute.SHALLOW: f"{plan.branch} outer",
        Compute.SKIPPED: "nothing",
        Compute.GATED: "no cross-attention",
    }
    levels = [name for kind, name in kinds.items() if kind in plan.levels]
    return ", ".join([*levels, plan.propagate] if levels else ["-"])
