"""Losses, schedules, dropped conditions and whole steps of published trainings, held to their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.lr_scheduler import LambdaWarmUpCosineScheduler2
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.training.diffusion import DiffusionTraining, dropped_as_published
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.helpers.goldens import assert_golden, load_case, recipe_tensor, recipe_weights
from tests.training.test_adversarial import train

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"


@pytest.mark.parametrize(
    "name", ("schedule_linear", "schedule_linear_published", "schedule_warmup_cosine", "schedule_warmup_cosine2")
)
def test_schedule_golden(name):
    case, tensors = load_case(name)
    factor = get_obj_from_str(case["class"])(**case["params"])
    found = torch.tensor([factor(step) for step in tensors["steps"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, tensors["factor"].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ("unconditional", "concat", "adm", "hybrid"))
def test_loss_golden(name):
    case, tensors = load_case(f"ldm_loss_{name}")
    model = LatentDiffusion(
        {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "__is_unconditional__",
        {"target": UNET, "params": case["unet_kwargs"]},
        conditioning_key=case["conditioning_key"],
        linear_start=0.0015,
        linear_end=0.0195,
        use_ema=False,
        **case["options"],
    )
    network = model.model.diffusion_model
    recipe_weights(network, **case["weight_recipe"]).train()
    cond = {"c_concat": tensors.get("c_concat"), "c_crossattn": tensors.get("c_crossattn", tensors.get("y"))}
    if case["conditioning_key"] == "adm":
        cond = {"c_adm": tensors["y"]}
    cond = {key: value if key == "c_adm" else [value] for key, value in cond.items() if value is not None}
    losses = model.p_losses(tensors["x0"], cond or None, tensors["t"], tensors["noise"])
    losses["loss"].backward()
    for key in ("loss", "loss_simple", "loss_vlb"):
        assert_golden(losses[key], tensors["loss" if key == "loss" else f"log.{key}"], case)
    for key, parameter in network.named_parameters():
        if f"grad.{key}" in tensors:
            assert_golden(parameter.grad, tensors[f"grad.{key}"], case)
    total = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(total, tensors["grad_norm_total"], rtol=1e-4, atol=1e-5)


def test_dropped_conditions_golden():
    case, tensors = load_case("ucg_dropout")
    labels, weight = tensors["class_label"], (case["n_classes"], case["embed_dim"])
    embedder = ClassEmbedder(case["embed_dim"], case["n_classes"], ucg_rate=case["ucg_rate"])
    seed = case["weight_recipe"]["seed"]
    embedder.embedding.weight.data = recipe_tensor("embedding.weight", weight, seed, 1.0)
    torch.manual_seed(case["seed"])
    assert_golden(embedder(labels), tensors["out"], case)
    assert_golden(embedder(labels, disable_dropout=True), tensors["out.disable_dropout"], case)
    assert_golden(embedder.eval()(labels), tensors["out.disable_dropout"], case)  # sampling drops nothing
    batch = {"caption": case["captions"], "class_label": labels}
    after = dropped_as_published(batch, case["ucg_training"], case["seed"])
    assert after["caption"] == case["captions_after"]
    assert after["class_label"].tolist() == tensors["ucg.class_label"].tolist()
    assert batch["caption"] == case["captions"]


class Given(DiffusionTraining):
    """Takes timesteps and noise from a golden case."""

    drawn: Any

    def timesteps_and_noise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.drawn)


def test_training_golden(monkeypatch):
    case, tensors = load_case("fit_ldm_class")
    options = dict(case["options"])
    model = LatentDiffusion(
        case["first_stage_config"],
        case["cond_stage_config"],
        {"target": UNET, "params": case["unet_kwargs"]},
        conditioning_key="crossattn",
        **options | {"use_ema": False},
    )
    for part in (model.model.diffusion_model, model.first_stage_model, model.cond_stage_model):
        recipe_weights(part, **{k: case["weight_recipe"][k] for k in ("seed", "gain")})
    module = Given(model, case["lr"], published_optimizer=True, condition_dropout=0.0)
    module.drawn = iter(list(zip(tensors["t"], tensors["noise"], strict=True)))
    posterior = iter(tensors["posterior_noise"])
    sample = DiagonalGaussianDistribution.sample
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _: sample(self, next(posterior)))
    key = options["cond_stage_key"]
    batches = [
        {"image": images.movedim(-1, 1), key: labels}
        for images, labels in zip(tensors["images"], tensors[key], strict=True)
    ]
    watch = train(module, batches)
    for terms, norm, expected in zip(watch.terms, watch.norms, case["losses"], strict=True):
        assert norm == pytest.approx(expected["grad_norm"], rel=2e-4)
        for term in ("loss", "loss_simple", "loss_gamma", "loss_vlb", "logvar"):
            assert terms[term].item() == pytest.approx(expected[term], rel=2e-4, abs=1e-9), term
    parts = {
        "unet": model.model.diffusion_model.state_dict().values(),
        "cond": model.cond_stage_model.state_dict().values(),
        "ema": [v for k, v in module.network_ema.state_dict().items() if k not in ("decay", "num_updates")],
    }
    for name, weights in parts.items():
        l2 = torch.stack([w.double().norm() for w in weights]).norm().item()
        assert l2 == pytest.approx(case["final_weights"][name]["l2"], rel=1e-6), name
    assert module.network_ema.num_updates.item() == case["ema"]["num_updates"]
    torch.testing.assert_close(model.scale_factor, tensors["scale_factor"], rtol=1e-5, atol=0)
    state = model.state_dict() | {f"model_ema.{k}": v for k, v in module.network_ema.state_dict().items()}
    for name in (n for n in tensors if n.startswith("after.m") or n.startswith("after.c")):
        expected = tensors[name]
        torch.testing.assert_close(state[name.removeprefix("after.")], expected, rtol=0, atol=2e-4)


def test_a_diffusion_on_pixels_is_trained():
    case, tensors = load_case("ldm_loss_unconditional")
    model = LatentDiffusion(
        {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "__is_unconditional__",
        {"target": UNET, "params": case["unet_kwargs"]},
        use_ema=False,
    )
    watch = train(DiffusionTraining(model, 1e-3), [{"image": tensors["x0"]}])
    assert 0 < watch.terms[0]["loss"] < 10 and watch.norms[0] > 0


@pytest.mark.parametrize("name, value", [("sample_steps", 0), ("min_snr_gamma", -1.0)])
def test_numbers_of_a_training_are_checked_before_it(name, value):
    section = {"target": "ldm.training.diffusion.DiffusionTraining", "params": {"learning_rate": 1e-3, name: value}}
    with pytest.raises(ValueError, match=f"{name} should be greater than"):
        instantiate_from_config(section, model=None)


def test_a_warm_up_ends_within_its_cycle():
    with pytest.raises(ValueError, match=r"warm_up_steps must lie in \[0, cycle_lengths=5\); got 5"):
        LambdaWarmUpCosineScheduler2([2, 5], [0.1, 0.1], [1.0, 1.0], [0.0, 0.0], [4, 5])
