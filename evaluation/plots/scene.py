"""What every figure begins with: a model, what it is to picture, and runs of it in any way."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ldm.cli.arguments import EMOJI64
from ldm.cli.inputs import prompts_in
from ldm.cli.settings import CPU_POSITIONS, run_facts, uses_autocast
from ldm.cli.setup import Setup, make_setup
from ldm.io.errors import BadInput, blame
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import AnyPlan
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.sampling.conditions import Classes, Condition, Text
from ldm.sampling.engine import Engine, Recipe, Task, num_nodes, usual_scale
from ldm.sampling.generate import Item, subject_items

BATCH = 8  # pictures at a time


@dataclass(frozen=True)
class Scene:
    """A model with the pictures that a figure is about.

    setup:    the model's files and sizes.
    averaged: which weights of the UNet, see `load_model`.
    autocast: run the networks in the device's lower precision.
    prompts:  the file of the texts.
    count:    pictures, one of each of the first prompts (or of classes spread over all of them).
    seed:     of their noise.
    scale:    guidance scale; None = the model's default.
    """

    setup: Setup
    averaged: str
    autocast: bool
    prompts: str
    count: int
    seed: int
    scale: float | None

    @staticmethod
    def of(args: argparse.Namespace) -> Scene:
        setup = make_setup(args, EMOJI64)
        return Scene(
            setup, args.weights, uses_autocast(args, setup.device), args.prompts, args.count, args.seed, args.scale
        )

    @cached_property
    def model(self) -> LatentDiffusion:
        """Loaded when it is first needed."""
        return self.setup.load(self.averaged)

    @cached_property
    def facts(self) -> RunFacts:
        """Of any run. Kept, because the digest of large weights takes a while."""
        return run_facts(self.setup, "ddim")

    @cached_property
    def classes(self) -> int | None:
        """How many classes a class-conditional model knows."""
        conditioner = self.model.cond_stage_model
        return conditioner.n_classes if isinstance(conditioner, ClassEmbedder) else None

    @cached_property
    def items(self) -> list[Item]:
        if self.model.model.conditioning_key is None:
            return subject_items([{}], self.count, self.seed)
        if self.classes:
            if self.count > self.classes:
                raise BadInput(f"--count: this model has {self.classes} classes; got {self.count}")
            step = max(1, self.classes // self.count)
            return subject_items([{"class": k * step} for k in range(self.count)], 1, self.seed, by_position=True)
        prompts = prompts_in(self.prompts, "--prompts")
        if len(prompts) < self.count:
            raise BadInput(f"--count: {self.prompts} has {len(prompts)} prompts; got {self.count}")
        return subject_items([{"prompt": prompt} for prompt in prompts[: self.count]], 1, self.seed, by_position=True)

    @cached_property
    def task(self) -> Task:
        if self.model.model.conditioning_key is None:
            return Task(Condition())
        # As the published class-conditional models have it: the last of 1001 classes stands for none.
        return Task(Classes(self.classes - 1 if self.classes == 1001 else None) if self.classes else Text())

    @cached_property
    def guidance(self) -> float:
        if self.scale is not None:
            return self.scale
        if self.model.model.conditioning_key is None or (self.classes and self.classes != 1001):
            return 1.0
        return float(usual_scale(self.setup.config))

    def plan(self, spec: str, sampler: str, steps: int, propagate: str | None = None) -> AnyPlan:
        """The plan of that name for a run; `propagate` as for `load_plan`.

        Raises:
            ValueError: see `load_plan` and `Recipe.rule`.
        """
        nodes = num_nodes(self._recipe(sampler, steps), self.setup.config.model.params.get("timesteps", 1000))
        positions = 2 * BATCH * self.setup.config.model.params["image_size"] ** 2
        most = nodes if self.setup.device.type != "cpu" else max(1, CPU_POSITIONS // positions)
        facts = replace(self.facts, facts={**self.facts.facts, "sampler": sampler})
        return load_plan(spec, nodes, most, propagate, facts)

    def plan_if_calibrated(self, spec: str, sampler: str, steps: int, propagate: str | None = None) -> AnyPlan | None:
        """The same; None for a plan that needs a calibration if the model has none for it."""
        try:
            return self.plan(spec, sampler, steps, propagate)
        except ValueError:
            if not spec.startswith("auto:"):
                raise
            return None

    def engine(
        self,
        sampler: str,
        steps: int,
        plan: str | AnyPlan = "off",
        noise_weight: float = 0.0,
        guidance_reuse: bool = False,
    ) -> Engine:
        """Ready to run the items.

        Raises:
            BadInput: no such solver or plan for so many steps, or the model does not take the items.
        """
        recipe = self._recipe(sampler, steps, noise_weight, guidance_reuse)
        with blame("--steps"):
            plan = self.plan(plan, sampler, steps) if isinstance(plan, str) else plan
        with blame("--config"):
            return Engine(self.model, self.setup.sizes, recipe, plan, self.task, self.autocast)

    def _recipe(self, sampler: str, steps: int, noise_weight: float = 0.0, guidance_reuse: bool = False) -> Recipe:
        side = self.setup.sizes.default
        return Recipe(
            side, side, sampler, steps, scale=self.guidance, guidance_reuse=guidance_reuse, noise_weight=noise_weight
        )

    def latents(self, engine: Engine) -> Tensor:
        """Of all items, (N, C, h, w)."""
        with blame("--ckpt"):
            return torch.cat([engine.latents(self.items[k : k + BATCH]) for k in range(0, self.count, BATCH)])

    def decode(self, engine: Engine, latents: Tensor) -> Tensor:
        """Latents to pictures in -1..1, (N, 3, H, W), on the CPU."""
        return torch.cat([engine.decode(part).float().clamp(-1, 1).cpu() for part in latents.split(BATCH)])

    def pictures(self, engine: Engine) -> Tensor:
        return self.decode(engine, self.latents(engine))

    @property
    def names(self) -> list[str]:
        """What each item is, for a label."""
        return [item.caption or f"sample {item.sample}" for item in self.items]

    def settings(self, pictured: bool = True) -> dict[str, Any]:
        """What a figure of this scene depends on, with its pictures or without any."""
        facts = {"model": self.setup.ckpt.parent.name, "weights": self.facts.facts["weights"]}
        return facts | ({"pictures": self.count, "seed": self.seed, "guidance": self.guidance} if pictured else {})


def in_words(settings: Mapping[str, Any]) -> str:
    """A scene's settings as the end of a caption."""
    text = f"Model {settings['model']}, weights {settings['weights']}"
    if "pictures" not in settings:
        return f"{text}."
    number = settings["pictures"]
    return f"{text}; {number} picture{'s' * (number != 1)}, seed {settings['seed']}, guidance {settings['guidance']:g}."


def uncalibrated(specs: Iterable[str]) -> str:
    """A remark for the caption on plans that there is no calibration for, see `Scene.plan_if_calibrated`."""
    names = ", ".join(dict.fromkeys(specs))
    return f" The model has no calibration for {names}, which are left out." if names else ""
