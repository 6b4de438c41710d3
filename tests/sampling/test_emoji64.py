"""Laws on the trained model that ships."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ldm.checkpoint import fingerprint, load_config, load_model, read_checkpoint
from ldm.io.images import from_pil, open_image
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes
from ldm.sampling.generate import prompt_items
from ldm.sampling.prompt_to_prompt import Inverted
from ldm.sampling.task import Start, Text, mean_latents
from tests.helpers.paths import ROOT

MODEL = ROOT / "models" / "ldm" / "emoji64"
PROMPTS = ["a red heart, noto style", "a dog face, twemoji style", "a slice of pizza, openmoji style"]
RECIPE = Recipe(64, 64, steps=12, scale=4.0, noise_weight=0.003)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL / "config.yaml", MODEL / "model.safetensors")


def sampled_images(
    model, recipe: Recipe = RECIPE, spec: str = "faster-diffusion", parallel: int = 1, chosen: slice = slice(None)
) -> torch.Tensor:
    """The decoded images of some of the prompts, (B, 3, 64, 64)."""
    sizes = Sizes.of(load_config(MODEL / "config.yaml").model)
    maker = Engine(model, sizes, recipe, load_plan(spec, num_nodes(recipe), parallel), Task(Text()))
    return maker.decode(maker.latents(prompt_items(PROMPTS, 1, seed=0)[chosen]))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_image_does_not_depend_on_its_batch(model, eta):
    recipe = replace(RECIPE, eta=eta)
    together = sampled_images(model, recipe)
    for i in range(len(PROMPTS)):
        alone = sampled_images(model, recipe, chosen=slice(i, i + 1))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize("parallel", [2, 12])
def test_parallel_decoding_does_not_change_a_image(model, parallel):
    torch.testing.assert_close(sampled_images(model, parallel=parallel), sampled_images(model), rtol=0, atol=1e-4)


def test_propagation_changes_a_image_and_every_node_a_key_does_not(model):
    plain = sampled_images(model, spec="off")
    torch.testing.assert_close(sampled_images(model, spec="uniform:1"), plain, rtol=0, atol=0)
    assert (sampled_images(model) - plain).abs().max() > 1e-3


def test_an_image_is_found_again_from_its_noise(model):
    """By the noise that DDIM inverts it to, and not by other noise."""
    image, prompt = from_pil(open_image(ROOT / "docs/examples/inpaint/face.png")), "a face, noto style"
    item = prompt_items([prompt], 1, seed=0)
    wanted = model.decode_first_stage(mean_latents(model, image[None]))
    for start, expected in ((Inverted(image, prompt, 10), True), (Start(), False)):
        maker = engine(model, Recipe(64, 64, steps=10, scale=1.0), load_plan("off", 10))
        maker.task = Task(Text(), start)
        found = maker.decode(maker.latents(item))
        assert ((found - wanted).square().mean().sqrt() < 0.1) == expected


def engine(model, recipe: Recipe, plan) -> Engine:
    return Engine(model, Sizes.of(load_config(MODEL / "config.yaml").model), recipe, plan, Task(Text()))


def test_extrapolation_beats_holding_at_every_level(model):
    """By three tenths of the squared distance from the plain run, at 12 steps; docs/benchmark.md has 50."""
    recipe = replace(RECIPE, scale=2.0, noise_weight=0.0)
    nodes, items = num_nodes(recipe), prompt_items(PROMPTS[:1], 1, seed=0)
    plain = engine(model, recipe, load_plan("off", nodes)).latents(items)
    for spec, forecasters in {
        "uniform:2": ("hold", "linear"),
        "deepcache:2": ("hold", "linear"),
        "skip:2": ("hold", "hold:eps", "linear:logsnr:eps"),
    }.items():
        errors = [
            float((engine(model, recipe, load_plan(spec, nodes, 12, how)).latents(items) - plain).square().mean())
            for how in forecasters
        ]
        assert all(b < 0.7 * a for a, b in pairwise(errors)), (spec, errors)


def test_an_image_says_the_error_of_its_forecasts(model):
    recipe = replace(RECIPE, steps=5, scale=2.0, noise_weight=0.0)
    items = prompt_items(PROMPTS[:1], 1, seed=0)
    free = engine(model, recipe, BudgetPlan(load_plan("skip:2", 5), 1e9))(items)[1]
    bound = engine(model, recipe, BudgetPlan(load_plan("skip:2", 5), free["forecast_error"] / 2))(items)[1]
    assert 0 <= bound["forecast_error"] <= free["forecast_error"] / 2 < free["forecast_error"]
    assert bound["unet_macs"] > free["unet_macs"], "what was redone is counted"
    assert "forecast_error" not in engine(model, recipe, load_plan("skip:2", 5))(items)[1]


def test_the_text_decides_what_is_drawn(model):
    heart, dog, pizza = sampled_images(model)
    assert min((heart - dog).abs().mean(), (dog - pizza).abs().mean()) > 0.05


def test_weights_are_small_enough_to_ship():
    files = [f for f in MODEL.iterdir() if f.suffix == ".safetensors"]
    assert sum(f.stat().st_size for f in files) <= 40e6
    state = read_checkpoint(MODEL / "model.safetensors")
    assert {v.dtype for k, v in state.items() if "." in k} == {torch.float16}


def test_the_calibration_is_of_these_weights_and_better_than_the_published_keys(model):
    """At the published number of key steps the final latents are at most half as far, squared, from the plain run."""
    run = RunFacts({"sampler": "ddim", "weights": fingerprint(MODEL / "model.safetensors")[:16]}, MODEL / "calibration")
    plain, auto, paper = (
        Engine(
            model,
            Sizes.of(load_config(MODEL / "config.yaml").model),
            replace(RECIPE, steps=50, noise_weight=0.0),
            load_plan(spec, 50, 8, run=run),
            Task(Text()),
        ).sampled(prompt_items(PROMPTS[:1], 1, seed=0))
        for spec in ("off", "auto:9", "faster-diffusion")
    )
    assert auto[1] == paper[1], "both costs are the same"
    errors = [float((x - plain[0]).square().mean()) for x, _ in (auto, paper)]
    assert errors[0] < 0.5 * errors[1]
