"""What every figure starts from: a model, the images to sample with it, and runs of it by any method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

from evaluation.plots.drawing import STYLE
from ldm.checkpoint import fingerprint
from ldm.cli.neighbours import RetrievalSettings, Retrieved, retrieve
from ldm.cli.setup import CPU_POSITIONS, Setup, run_facts
from ldm.cli.tasks import absent_class
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.loop import NonFiniteLatents
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.modules.encoders.modules import ClassEmbedder, ClassLabels
from ldm.sampling.engine import Engine, Recipe, Task, num_nodes, usual_scale
from ldm.sampling.generate import Item, make_items
from ldm.sampling.task import Condition, class_condition, text_for

BATCH = 8  # images per batch
RETRIEVAL = {"database": "databases", "clip_type": "config"}  # what the settings of a retrieval are called here
CALIBRATED = re.compile(r"(\w+:)?auto:")  # plans that need a calibration


@dataclass(frozen=True)
class Experiment:
    """A model and the images that a figure samples with it."""

    setup: Setup  # the model's files and sizes, and how it runs
    prompts: Sequence[str]  # texts; models without a text encoder sample classes, or without a condition
    count: int  # of images: one for each of the first prompts, or for classes spread evenly over all classes
    seed: int  # of their noise
    scale: float | None  # of the guidance; None = the model's default

    @cached_property
    def model(self) -> LatentDiffusion:
        """The model; it is loaded when it is first needed."""
        return self.setup.load()

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is built and computes, beside its weights: what kept images depend on, as JSON values."""
        return {
            "config": fingerprint(self.setup.config_path)[:16],
            "averaged": self.setup.weights,
            "precision": "autocast" if self.setup.autocast else "full",
        }

    @property
    def timesteps(self) -> int:
        """How many timesteps the model was trained with."""
        return self.setup.config.model.params.get("timesteps", 1000)

    @cached_property
    def facts(self) -> RunFacts:
        """What plans may have been calibrated for; cached, because hashing large weights takes a while."""
        return run_facts(self.setup, "ddim")

    @cached_property
    def classes(self) -> int | None:
        """Number of classes of a class-conditional model."""
        conditioner = self.model.cond_stage_model
        return conditioner.n_classes if isinstance(conditioner, ClassEmbedder | ClassLabels) else None

    @cached_property
    def items(self) -> list[Item]:
        """The images to sample. Raises SettingError: `count`: more images than there are prompts or classes."""
        if self.model.model.conditioning_key is None:
            return make_items([{}], self.count, self.seed)
        if self.classes:
            if self.count > self.classes:
                raise SettingError("count", f"this model has {self.classes} classes; got {self.count}")
            step = max(1, self.classes // self.count)
            return make_items([{"class": k * step} for k in range(self.count)], 1, self.seed, by_position=True)
        if len(self.prompts) < self.count:
            raise SettingError("count", f"there are {len(self.prompts)} prompts; got {self.count}")
        inputs = [{"prompt": prompt} for prompt in self.prompts[: self.count]]
        return make_items(inputs, 1, self.seed, by_position=True)

    @cached_property
    def task(self) -> Task:
        """The kind of conditioning that the model takes."""
        if self.model.model.conditioning_key is None:
            return Task(Condition())
        if isinstance(self.model.cond_stage_model, nn.Identity | nn.Flatten):  # retrieval-augmented: the texts alone
            return self.retrieved(RetrievalSettings()).task
        if not self.classes:
            return Task(text_for(self.model, (self.setup.sizes.default,) * 2))
        return Task(class_condition(self.model.cond_stage_model, absent_class(self.setup, self.classes)))

    def retrieved(self, settings: RetrievalSettings) -> Retrieved:
        """What a retrieval-augmented model makes the items of.
        Raises SettingError: `databases`, `knn` or `config` (its embedder) can't be used."""
        try:
            return retrieve(self.setup, self.items, [], settings)
        except SettingError as error:
            raise error.moved(RETRIEVAL.get(error.setting, error.setting)) from error

    @cached_property
    def guidance(self) -> float:
        """The guidance scale; 1 = no guidance."""
        if self.scale is not None:
            return self.scale
        if self.model.model.conditioning_key is None:
            return 1.0
        if self.classes and absent_class(self.setup, self.classes) is None:
            return 1.0
        return float(usual_scale(self.setup.config))

    def recipe(self, sampler: str, steps: int, **fields: Any) -> Recipe:
        """How the items are sampled; `fields`: others of `Recipe`."""
        side = self.setup.sizes.default
        return Recipe(side, side, sampler, steps, scale=self.guidance, **fields)

    def plan(
        self,
        spec: str,
        sampler: str,
        steps: int,
        propagate: str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
    ) -> AnyPlan:
        """The plan of that name for a run; `propagate` as for `load_plan`.
        Raises ValueError: see `load_plan` and `Recipe.rule`."""
        recipe = self.recipe(sampler, steps, spacing=spacing, eta=eta)
        nodes = num_nodes(recipe, self.timesteps)
        positions = 2 * BATCH * self.setup.config.model.params["image_size"] ** 2
        parallel = nodes if self.setup.device.type != "cpu" else max(1, CPU_POSITIONS // positions)
        facts = replace(self.facts, facts={**self.facts.facts, "sampler": recipe.solver_name, **recipe.facts()})
        return load_plan(spec, nodes, parallel, propagate, facts)

    def plans(self, wanted: Mapping[Any, tuple[Any, ...]]) -> tuple[dict[Any, AnyPlan], str]:
        """The plans that some things want, by arguments of `plan`; and a sentence for the caption about those that need
        a calibration which the model does not have, and are left out."""
        found, missing = {}, {}
        for key, (spec, *how) in wanted.items():
            try:
                found[key] = self.plan(spec, *how)
            except ValueError:
                if not CALIBRATED.match(spec):
                    raise
                missing[spec] = None
        remark = f" The model has no calibration for {', '.join(missing)}, which are left out." if missing else ""
        return found, remark

    def engine(
        self,
        sampler: str,
        steps: int,
        plan: str | AnyPlan = "off",
        noise_weight: float = 0.0,
        task: Task | None = None,
        **fields: Any,
    ) -> Engine:
        """An engine that samples items by this method; `task`: another than theirs; `fields`: others of `Recipe`.

        Raises SettingError: `steps`: no such sampler, or plan for so many steps; `config`: the model does not take
        the items' conditioning."""
        recipe = self.recipe(sampler, steps, noise_weight=noise_weight, **fields)
        with fault_of("steps"):
            if isinstance(plan, str):
                plan = self.plan(plan, sampler, steps, spacing=recipe.spacing, eta=recipe.eta)
        with fault_of("config"):
            return Engine(self.model, self.setup.sizes, recipe, plan, task or self.task, self.setup.autocast)

    def latents(self, engine: Engine, items: Sequence[Item] | None = None) -> Tensor:
        """The sampled latents of all items, or of others, (N, C, h, w)."""
        items = self.items if items is None else items
        with fault_of("ckpt"):
            return torch.cat([engine.latents(items[k : k + BATCH]) for k in range(0, len(items), BATCH)])

    def decode(self, engine: Engine, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> images (N, 3, H, W) in [-1, 1], on the CPU."""
        return torch.cat([engine.decode(part).float().clamp(-1, 1).cpu() for part in latents.split(BATCH)])

    def images(self, engine: Engine, items: Sequence[Item] | None = None) -> Tensor:
        """The sampled images of all items, or of others, (N, 3, H, W) in [-1, 1]."""
        return self.decode(engine, self.latents(engine, items))

    @property
    def labels(self) -> list[str]:
        """A caption for each item."""
        return [item.caption or f"sample {item.sample}" for item in self.items]

    def settings(self, sampled: bool = True) -> dict[str, Any]:
        """What a figure depends on, as JSON values; `sampled`: images were sampled for it."""
        facts = {"model": self.setup.ckpt.parent.name, "weights": self.facts.facts["weights"]}
        return facts | ({"images": self.count, "seed": self.seed, "guidance": self.guidance} if sampled else {})

    def caption(self, sampled: bool = True) -> str:
        """The end of a figure's caption: its settings in words."""
        text = f"Model {self.setup.ckpt.parent.name}, weights {self.facts.facts['weights']}"
        images = f"{self.count} image{'s' * (self.count != 1)}"
        how = f"; {images}, seed {self.seed}, guidance scale {self.guidance:g}"
        return f"{text}{how if sampled else ''}."


def make_figure(kind: str, module: str, experiment: Experiment, out: Path, options: Mapping[str, Any]) -> list[str]:
    """Draw a figure with `draw_KIND` of a module of evaluation.plots, which gets the options, and save it in the folder
    as KIND.svg, KIND.png and KIND.json; returns the files' names.

    Raises SettingError: an option or a setting of the experiment can't be used; or the files can't be written (`out`).
    """
    draw = getattr(import_module(f"evaluation.plots.{module}"), f"draw_{kind.replace('-', '_')}")
    with matplotlib.rc_context(STYLE):
        with fault_of("ckpt", (NonFiniteLatents,)):
            drawing = draw(experiment, **options)
        with fault_of("out", (OSError,)):
            return drawing.save(out / kind, experiment.caption(drawing.sampled), experiment.settings(drawing.sampled))
