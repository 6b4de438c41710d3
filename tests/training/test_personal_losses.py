"""Losses of DreamBooth, Custom Diffusion and ReVersion against recorded ones."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import AddedToken

from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.denoiser import Conditioning
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer
from ldm.training.personal import body, shown_tokens, trained_of
from ldm.training.personal_losses import importance, preserved_losses, steering_loss, without_gradient_of_first
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_tensor
from tests.helpers.paths import ROOT


def model_of(case, tensors) -> DDPM:
    config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": case["unet_kwargs"]}
    kind = "v" if case.get("prediction_type") == "v_prediction" else "eps"
    model = DDPM(config, **case["schedule"], use_ema=False, conditioning_key="crossattn", parameterization=kind)
    from_recipe(model.model.diffusion_model, case, tensors)
    return model


def predicted(model, tensors, cond):
    x = model.q_sample(tensors["x0"], tensors["t"], tensors["noise"])
    target = model.prediction_target(tensors["x0"], tensors["noise"], tensors["t"])
    return model.apply_model(x, tensors["t"], cond), target


def check_gradients(model, case, tensors):
    named = dict(model.model.diffusion_model.named_parameters())
    total = torch.stack([p.grad.norm() for p in named.values() if p.grad is not None]).norm()
    assert_golden(total, tensors["grad_norm_total"], case)
    for name in tensors:
        if name.removeprefix("grad.") in named:
            assert_golden(named[name.removeprefix("grad.")].grad, tensors[name], case)


@pytest.mark.parametrize("name", ["dreambooth_prior", "dreambooth_prior_v_snr"])
def test_the_prior_is_preserved_as_in_dreambooth(name):
    case, tensors = load_case(name)
    model = model_of(case, tensors)
    prediction, target = predicted(model, tensors, tensors["context"])
    weights = None
    if gamma := case["snr_gamma"]:
        snr = model.alphas_cumprod[tensors["t"][:2]] / (1 - model.alphas_cumprod[tensors["t"][:2]])
        weights = snr.clamp(max=gamma) / (snr + 1)
    losses = preserved_losses(prediction, target, 2, case["prior_loss_weight"], weights=weights)
    assert_golden(prediction, tensors["prediction"], case)
    for ours, theirs in (("loss", "loss"), ("loss_instance", "instance_loss"), ("loss_prior", "prior_loss")):
        assert_golden(losses[ours], tensors[theirs], case)
    losses["loss"].backward()
    check_gradients(model, case, tensors)


def test_custom_diffusion_trains_keys_and_values_of_all_tokens_but_the_first():
    case, tensors = load_case("custom_diffusion_prior")
    model = model_of(case, tensors)
    model.requires_grad_(False)
    for parameter in trained_of(model, "crossattn-kv", 0, False):
        parameter.requires_grad_(True)
    trained = [name for name, p in model.model.diffusion_model.named_parameters() if p.requires_grad]
    assert trained == case["trained"]
    context = tensors["context"].clone().requires_grad_()
    projected = without_gradient_of_first(model.model.diffusion_model.project(context))
    prediction, target = predicted(model, tensors, Conditioning(projected))
    assert_golden(prediction, tensors["prediction"], case)
    losses = preserved_losses(prediction, target, 2, case["prior_loss_weight"], tensors["mask"])
    for ours, theirs in (("loss", "loss"), ("loss_instance", "instance_loss"), ("loss_prior", "prior_loss")):
        assert_golden(losses[ours], tensors[theirs], case)
    masks = torch.cat([tensors["mask"], torch.ones_like(tensors["mask"])])
    assert_golden(preserved_losses(prediction, target, 2, 1.0, masks)["loss"], tensors["loss_compvis_variant"], case)
    losses["loss"].backward()
    assert_golden(context.grad, tensors["grad.context"], case)
    assert not context.grad[:, 0].any()
    check_gradients(model, case, tensors)


def test_reversion_steers_one_vector():
    case, tensors = load_case("reversion_steer")
    key, recipe = case["embedding"]["key"], case["embedding"]["weight_recipe"]
    table = recipe_tensor(key, tuple(case["embedding"]["shape"]), **recipe)
    table[case["embedding_rows_of"]] = tensors["embedding_rows"]
    table.requires_grad_()
    loss = steering_loss(
        table, case["placeholder_id"], case["positive_token_ids"], case["negatives_ids"], case["temperature"]
    )
    assert_golden(loss, tensors["loss"], case)
    loss.backward()
    assert table.grad.abs().sum(1).nonzero().flatten().tolist() == case["rows_with_gradient"]
    assert_golden(table.grad[case["placeholder_id"]], tensors["grad.R"], case)


def test_reversion_takes_the_words_that_count(tmp_path):
    """With the published lists of words, on their token ids."""
    case, _ = load_case("reversion_steer")
    params = OmegaConf.load(ROOT / "configs/personalization/reversion.yaml").training.params
    tokenizer = ClipTokenizer(write_vocabulary(tmp_path))
    tokenizer.bpe.add_tokens([AddedToken("<r>")])
    left_out = [*params.relations, *params.stop_words]
    assert shown_tokens(tokenizer, case["texts"], left_out, case["placeholder_id"]) == case["negatives_ids"]
    positives = " ".join(word for words in case["positives"] for word in words)
    assert body(tokenizer, positives) == case["positive_token_ids"]


def test_reversion_draws_noisy_timesteps_more_often():
    case, tensors = load_case("reversion_importance")
    for i, one in enumerate(case["cases"]):
        shares = importance(one["T"], one["alpha"])
        torch.testing.assert_close(shares, tensors[f"{i}.probability"], rtol=1e-9, atol=1e-15)
