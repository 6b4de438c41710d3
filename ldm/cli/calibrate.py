"""Calibration of one model and sampler: which key timesteps cost least, by level and forecaster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from ldm.cli.arguments import EMOJI64
from ldm.cli.parser import check_outdir
from ldm.cli.settings import ModelSettings, SamplingSettings
from ldm.cli.setup import Setup, conditioner, count_nodes, make_recipe, make_setup, reuse_setting, run_facts
from ldm.cli.tasks import class_task, image_items, named_classes, prompts_in, text_task
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import atomic_write, parse
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.calibration import Calibration, measure
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import Forecast, Plan, plan_of_level
from ldm.models.diffusion.propagation.predict import Forecaster
from ldm.models.diffusion.propagation.search import Keys, NodeErrors, best_keys, exchange
from ldm.models.diffusion.schedule import Node, timesteps_of
from ldm.modules.encoders.modules import ClassEmbedder, ClassLabels
from ldm.profiling.cost import Macs
from ldm.profiling.plan_table import spans
from ldm.sampling.engine import Engine, Recipe, Task
from ldm.sampling.generate import Item

# Forecasters that are tried, by level, unless others are asked for.
TRIED: Mapping[str, Sequence[str]] = {
    "encoder": ("quadratic", "linear", "hold"),
    "deepcache": ("quadratic", "linear", "hold"),
    "skip": ("quadratic:logsnr:eps", "quadratic:timestep:eps"),
}
UNMEASURED = ("zeros", "chebyshev", "spectrum")
BATCH = 4  # images of a trial at a time
TRIED_TOGETHER = 8  # most decoder steps in one batch of a trial


@dataclass(frozen=True)
class CalibrationSettings:
    """What is measured, and what is looked for.

    from_file: text file with prompts; not read for a class-conditional model.
    n_samples: how many of the prompts, from the first, or how many classes; seed: of the noise.
    level: those whose key timesteps are searched on with whole runs; keys: how many; macs: in their place, the share of
        the plain run's MACs that they may cost.
    forecast: the forecasters to try there; None = TRIED.
    """

    from_file: str | Path
    n_samples: int = 8
    seed: int = 42
    level: Sequence[str] = ("encoder",)
    keys: Sequence[int] = (9,)
    macs: float | None = None
    forecast: Sequence[str] | None = None

    def tried(self) -> Mapping[str, Sequence[str]]:
        """The forecasters to try, by level.

        Raises:
            ValueError: a forecaster whose errors are not measured.
        """
        if self.forecast is None:
            return TRIED
        for level, name in product(self.level, self.forecast):
            forecast = Forecast.parse(name)
            if forecast.name in UNMEASURED or forecast.quantity != ("eps" if level == "skip" else ""):
                form = "NAME[:AXIS]:eps" if level == "skip" else "NAME[:AXIS]"
                raise ValueError(
                    f"key timesteps of {level} can be found for forecasters {form} but {', '.join(UNMEASURED)}, whose "
                    f"weights do not sum to 1; got {name}"
                )
        return {**TRIED, **dict.fromkeys(self.level, self.forecast)}


@dataclass(frozen=True)
class SearchResult:
    """What the search came to for one level and one number of key timesteps.

    error: of the latents of whole runs, as in `Choice`; began: that of each plan that it could begin from.
    """

    plan: Plan
    level: str
    error: float
    began: Mapping[str, float]

    def __str__(self) -> str:
        began = ", ".join(f"{how} {error:.3g}" for how, error in self.began.items())
        return (
            f"{self.level}, {self.plan.propagate}: key timesteps {spans(self.plan.keys)} of {self.plan.num_nodes}\n"
            f"mean squared error of the latents: {self.error:.3g}; before the exchange: {began}"
        )


@dataclass(frozen=True)
class Outcome:
    """The calibration of a sampler, the plans that were looked for, and where the calibration belongs."""

    calibration: Calibration
    found: Sequence[SearchResult]
    file: Path


def calibrate_model(
    model: ModelSettings, sampling: SamplingSettings, settings: CalibrationSettings, keep: bool
) -> Outcome:
    """Measure plain runs of a model of texts or of classes, and find the best plans.

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
    setup = make_setup(model, EMOJI64)
    subjects, task = measured(setup, sampling, settings)
    items = image_items(subjects, 1, settings.seed, by_position=True)
    engine, facts = plain_engine(setup, sampling, task)
    if keep:
        check_outdir(facts.calibrations, "--ckpt")
    with fault_of("forecast"):
        tried = settings.tried()
    with fault_of("keys"):
        check_counts(settings.keys if settings.macs is None else (), engine.plan.num_nodes)
    check_levels(settings.level, engine)
    tried = {level: names for level, names in tried.items() if level != "deepcache" or has_outer_blocks(engine)}
    tried, left_out = usable(tried, engine.plain_run(items[:1])[1].nodes)
    if left_out:
        print(f"left out, because the log-SNR of a step is infinite: {', '.join(left_out)}")
    how = {"prompts" if "prompt" in subjects[0] else "classes": len(subjects), "seed": settings.seed}
    with fault_of("ckpt", (ValueError,)):  # predictions that are not finite
        calibration = calibrate(engine, items, tried, facts.facts, how)
        trial = Trial(engine, items)
        found = []
        for level in settings.level:
            with fault_of("macs"):
                counts = counts_of(settings, calibration, level)
            for count in counts:
                with fault_of("forecast"):
                    found.append(search(trial, calibration, level, count))
                calibration = with_found(calibration, found[-1])
    return Outcome(calibration, found, facts.calibrations / name_of(engine.recipe))


