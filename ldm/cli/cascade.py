"""The stages of DeepFloyd-IF in memory together: texts to the images of the last stage, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from ldm.cli import tasks
from ldm.cli.deepfloyd import (
    EncodedTexts,
    StageSettings,
    find_encoder,
    load_encoder,
    made_larger,
    of_stage,
    shapes,
    stage_setups,
    stage_task,
)
from ldm.cli.setup import CONSTRUCTION, Setup, check_memory, count_nodes, make_plan, make_recipe, with_fixed_batches
from ldm.io.errors import fault_of
from ldm.io.images import from_pil
from ldm.models.diffusion.propagation.load import RunFacts
from ldm.modules.encoders.t5 import T5States
from ldm.profiling.cost import timed
from ldm.sampling.engine import Engine
from ldm.sampling.generate import Item

SUMMED = ("seconds", "seconds_unet", "unet_macs")  # of what a batch cost, over the stages


class Cascade:
    """Makes the images of a batch of items, as an `Engine` does; the same that `ldm.cli.deepfloyd.make_cascade` makes
    stage by stage, of items with the same seeds.

    Args:
        settings: of the stages, of which the first is stage 1.
        setups, engines: by the number of the stage; the tasks of the engines are exchanged for each batch.
        encoder: T5; about: what images store of its texts.
    """

    def __init__(
        self,
        settings: StageSettings,
        setups: Mapping[int, Setup],
        engines: Mapping[int, Engine],
        encoder: T5States,
        about: Mapping[str, Any],
    ) -> None:
        self._settings, self._setups, self._engines = settings, setups, engines
        self._encoder, self._about = encoder, about
        self.device, self.autocast = encoder.encoder.device, any(engine.autocast for engine in engines.values())

    @property
    def parallel(self) -> int:
        """Most decoder steps in one batch of any stage."""
        return max(engine.parallel for engine in self._engines.values())

    def settings(self) -> dict[str, Any]:
        """What images depend on beside weights and item, as JSON values."""
        precision = "autocast" if self.autocast else "full"
        stages = {f"stage{number}": engine.settings() for number, engine in self._engines.items()}
        return stages | {"precision": precision, "cascade_seed": self._settings.seed}

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than T5 is given."""
        return self._encoder.cut(texts)

    def __call__(self, items: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
        """The items' images, and for each of them what it cost: the texts and all stages."""
        texts, encoding = timed(lambda: self._encoded([item.inputs["prompt"] for item in items]), self.device)
        made, images, runs = [replace(item, prompt_index=place) for place, item in enumerate(items)], [], []
        for number, engine in self._engines.items():
            small = (
                tasks.stacked((str(place), from_pil(image)) for place, image in enumerate(images)) if images else None
            )
            if images:
                made = [made_larger(self._settings, i, of.sample, of.inputs, of.seed) for i, of in enumerate(made)]
            task, _ = stage_task(self._settings, number, self._setups[number], texts, small)
            images, run = engine.with_task(task)(made)
            runs.append(run)
        total = {name: sum(run[name] for run in runs) for name in SUMMED}
        total |= {"parallel": max(run["parallel"] for run in runs), "seconds": total["seconds"] + encoding / len(items)}
        return images, runs[-1] | total

    @torch.inference_mode()
    def _encoded(self, texts: Sequence[str]) -> EncodedTexts:
        *states, negative = (
            self._encoder([text])[0].float().cpu() for text in (*texts, self._settings.negative_prompt)
        )
        return EncodedTexts(torch.stack(states), negative, self._about)


def load_cascade(settings: StageSettings, device: torch.device, batch: int) -> Cascade:
    """The stages and T5, ready to make `batch` images at a time.

    Raises:
        SettingError: a stage, T5, or how they are to sample, can't be used.
    """
    setups, (folder, about) = stage_setups(settings, device), find_encoder(settings)
    engines, below = {}, 0
    for number, setup in setups.items():
        with of_stage(number):
            engines[number] = stage_engine(settings, number, setup, below, about, batch)
        below = engines[number].recipe.height
    return Cascade(settings, setups, engines, load_encoder(folder, device), about)


def stage_engine(
    settings: StageSettings, number: int, setup: Setup, below: int, about: Mapping[str, Any], batch: int
) -> Engine:
    """A stage, loaded; `below`: pixels a side of the images of the stage before."""
    task, size = shapes(settings, number, setup, below, about)
    sampling = settings.sampling(number)
    recipe = make_recipe(sampling, size, setup.config)
    plan = make_plan(sampling, count_nodes(recipe, setup), RunFacts({"sampler": recipe.solver_name, **recipe.facts()}))
    model = setup.load()
    with fault_of("ckpt", CONSTRUCTION):
        engine = Engine(model, setup.sizes, recipe, plan, task, setup.autocast)
    check_memory(engine, batch, setup.device)
    engine.pack()
    return with_fixed_batches(engine, settings.parallel, batch)
