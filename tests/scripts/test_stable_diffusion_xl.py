"""The scripts on SDXL at a tiny width."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import ldm
from ldm.checkpoint import load_config, load_model, save_weights
from ldm.io.images import to_pil
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer
from ldm.modules.encoders.tokenizer import Reading
from ldm.sampling.engine import Engine, Recipe, Sizes, Task
from ldm.sampling.generate import prompt_items
from ldm.sampling.refined import Refined, plan_after
from ldm.sampling.task import FramedText, Framing
from ldm.util import _renamed
from tests.helpers.goldens import load_case, recipe_weights
from tests.helpers.paths import GOLDENS, ROOT
from tests.helpers.scripts import Script, load_script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_xl import OWN, tiny_xl

STEPS = ["--prompt", "a cat", "--steps", "4", "--sampler", "euler-trailing", "--n_samples", "1", "--skip_grid"]


PLAIN = "a cat wearing sunglasses"
FRAMING = Framing((64, 64), (16, 24), (9, 500))
PROPAGATED = Plan(4, (0, 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    return tiny_xl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base):
    return load_model(base[1], base[3])


def latents(model, plan: Plan, framing: Framing = FRAMING, count: int = 1) -> torch.Tensor:
    recipe, task = Recipe(64, 64, "euler-trailing", 4, scale=5.0), Task(FramedText(framing))
    return Engine(model, Sizes(4, 8, 32, 64), recipe, plan, task).latents(prompt_items(["a cat"], count, 1))


def test_the_two_laws(model):
    """All nodes key nodes = plain; parallel = serial. The framing reaches the network, a batch changes nothing."""
    plain, serial = latents(model, load_plan("off", 4)), latents(model, PROPAGATED)
    same = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    same(latents(model, Plan(4, (0, 1, 2, 3))), plain)
    same(latents(model, replace(PROPAGATED, parallel=3)), serial)
    same(latents(model, PROPAGATED, count=2)[:1], serial)
    assert (plain - serial).abs().max() > 0.01
    for change in ({"target": (32, 64)}, {"original": (64, 64)}, {"crop": (0, 0)}):
        assert (latents(model, PROPAGATED, replace(FRAMING, **change)) - serial).abs().max() > 1e-3


def test_a_script_takes_it_by_its_config(base, model, tmp_path):
    script = Script("txt2img", tmp_path, *base, *STEPS, "--plan", "0,1", "--noise-weight", "0")
    (entry,) = script("--original-size", "16,24", "--crop", "9,500", "--seed", "1", "--tile", "24")
    assert entry["tile"] == 24
    assert (entry["original_size"], entry["crop"], entry["scale"]) == ([16, 24], [9, 500], 5.0)
    image = model.decode_first_stage(latents(model, PROPAGATED))
    assert np.abs(script.pixels(entry) - np.asarray(to_pil(image)[0]).astype(int)).max() <= 1


def test_calibrated_plans(tmp_path, capsys):
    """A model with two text encoders is calibrated as any other."""
    files = tiny_xl(tmp_path / "m")
    how = [*files, "--steps", "3", "--sampler", "euler-trailing", "--scale", "5"]
    levels = ["--keys", "2", "--level", "encoder", "skip"]
    assert load_script("calibrate_plan").main([*how, *levels, "--n_samples", "1"]) == 0
    assert "calibration: " in capsys.readouterr().out
    script = Script("txt2img", tmp_path, *how, "--prompt", "a cat", "--n_samples", "1", "--skip_grid")
    plain, held, skipped = (
        script("--noise-weight", "0", "--plan", plan)[0] for plan in ("off", "auto:2", "skip:auto:2")
    )
    assert len(held["keys"]) == len(skipped["keys"]) == 2
    assert plain["unet_macs"] > held["unet_macs"] > skipped["unet_macs"]


def test_the_first_stage_is_that_of_float32_under_autocast(model, monkeypatch):
    """Held to the golden numbers of the published first stage; without the config's flag they are missed."""
    case, golden = load_case("vae_kl_f8_4level")
    stage = AutoencoderKL(**case["kwargs"]).eval()
    stored = {name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")}
    monkeypatch.setitem(
        model._modules, "first_stage_model", recipe_weights(stage, **case["weight_recipe"], stored=stored)
    )
    monkeypatch.setattr(model, "scale_factor", 1.0)
    with torch.no_grad(), torch.autocast("cpu"):
        encoded, decoded = model.encode_first_stage(golden["x"]), model.decode_first_stage(golden["mode"])
        monkeypatch.setattr(model, "disable_first_stage_autocast", False)
        rounded = model.decode_first_stage(golden["mode"])
    close = partial(torch.testing.assert_close, rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"])
    close(encoded.mode(), golden["mode"])
    close(decoded, golden["dec"])
    assert (rounded - golden["dec"]).abs().max() > 100 * case["tolerance"]["atol"]


def test_what_guidance_leads_away_from(model):
    """Zeros in the place of the base's empty text; a negative prompt, and the refiner's empty text, are read."""
    items, framing = prompt_items(["a cat"], 2, 1), Framing((64, 64), (16, 24))
    empty, away = (FramedText(framing, negative) for negative in ("", "a dog"))
    cond = empty.encode(model, items)
    nothing, read = empty.unconditional(model, cond), away.unconditional(model, cond)
    assert cond.context.shape == nothing.context.shape == (2, 77, 32) and not nothing.context.any()
    assert not nothing.y[:, :OWN].any() and torch.equal(nothing.y[:, OWN:], cond.y[:, OWN:])
    assert read.context.any() and torch.equal(read.y[:, OWN:], cond.y[:, OWN:])


def test_inpainting(tmp_path):
    rng = np.random.default_rng(0)
    indir = tmp_path / "in"
    indir.mkdir()
    image, mask = rng.integers(0, 255, (60, 64, 3), dtype=np.uint8), np.zeros((60, 64), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(image).save(indir / "a.png")
    Image.fromarray(mask).save(indir / "a_mask.png")
    files = tiny_xl(tmp_path / "m", "inpainting")
    script = Script("inpaint", tmp_path, *files, "--indir", str(indir), "--prompt", "a cat", "--skip_grid")
    (entry,) = script("--steps", "2", "--plan", "off")
    painted = script.pixels(entry)
    assert (painted[mask == 0] == image[mask == 0]).all() and painted[mask > 0].std() > 1


# The publisher's configuration


def renamed(value):
    """With our names of classes."""
    if isinstance(value, dict):
        return {k: _renamed(v) if k == "target" else renamed(v) for k, v in value.items()}
    return [renamed(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["base", "refiner"])
def test_the_published_configuration_loads_as_it_is(name):
    ours, theirs = (
        OmegaConf.to_container(load_config(folder / f"sd_xl_{name}.yaml").model)
        for folder in (ROOT / "configs/stable-diffusion", GOLDENS)
    )
    assert renamed(theirs) == ours


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("  scale_factor: 0.13025", "  scale: 1", "DiffusionEngine without scale_factor"),
        ("scale_factor: 0.13025", "scale_factor: 0.13025\n    lora: true", "lora: unknown; accepted: network_config"),
        ("EpsScaling", "EDMScaling", "denoiser_config: scaling must be EpsScaling or VScaling; got EDMScaling"),
        ("LegacyDDPMDiscretization", "EDMDiscretization", "expected LegacyDDPMDiscretization.*got EDMDiscretization"),
        ("softmax-xformers", "linear", "spatial_transformer_attn_type must be softmax or softmax-xformers"),
        ("embed_dim", "embedded", "first_stage_config without embed_dim"),
        ("target: sgm.modules.diffusionmodules.openaimodel.UNetModel", "class: UNet", "network_config: expected a map"),
        ("sgm.modules.GeneralConditioner", "sgm.modules.Other", "'sgm.modules.Other' is outside the allowed packages"),
    ],
)
def test_a_published_configuration_that_asks_for_more_is_refused(old, new, why, tmp_path):
    text = (GOLDENS / "sd_xl_base.yaml").read_text()
    assert old in text
    (tmp_path / "c.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=why):
        load_config(tmp_path / "c.yaml")


# Bad input


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--tile", "8"], "--tile: expected a whole number in 16..16384; got '8'"),
        (["--H", "100"], "--H: must be a multiple of 32 for this model; got 100"),
        (["--crop", "3"], "--crop: expected two numbers such as 1024,768; got '3'"),
        (["--original-size", "0,5"], "--original-size: .*got '0'"),
        (
            ["--sampler", "euler-trailing", "--spacing", "time"],
            "--spacing: must be trailing for this solver; got 'time'",
        ),
    ],
)
def test_bad_arguments(arguments, why, base, tmp_path, capsys):
    line = Script("txt2img", tmp_path, *base, *STEPS).refusal(capsys, *arguments)
    assert re.match(why, line), line


def test_a_framing_is_only_for_models_that_are_told_it(tmp_path, capsys):
    config, ckpt = map(str, write_model(tmp_path))
    line = Script("txt2img", tmp_path, "--config", config, "--ckpt", ckpt).refusal(capsys, "--crop", "0,0")
    assert line.startswith("--crop: only for a model that is conditioned on size and crop, such as SDXL")


def test_prompts_are_not_edited(base, tmp_path, capsys):
    line = Script("prompt2prompt", tmp_path, *base).refusal(capsys, "--prompt", "a cat", "--edit", "a dog")
    assert line.startswith("--config: prompts are not edited with the conditioner GeneralConditioner")


def test_new_tokens_are_refused(base, tmp_path, capsys):
    """Those for both text encoders, and those for one."""
    script = Script("txt2img", tmp_path, *base, *STEPS)
    for name, content, why in (
        (
            "both",
            {"clip_g": torch.zeros(1, 8), "clip_l": torch.zeros(1, 8)},
            "vectors for the two text encoders of SDXL",
        ),
        ("one", {"<x>": torch.zeros(1, 8)}, "GeneralConditioner takes no new tokens; expected one text encoder"),
    ):
        save_weights(tmp_path / f"{name}.safetensors", content)
        refusal = script.refusal(capsys, "--embedding", str(tmp_path / f"{name}.safetensors"))
        assert refusal.startswith(f"--embedding: {tmp_path}/{name}.safetensors: {why}")


def test_a_folder_is_not_described_by_another_model_s_config(base, tmp_path, capsys):
    other, _ = write_model(tmp_path)
    refiner, out = tiny_xl(tmp_path / "refiner", "refiner"), str(tmp_path / "out")
    for config in (str(other), refiner[1]):
        assert load_script("convert").main([base[3], "--to", "diffusers", "--config", config, "--out", out]) == 2
        assert f"--config: {config} is not the config of these weights: " in capsys.readouterr().err


def test_a_checkpoint_without_a_text_encoder_is_named(base, model, tmp_path, capsys):
    state = model.state_dict()
    short = {key: value for key, value in state.items() if not key.startswith("conditioner.embedders.1.")}
    save_weights(tmp_path / "short.safetensors", short)
    script = Script("txt2img", tmp_path, base[0], base[1], "--ckpt", str(tmp_path / "short.safetensors"))
    assert "missing (conditioner.embedders.1.model." in script.refusal(capsys, "--prompt", "a cat")


def test_prompts_are_read_by_both_encoders_to_the_same_token(model):
    """What the report of cut prompts relies on."""
    lengths = {encoder.tokenizer.max_length for encoder in model.conditioner.text_encoders}
    assert lengths == {77} and isinstance(model.conditioner.text_encoders[0].tokenizer, ClipTokenizer)
    assert model.cond_stage_model.cut(["a cat", "cat " * 99]) == [False, True]


# The refiner


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> list[str]:
    return tiny_xl(tmp_path_factory.mktemp("refiner"), "refiner")


def engine(model, plan: Plan, sampler: str = "euler-trailing", **changes) -> Engine:
    recipe = Recipe(64, 64, sampler, 8, scale=5.0, **changes)
    return Engine(model, Sizes(4, 8, 64, 64), recipe, plan, Task(FramedText(FRAMING)))


@pytest.mark.parametrize("sampler, nodes", [("euler-a", 8), ("heun", 15)])
def test_a_refiner_that_is_the_base_changes_nothing(model, sampler, nodes):
    """Latents and noise are handed over as they are; a plan counts the steps of both."""
    keys = Plan(nodes, tuple(range(nodes)))
    whole = engine(model, keys, sampler)
    refined, items = Refined(whole, model, 0.5), prompt_items(["a cat"], 1, 1)
    torch.testing.assert_close(refined.latents(items), whole.latents(items), rtol=1e-4, atol=1e-4)


def test_a_solver_that_needs_its_past_is_refused_and_a_share_without_a_step(model):
    with pytest.raises(ValueError, match="0.01 of 8 steps leaves none"):
        Refined(engine(model, Plan(8, (0,))), model, 0.01)
    with pytest.raises(ValueError, match="a run of plms can't go on there with another model"):
        Refined(engine(model, Plan(9, (0,)), "plms"), model, 0.5)


def test_the_laws_hold_with_a_refiner(model, refiner):
    last = load_model(refiner[1], refiner[3])
    items, same = prompt_items(["a cat"], 1, 1), partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    plain, serial, parallel = (
        Refined(engine(model, plan), last, 0.4)
        for plan in (load_plan("off", 8), Plan(8, (0, 2, 6)), Plan(8, (0, 2, 6), parallel=8))
    )
    assert serial.stop == 5 and serial.refiner.plan.keys == (0, 1)
    assert not any(i < 5 <= batch.nodes[-1] for batch in parallel.plan.batches() for i in batch.nodes)
    same(parallel.latents(items), serial.latents(items))
    same(serial.with_plan(plain.plan).latents(items), plain.latents(items))
    base = engine(model, load_plan("off", 8))
    assert base.unit != Refined(base, last, 0.4).refiner.unit == plain.refiner.unit
    both = (base.decoder_bytes(2), plain.refiner.decoder_bytes(2))
    assert plain.decoder_bytes(2) == max(both) > min(both)
    assert plain.sampling_bytes(1) == max(base.sampling_bytes(1), plain.refiner.sampling_bytes(1))
    assert (plain.latents(items) - base.latents(items)).abs().max() > 1e-2
    assert (plain.latents(items) - serial.latents(items)).abs().max() > 1e-3
    (_, cost), whole = plain.sampled(items), plain.unit.whole * 5 + plain.refiner.unit.whole * 3
    assert cost.macs == 2 * (whole + plain.unit.once + plain.refiner.unit.once)


def test_plan_after_a_node():
    plan = Plan(10, (0, 4, 8), shallow=(1, 9), branch=2, skipped=(5, 6))
    after = plan_after(plan, 5)
    assert (after.num_nodes, after.keys, after.shallow, after.skipped) == (5, (0, 3), (4,), (1,))
    assert plan_after(replace(plan, shallow=(1,)), 5).branch == 0
    gated = plan_after(load_plan("tgate:4", 10), 6)
    assert (gated.num_nodes, gated.keys, gated.gated) == (4, (0,), (1, 2, 3))
    mixed = Plan(10, (0, 3), skipped=(1, 2), propagate="linear:step:eps")
    assert plan_after(mixed, 4).propagate == "linear:step" and plan_after(mixed, 1).propagate == mixed.propagate


def test_the_refiner_keeps_cross_attention_of_its_own(model, refiner):
    """With T-GATE its first step is a key timestep, and its others take what its own layers gave there."""
    refined = Refined(engine(model, load_plan("tgate:2", 8)), load_model(refiner[1], refiner[3]), 0.4)
    computes = [*refined.plan.computes()][:5], [*refined.refiner.plan.computes()]
    assert [[compute.value for compute in part] for part in computes] == [
        ["full"] * 2 + ["gated"] * 3,
        ["full"] + ["gated"] * 2,
    ]
    (latents, cost), unit, last = refined.sampled(prompt_items(["a cat"], 1, 1)), refined.unit, refined.refiner.unit
    assert latents.isfinite().all()
    # With guidance, which only key timesteps have, a prediction costs twice as much.
    assert cost.macs < unit.whole * (2 * 2 + 3) + last.whole * (2 + 2) + 2 * (unit.once + last.once)


def test_a_script_with_a_refiner(base, refiner, tmp_path):
    script = Script("txt2img", tmp_path, *base, *STEPS, "--refiner", refiner[3], "--refiner-config", refiner[1])
    (entry,) = script("--plan", "0,1", "--refiner-share", "0.5")
    assert entry["refiner_share"] == 0.5 and entry["refiner"]["ckpt"].endswith("model.safetensors")
    assert entry["refiner"]["weights"] != entry["weights"] and entry["keys"] == [0, 1, 2]
    model, options = ldm.load(config=base[1], ckpt=base[3]), {"steps": 4, "sampler": "euler-trailing", "plan": "0,1"}
    options |= {"refiner": refiner[3], "refiner_config": refiner[1], "refiner_share": 0.5}
    assert (np.asarray(model.images("a cat", **options)[0]) == script.pixels(entry)).all()
    with pytest.raises(ValueError, match="a refiner goes with a text alone"):
        model.images("a cat", image=script.out / entry["file"], **options)


def test_python_keeps_a_refiner_as_long_as_its_files_are_asked_for(base, refiner, tmp_path):
    """Another config is another refiner; one that can't be loaded costs neither the model nor the next call."""
    options = {"steps": 4, "sampler": "euler-trailing", "refiner_share": 0.5, "refiner": refiner[3]}
    model = ldm.load(config=base[1], ckpt=base[3])
    expected = model.images("a cat", **options, refiner_config=refiner[1])[0]
    network, kept = model.network, model._refiner[1]
    assert model.images("a cat", **options, refiner_config=refiner[1])[0].tobytes() == expected.tobytes()
    assert model._load(replace(model._refiner[0], autocast=True)) is kept, "the weights are the same"
    other = load_config(refiner[1])
    other.model.params.unet_config.params.num_head_channels = 8
    OmegaConf.save(other, tmp_path / "other.yaml")
    assert model.images("a cat", **options, refiner_config=tmp_path / "other.yaml")[0].tobytes() != expected.tobytes()
    other.model.params.unet_config.params.model_channels *= 2
    OmegaConf.save(other, tmp_path / "wide.yaml")
    with pytest.raises(ValueError, match="^refiner: "):
        model.images("a cat", **options, refiner_config=tmp_path / "wide.yaml")
    assert model.network is network
    assert model.images("a cat", **options, refiner_config=refiner[1])[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("forecast", ["linear:step:eps", "linear:step"])
def test_a_step_that_is_skipped_where_the_refiner_begins_is_a_key_timestep_of_it(base, refiner, forecast, tmp_path):
    """Also where no other step is skipped, and no whole prediction is left to forecast."""
    script = Script("txt2img", tmp_path, *base, *STEPS, "--refiner", refiner[3], "--refiner-config", refiner[1])
    (entry,) = script("--plan", "0+skip:2", "--forecast", forecast, "--refiner-share", "0.5")
    assert (entry["keys"], entry["propagate"], entry.get("skipped")) == ([0, 2], "linear:step", None)
    assert not script("--plan", "0,2", "--forecast", "linear:step", "--refiner-share", "0.5"), "the same image"


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--refiner-share", "0.5"], "--refiner-share: only with a refiner"),
        (["--refiner", "none.safetensors"], "--refiner: none.safetensors: no such file"),
        (["--refiner", "BASE"], "--refiner: .*config.yaml is not the config of a refiner"),
        (["--refiner", "REFINER", "--refiner-share", "1"], "--refiner-share: expected a number in 0.001..0.999"),
        (["--refiner", "REFINER", "--refiner-share", "0.2"], "--refiner-share: 0.2 of 4 steps leaves none"),
        (["--refiner", "REFINER", "--H", "32", "--W", "32"], "--H: must be a multiple of 64 with this refiner; got 32"),
        (["--refiner", "REFINER", "--plan", "online:0.1"], "--plan: a plan that decides during a run"),
        (["REFINER"], "--config: a refiner finishes images of a base model; expected the base model"),
    ],
)
def test_bad_refiners(arguments, why, base, refiner, tmp_path, capsys):
    if arguments == ["REFINER"]:
        line = Script("txt2img", tmp_path, *refiner, *STEPS).refusal(capsys)
    else:
        files = {"REFINER": refiner[3], "BASE": base[3]}
        line = Script("txt2img", tmp_path, *base, *STEPS).refusal(capsys, *(files.get(a, a) for a in arguments))
    assert re.match(why, line), line


def test_a_refiner_without_a_base_of_its_kind(refiner, tmp_path, capsys):
    config, ckpt = map(str, write_model(tmp_path))
    script = Script("txt2img", tmp_path, "--config", config, "--ckpt", ckpt, "--refiner", refiner[3])
    assert "--refiner: finishes images of a base model of SDXL" in script.refusal(capsys)


def test_prompts_with_weights_and_in_chunks(model):
    """Both encoders read them; the text's own vector is that of the first chunk, without weights."""
    items, reading = prompt_items(["a (cat:2) wearing sunglasses"], 1, 1), Reading(weights=True, chunks=2)
    condition = FramedText(FRAMING, reading=reading)
    cond, plain = condition.encode(model, items), FramedText(FRAMING).encode(model, prompt_items([PLAIN], 1, 1))
    assert condition.tokens(model) == cond.context.shape[1] == 154 and torch.equal(cond.y, plain.y)
    change = (cond.context[:, :77] - plain.context).abs().amax((0, 1))
    assert (change[:16] > 1e-3).any() and (change[16:] > 1e-3).any()
    assert condition.settings()["prompt_chunks"] == 2 and condition.settings()["prompt_weights"] is True
    assert condition.unconditional(model, cond).context.shape == cond.context.shape