def has_outer_blocks(engine: Engine) -> bool:
    """Whether there are blocks of the network that deepcache could run alone; a transformer has none."""
    return len(engine.model.model.diffusion_model.output_blocks) > 0


def check_levels(levels: Sequence[str], engine: Engine) -> None:
    """Raise SettingError for a level that the network does not have."""
    if "deepcache" in levels and not has_outer_blocks(engine):
        raise SettingError(
            "level", "deepcache needs outermost blocks, which this network has not; expected encoder, skip"
        )


def counts_of(settings: CalibrationSettings, calibration: Calibration, level: str) -> Sequence[int]:
    """How many key timesteps are looked for. Raises ValueError: a share of MACs that no number of them has."""
    if settings.macs is None:
        return settings.keys
    return [len(calibration.plan_within(settings.macs, level).keys)]


def usable(tried: Mapping[str, Sequence[str]], nodes: Sequence[Node]) -> tuple[dict[str, list[str]], list[str]]:
    """The forecasters, by level, whose time is finite at all of these nodes; and the names of the others."""

    def finite(name: str) -> bool:
        return Forecast.parse(name).axis != "logsnr" or all(0 < node.abar < 1 for node in nodes)

    kept = {level: [*filter(finite, names)] for level, names in tried.items()}
    return kept, [name for names in tried.values() for name in names if not finite(name)]


def check_counts(counts: Sequence[int], nodes: int) -> None:
    """Raise ValueError for a number of key timesteps that a run of so many nodes can't have."""
    for count in counts:
        if count > nodes:
            raise ValueError(f"keys must be 1..{nodes}, the nodes of this run; got {count}")


def name_of(recipe: Recipe) -> str:
    """The file of a calibration of such runs; by its content, not by this name, it is known what it is good for."""
    interval = "" if recipe.guidance_interval is None else "-interval{:g}-{:g}".format(*recipe.guidance_interval)
    tome = f"-tome{recipe.tome:g}" if recipe.tome else ""
    return f"{recipe.solver_name}-{recipe.steps}-scale{recipe.scale:g}{interval}{tome}.json"


