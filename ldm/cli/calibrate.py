"""Calibration of one model and sampler: which key timesteps, and which skip features between them, cost least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor
from tqdm import tqdm

from ldm.cli.arguments import EMOJI64
from ldm.cli.inputs import prompts_in
from ldm.cli.parser import check_outdir
from ldm.cli.settings import SamplingSettings, count_nodes, make_recipe, reuse_setting, run_facts
from ldm.cli.setup import ModelSettings, make_setup
from ldm.cli.tasks import text_task
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import atomic_write
from ldm.io.schema import parse
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.calibration import Calibration, measure
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import timesteps_of
from ldm.profiling.plan_table import spans
from ldm.sampling.engine import Engine, Recipe
from ldm.sampling.generate import Item, prompt_items

TRIED = ("hold", "linear", "quadratic")  # between the key timesteps that are found
TRIED_TOGETHER = 8  # most decoder steps in one batch of a trial


@dataclass(frozen=True)
class CalibrationSettings:
    """What is measured, and what is looked for.

    from_file: text file with prompts; n_samples: how many of them, from the first; seed: of the noise.
    keys: number of key timesteps; macs: in its place, the share of the plain run's MACs that they may cost.
    """

    from_file: str | Path
    n_samples: int = 8
    seed: int = 42
    keys: int = 9
    macs: float | None = None


@dataclass(frozen=True)
class Outcome:
    """The calibration of a sampler, the plan that was looked for, and what else was tried.

    errors: mean squared error of the latents, by what the decoder gets between key timesteps.
    file: where the calibration belongs.
    """

    calibration: Calibration
    plan: Plan
    errors: Mapping[str, float]
    file: Path

    @property
    def lines(self) -> str:
        """What was found, for the screen."""
        errors = ", ".join(f"{how} {error:.3g}" for how, error in self.errors.items())
        keys = f"key timesteps of {self.plan.num_nodes}: {spans(self.plan.keys)}"
        return f"{keys}\nmean squared error of the latents: {errors}"


def calibrate_model(
    model: ModelSettings, sampling: SamplingSettings, settings: CalibrationSettings, keep: bool
) -> Outcome:
    """Measure plain runs of a text-to-image model, and find the best plan.

    Args:
        keep: whether the calibration is to be kept, which is checked before the work.

    Raises:
        SettingError: a setting can't be used.
        BadInput: the calibration can't be written.
    """
    if sampling.eta:
        raise SettingError("eta", f"a calibration is of deterministic runs; expected 0, got {sampling.eta:g}")
    if sampling.guidance_reuse:
        raise SettingError(
            reuse_setting(sampling.guidance_reuse), "a calibration is of runs with guidance at every step; leave it out"
        )
    prompts = prompts_in(settings.from_file)[: settings.n_samples]
    items = prompt_items(prompts, 1, settings.seed, by_position=True)
    engine, facts = plain_engine(model, sampling)
    if keep:
        check_outdir(facts.calibrations, "--ckpt")
    how = {"prompts": len(prompts), "seed": settings.seed}
    with fault_of("ckpt", (ValueError,)):  # predictions that are not finite
        timesteps = timesteps_of(engine.plain_run(items[:1])[1].nodes)
        calibration = calibrate(engine, items, {**facts.facts, "timesteps": timesteps}, how)
    with fault_of("macs" if settings.macs else "keys"):
        plan = calibration.plan_within(settings.macs) if settings.macs else calibration.plan(settings.keys)
    with fault_of("ckpt", (ValueError,)):
        errors = try_propagations(engine, plan, items)
    best = min(errors, key=errors.get)
    file = facts.calibrations / name_of(engine.recipe)
    return Outcome(calibration.model_copy(update={"propagate": best}), replace(plan, propagate=best), errors, file)


def name_of(recipe: Recipe) -> str:
    """The file of a calibration of such runs; by its content, not by this name, it is known what it is good for."""
    interval = "" if recipe.guidance_interval is None else "-interval{:g}-{:g}".format(*recipe.guidance_interval)
    tome = f"-tome{recipe.tome:g}" if recipe.tome else ""
    return f"{recipe.solver_name}-{recipe.steps}-scale{recipe.scale:g}{interval}{tome}.json"


def plain_engine(model: ModelSettings, sampling: SamplingSettings) -> tuple[Engine, RunFacts]:
    """The model ready for plain runs of its usual size, and what its runs are known by."""
    setup = make_setup(model, EMOJI64)
    size = (setup.sizes.default,) * 2
    recipe = make_recipe(sampling, size, setup.config)
    plan = load_plan("off", count_nodes(recipe, setup))
    loaded = setup.load()
    with fault_of("config"):
        engine = Engine(loaded, setup.sizes, recipe, plan, text_task(setup, size))
    return engine, run_facts(setup, recipe.solver_name, recipe.facts())


def calibrate(
    engine: Engine, items: Sequence[Item], made_for: Mapping[str, Any], how: Mapping[str, Any]
) -> Calibration:
    """Measure image by image along plain runs; the tables are the means.

    Args:
        engine: with a plain plan.
        items: the images.
        made_for, how: see `Calibration`.

    Raises:
        ValueError: predictions that are not finite.
    """
    tables = [measure(*engine.plain_run([item])) for item in tqdm(items, desc="measuring", unit="image", disable=None)]
    eps, features = (
        [[float(f"{v:.4g}") for v in np.mean(rows, axis=0)] for rows in zip(*table, strict=True)]
        for table in zip(*tables, strict=True)
    )
    unit = engine.unit
    measured = {"num_nodes": engine.plan.num_nodes, "eps": eps, "features": features}
    return parse(
        Calibration, measured | {"encoder": unit.encode / unit.whole, "made_for": dict(made_for), "how": dict(how)}
    )


def try_propagations(engine: Engine, plan: Plan, items: Sequence[Item]) -> dict[str, float]:
    """Mean squared error of the final latents to the plain run's, for each kind of skip features between key timesteps.

    Args:
        engine: with a plain plan.
        plan: to be tried.

    Raises:
        ValueError: latents that are not finite.
    """
    errors = dict.fromkeys(TRIED, 0.0)
    for item in items:
        run = engine.plain_run([item])

        def final(candidate: Plan, run: tuple[Any, ...] = run) -> Tensor:
            model, rule, x = run
            *_, state = denoise(model, rule, replace(candidate, parallel=TRIED_TOGETHER), x)
            return state.x

        plain = final(engine.plan)
        for name in errors:
            errors[name] += float((final(replace(plan, propagate=name)) - plain).square().mean()) / len(items)
    return errors


def write_plan(path: str | Path, plan: Plan, calibration: Calibration) -> None:
    """Write a plan file of `ldm.models.diffusion.propagation.load`, with how it was made."""
    how = ", ".join(f"{name} {value}" for name, value in calibration.how.items())
    text = yaml.safe_dump(
        {
            "source": "scripts/calibrate_plan.py",
            "note": f"least total error for its number of key timesteps ({how})",
            "steps": {plan.num_nodes: [*plan.keys]},
            "propagate": plan.propagate,
            "made_for": calibration.made_for,
        },
        sort_keys=False,
        default_flow_style=None,
        width=100,
    )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
