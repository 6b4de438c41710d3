"""SDXL's network and text encoders: golden numbers, how they are put together, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ldm.checkpoint import load_config
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.denoiser import Conditional, Guidance, Guided
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import (
    ConcatTimestepEmbedderND,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    GeneralConditioner,
)
from tests.helpers.goldens import assert_golden, from_recipe, load_case
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT

SPATIAL = {"image_size": 32, "use_spatial_transformer": True, "legacy": False}
NUMBERS = [(key, key) for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")]


def golden_kwargs(case):
    kwargs = case["kwargs"] | SPATIAL
    width = kwargs["context_dim"]
    return kwargs | {"context_dim": width if isinstance(width, int) else width[0]}


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl_unet", "sdxl_unet_refiner"])
def test_golden_network(name):
    case, tensors = load_case(name)
    unet = from_recipe(UNetModel(**golden_kwargs(case)), case, tensors)
    condition = tensors["timesteps"], tensors["context"], tensors["y"]
    assert_golden(unet.embed(tensors["timesteps"], tensors["y"], 2), tensors["emb"], case)
    features = unet.encode(tensors["x"], *condition)
    assert_golden(features.hidden, tensors["mid"], case)
    for i, skip in enumerate(features.skips):
        assert_golden(skip, tensors[f"skip.{i}"], case)
    assert_golden(unet.decode(features, *condition), tensors["out"], case)


@torch.no_grad()
def test_golden_text_encoders():
    case, tensors = load_case("sdxl_clip_hidden")
    sizes = dict(case["kwargs"])
    blocks = sizes["num_hidden_layers"]
    hidden = FrozenCLIPEmbedder(sizes, max_length=16, layer="hidden", layer_idx=blocks - 1)
    prefixed = {f"transformer.{key}": value for key, value in case["weights"].items()}
    weights = from_recipe(FrozenCLIPEmbedder(sizes, max_length=16).transformer, case, tensors).state_dict()
    assert prefixed.keys() == {f"transformer.{key}" for key in weights if not key.endswith("position_ids")}
    hidden.transformer.load_state_dict(weights)
    assert_golden(hidden(tensors["input_ids"]), tensors["penultimate"], case)

    case, tensors = load_case("sdxl_openclip")
    encoder = FrozenOpenCLIPEmbedder2(case["kwargs"], max_length=16)
    from_recipe(encoder.model, case, tensors)
    tokens, pooled = encoder(tensors["tokens"])
    assert_golden(tokens, tensors["penultimate"], case)
    assert_golden(pooled, tensors["pooled"], case)


def conditioner(numbers=NUMBERS, max_length=77) -> GeneralConditioner:
    texts = [
        (FrozenCLIPEmbedder, {"version": TINY_TEXT, "layer": "hidden", "layer_idx": 1, "max_length": max_length}),
        (FrozenOpenCLIPEmbedder2, {"arch": TINY_OPEN}),
    ]
    path = "ldm.modules.encoders.modules."
    entries = [{"input_key": "txt", "target": path + kind.__name__, "params": params} for kind, params in texts]
    entries += [
        {"input_key": key, "target": path + "ConcatTimestepEmbedderND", "params": {"outdim": 256}} for _, key in numbers
    ]
    return GeneralConditioner(entries)


@pytest.mark.parametrize("number", range(2))
def test_golden_vector(number):
    case, tensors = load_case("sdxl_vector")
    keys = {"original_size": "original_size_as_tuple", "crop_top_left": "crop_coords_top_left"}
    keys |= {"target_size": "target_size_as_tuple", "aesthetic_score": "aesthetic_score"}
    given = {keys[name]: torch.tensor(rows) for name, rows in case["cases"][number].items() if name in keys}
    given = {key: rows[:, None] if rows.ndim == 1 else rows for key, rows in given.items()}
    vector = conditioner([(key, key) for key in given]).vector(tensors[f"{number}.pooled"], given)
    assert_golden(vector, tensors[f"{number}.vector"], case)


@torch.no_grad()
def test_the_context_is_that_of_both_encoders_side_by_side():
    one = conditioner()
    tokens = torch.full((2, 77), 49407)
    first, (second, pooled) = (encoder(tokens) for encoder in one.text_encoders)
    context, own = one.encode_text(tokens)
    assert torch.equal(context, torch.cat([first, second], dim=2)) and torch.equal(own, pooled)
    with pytest.raises(ValueError, match="numbers must be original_size_as_tuple, .*got aesthetic_score"):
        one.vector(pooled, {"aesthetic_score": torch.zeros(2, 1)})
    with pytest.raises(ValueError, match="aesthetic_score must have the shape .2, 1.; got .2,."):
        conditioner([("", "aesthetic_score")]).vector(pooled, {"aesthetic_score": torch.zeros(2)})


CLIP = {"input_key": "txt", "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {}}
SIZE = {"input_key": "target_size_as_tuple", "target": "ldm.modules.encoders.modules.ConcatTimestepEmbedderND"}


@pytest.mark.parametrize(
    "entries, why",
    [
        ([], "expected text encoders .txt. first; got none"),
        ([SIZE], "expected text encoders .txt. first; got target_size_as_tuple"),
        ([SIZE, CLIP], "first; got target_size_as_tuple, txt"),
        ([CLIP | {"input_key": "fps_id"}], "input_key 'fps_id': unknown; accepted: .*input_key txt, original_size"),
        ([CLIP | {"input_keys": ["a"]}], "input_keys: unknown"),
    ],
)
def test_a_conditioner_of_another_kind_is_refused(entries, why):
    with pytest.raises(ValueError, match=why):
        GeneralConditioner(entries)


def test_text_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"texts of one length; got \[16, 77\] tokens"):
        conditioner(max_length=16)
    with pytest.raises(ValueError, match="penultimate, true and false, as in SDXL; got last, True and False"):
        FrozenOpenCLIPEmbedder2(TINY_OPEN, layer="last")
    for settings, why in (
        ({"layer": "pooled"}, "layer must be last or hidden; got 'pooled'"),
        ({"layer": "hidden"}, "layer_idx must be 0..2 with layer hidden.*got None with hidden"),
        ({"layer": "hidden", "layer_idx": 3}, "layer_idx must be 0..2 .*got 3"),
        ({"layer_idx": 1}, "got 1 with last"),
    ):
        with pytest.raises(ValueError, match=why):
            FrozenCLIPEmbedder(TINY_TEXT, **settings)
    with pytest.raises(ValueError, match="transformer_depth must have one entry for each of the 3 levels"):
        UNetModel(**golden_kwargs(load_case("sdxl_unet")[0]) | {"transformer_depth": [1, 2]})


def test_numbers_are_embedded_one_by_one():
    x = torch.tensor([[3.0, 500.0]])
    joined = ConcatTimestepEmbedderND(6)(x)
    assert torch.equal(joined, torch.cat([ConcatTimestepEmbedderND(6)(x[:, i : i + 1]) for i in range(2)], dim=1))
    assert joined.shape == (1, 12) and not torch.equal(joined[:, :6], joined[:, 6:])


# Sampling


@pytest.mark.parametrize("name, parallel", [("plain", 1), ("propagated_50ls", 50)])
def test_golden_trajectory(name, parallel):
    """Euler on the published timesteps; in our scale the start is unit noise."""
    listed, _ = load_case("sdxl_euler50_plain")
    case, tensors = load_case(f"sdxl_euler50_{name}")
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    ddpm = DDPM(
        {"target": target, "params": golden_kwargs(listed)},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        conditioning_key="crossattn-adm",
    )
    from_recipe(ddpm.model.diffusion_model, listed, {})
    both = ddpm.model.conditioning(c_crossattn=[tensors["context"]], c_adm=tensors["vector"])
    model = Guided(Conditional(ddpm.model, ddpm.model.project(both)), Guidance(case["guidance_scale"]))
    rule = solver("euler-trailing", ddpm.alphas_cumprod, 50)
    assert [node.t for node in rule.nodes] == tensors["unet_timesteps"].tolist()
    sigmas = [((1 - node.abar) / node.abar) ** 0.5 for node in rule.nodes]
    torch.testing.assert_close(torch.tensor(sigmas), tensors["sigmas"], rtol=1e-5, atol=1e-6)

    plan = Plan(50, tuple(case.get("key_steps", range(50))), parallel=parallel)
    states = [tensors["x_T"], *(state.x for state in denoise(model, rule, plan, tensors["x_T"]))]
    for i, sigma in enumerate(sigmas):
        assert_golden(states[i] * (1 + sigma**2) ** 0.5, tensors["into_step"][i], case)
    assert_golden(states[-1], tensors["final"], case)
    if name != "plain":
        plain = load_case("sdxl_euler50_plain")[1]["final"]
        assert (states[-1] - plain).abs().max() == pytest.approx(case["max_abs_diff_to_plain"], abs=1e-2)


def test_the_trailing_timesteps_of_30_steps_are_rounded_down():
    nodes = solver("euler-trailing", torch.linspace(0.999, 0.001, 1000), 30).nodes
    assert [node.t for node in nodes[:3]] == [999, 965, 932] and nodes[-1].abar_next == 1
    assert all(a.abar_next == b.abar for a, b in pairwise(nodes))


# Configurations


def test_the_inpainting_network_sees_a_mask_and_an_image_more():
    base, paint = (load_config(f"configs/stable-diffusion/sd_xl_{name}.yaml") for name in ("base", "inpainting"))
    assert paint.model.params.unet_config.params.in_channels == base.model.params.unet_config.params.in_channels + 5