def measured(
    setup: Setup, sampling: SamplingSettings, settings: CalibrationSettings
) -> tuple[list[dict[str, Any]], Task]:
    """What is measured: the first prompts of the file; of a class-conditional model classes evenly spread."""
    if isinstance(conditioner(setup), ClassEmbedder | ClassLabels):
        known = named_classes(setup)
        classes = [known[k * len(known) // settings.n_samples] for k in range(settings.n_samples)]
        return class_task(setup, classes, make_recipe(sampling, (1, 1), setup.config).scale != 1.0)
    prompts = prompts_in(settings.from_file)[: settings.n_samples]
    return [{"prompt": prompt} for prompt in prompts], text_task(setup, (setup.sizes.default,) * 2)


def plain_engine(setup: Setup, sampling: SamplingSettings, task: Task) -> tuple[Engine, RunFacts]:
    """The model ready for plain runs of its usual size, and what its runs are known by."""
    size = (setup.sizes.default,) * 2
    recipe = make_recipe(sampling, size, setup.config)
    plan = load_plan("off", count_nodes(recipe, setup))
    loaded = setup.load()
    with fault_of("config"):
        engine = Engine(loaded, setup.sizes, recipe, plan, task)
    engine.pack()
    return engine, run_facts(setup, recipe.solver_name, recipe.facts())


def calibrate(
    engine: Engine,
    items: Sequence[Item],
    tried: Mapping[str, Sequence[str]],
    made_for: Mapping[str, Any],
    how: Mapping[str, Any],
) -> Calibration:
    """Measure image by image along plain runs, and find the key timesteps for every level and number of them.

    Args:
        engine: with a plain plan.
        items: the images.
        tried: forecasters by level.
        made_for, how: see `Calibration`; the timesteps are added.

    Raises:
        ValueError: predictions that are not finite.
    """
    images = [
        measure(*engine.plain_run([item]), [*tried])
        for item in tqdm(items, desc="measuring", unit="image", disable=None)
    ]
    nodes = engine.plain_run(items[:1])[1].nodes
    choices = []
    for level, names in tried.items():
        products = [sum(same) / len(items) for same in zip(*(image[level] for image in images), strict=True)]
        for name in names:
            errors = NodeErrors(products, Forecaster.of(Forecast.parse(name), nodes))
            keys = [[*found] for found in best_keys(errors, len(nodes), errors.keep)]
            choices.append({"level": level, "propagate": name, "keys": keys})
    return parse(
        Calibration,
        {
            "num_nodes": len(nodes),
            "rest": {level: rest_of(engine.unit, level) for level in tried},
            "choices": choices,
            "made_for": {**made_for, "timesteps": timesteps_of(nodes)},
            "how": dict(how),
        },
    )


def rest_of(unit: Macs, level: str) -> float:
    """What a node costs that is no key node, as a share of a whole prediction."""
    at = {"encoder": lambda: unit.decode, "deepcache": lambda: unit.outer[1] + unit.last[1], "skip": lambda: 0}
    return at[level]() / unit.whole


class Trial:
    """Whole runs of some images: how far a plan's latents are from those of plain runs.

    Args:
        engine: with a plain plan.
    """

    def __init__(self, engine: Engine, items: Sequence[Item]) -> None:
        self.runs = [engine.plain_run(items[k : k + BATCH]) for k in range(0, len(items), BATCH)]
        self.plain = [self._final(run, engine.plan) for run in self.runs]

    def error(self, plan: Plan) -> float:
        """Mean squared error of the final latents. Raises ValueError: they are not finite."""
        errors = [
            (self._final(run, plan) - plain).square().flatten(1).mean(1)
            for run, plain in zip(self.runs, self.plain, strict=True)
        ]
        return float(torch.cat(errors).mean())

    @staticmethod
    def _final(run: tuple[Any, ...], plan: Plan) -> Tensor:
        model, rule, x = run
        *_, state = denoise(model, rule, replace(plan, parallel=TRIED_TOGETHER), x)
        return state.x


def search(trial: Trial, calibration: Calibration, level: str, count: int) -> SearchResult:
    """From what does best in whole runs, the calibration's key timesteps for some forecaster or even ones, by exchange.

    The dynamic program adds up errors of single steps; whole runs can disagree, most where there are few key timesteps.
    """
    nodes = calibration.num_nodes
    tried = [choice.propagate for choice in calibration.choices if choice.level == level]
    if not tried:
        raise ValueError(f"no forecaster is left to try for {level}; expected one along the timestep or the step")
    plans = {name: calibration.plan(count, level, name) for name in tried}
    plans |= {f"{name}, even": plan_of_level(nodes, even(nodes, count), level, propagate=name) for name in tried}
    began = {name: trial.error(plan) for name, plan in plans.items()}
    best = plans[min(began, key=began.get)]
    at = partial(plan_of_level, nodes, level=level, propagate=best.propagate)
    with tqdm(desc=f"{level}, {count} key timesteps", unit="trial", disable=None) as progress:

        def error_of(keys: Keys) -> float:
            progress.update()
            return trial.error(at(keys))

        keys, error = exchange(best.keys, nodes, error_of)
    return SearchResult(at(keys), level, error, began)


def even(nodes: int, count: int) -> Keys:
    """So many key nodes: every n-th, with n as small as they reach, and what is left over at the end of the run."""
    every = range(0, nodes, -(-nodes // count))
    others = [i for i in reversed(range(nodes)) if i not in every]
    return tuple(sorted((*every, *others[: count - len(every)])))


def with_found(calibration: Calibration, found: SearchResult) -> Calibration:
    """The calibration with what a search came to."""
    old = calibration.choice(found.level, found.plan.propagate)
    keys = [*old.keys]
    keys[len(found.plan.keys) - 1] = [*found.plan.keys]
    errors = {**old.errors, str(len(found.plan.keys)): float(f"{found.error:.4g}")}
    new = old.model_copy(update={"keys": keys, "errors": errors})
    return calibration.model_copy(update={"choices": [new if c is old else c for c in calibration.choices]})


def write_plan(path: str | Path, found: SearchResult, calibration: Calibration) -> None:
    """Write a plan file of `ldm.models.diffusion.propagation.load`, with how it was made."""
    how = ", ".join(f"{name} {value}" for name, value in calibration.how.items())
    text = yaml.safe_dump(
        {
            "source": "scripts/calibrate_plan.py",
            "note": f"mean squared error of the latents {found.error:.3g} ({how})",
            "steps": {found.plan.num_nodes: [*found.plan.keys]},
            "level": found.level,
            "propagate": found.plan.propagate,
            "made_for": calibration.made_for,
        },
        sort_keys=False,
        default_flow_style=None,
        width=100,
    )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")
