"""scripts/doctor.py, and what it reads from configs and checkpoints."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.checkpoint import load_model
from ldm.checkpoint.deepfloyd import network_params as deepfloyd_params
from ldm.checkpoint.diagnosis import differences, facts_of_config, facts_of_weights, measured_prediction
from ldm.checkpoint.file import stated_prediction
from ldm.checkpoint.published import load_manifest
from ldm.cli.examine import computes, prediction, published, which_prediction
from ldm.util import instantiate_from_config
from tests.helpers.deepfloyd import FIRST, recipe_state
from tests.helpers.paths import GOLDENS, ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_t5 import write_t5

MODELS = json.loads(gzip.decompress((GOLDENS / "state_dicts.json.gz").read_bytes()))
EMOJI64 = ROOT / "models" / "ldm" / "emoji64"
FILES = ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")]
VIDEOFUSION = "video/videofusion.yaml"
main = load_script("doctor").main


# Facts


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_published_config_and_its_checkpoint_state_the_same(name):
    config = facts_of_config(OmegaConf.load(ROOT / MODELS[name]["config"]).model)
    keys = MODELS[name]["keys"]
    weights = facts_of_weights({key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()})
    assert differences(config, weights) == [] and weights.first_stage is not None
    diffusion = not name.startswith("first_stage")
    assert (weights.channels is not None) == (weights.width is not None) == diffusion


def test_facts_of_stable_diffusion():
    one, two, inpainting, unclip = (
        facts_of_config(OmegaConf.load(ROOT / MODELS[name]["config"]).model)
        for name in ("sd_v1", "sd_v2_base", "sd_v1_5_inpainting", "sd_v2_1_unclip_h")
    )
    assert (one.channels, one.context, one.linear, one.conditioner) == (4, 768, False, "CLIP")
    assert two == replace(one, context=1024, linear=True, conditioner="OpenCLIP")
    assert inpainting == replace(one, channels=9) and unclip == replace(two, labels=2048)
    assert [str(d) for d in differences(one, two)][0] == "context width: 768 in the config, 1024 in the checkpoint"


def test_facts_of_a_model_of_videos():
    """Like Stable Diffusion 2 but for the layers between frames, whose transformers have no context."""
    two, video = (
        OmegaConf.load(ROOT / "configs" / file).model for file in ("stable-diffusion/v2-inference.yaml", VIDEOFUSION)
    )
    facts = facts_of_config(video)
    assert facts == replace(facts_of_config(two), video=True)
    with torch.device("meta"):
        state = instantiate_from_config(video.params.unet_config).state_dict()
    weights = facts_of_weights({f"model.diffusion_model.{key}": value for key, value in state.items()})
    assert weights == replace(facts, first_stage=None, conditioner=None)


def test_a_config_of_something_else():
    with pytest.raises(ValueError, match="not the config of a model of this family: torch.nn.Linear lacks 'ddconfig'"):
        facts_of_config({"target": "torch.nn.Linear", "params": {"in_features": 2}})


# What a network predicts


def test_one_prediction_on_noise_tells_eps_from_v():
    """emoji64 predicts v; the same network, its output turned into eps, predicts eps."""
    model = load_model(FILES[1], FILES[3])
    t, context = torch.tensor([999]), torch.zeros(1, 16, 192)
    for seed in range(3):
        assert measured_prediction(lambda x: model.apply_model(x, t, context), (1, 24, 8, 8), seed) == "v"
        assert (
            measured_prediction(
                lambda x: model.predict_eps_from_z_and_v(x, t, model.apply_model(x, t, context)), (1, 24, 8, 8), seed
            )
            == "eps"
        )
    assert measured_prediction(lambda x: -x, (1, 4, 8, 8)) is None


@pytest.mark.parametrize(
    "text, stated",
    [
        ('{"prediction_type": "v_prediction"}', "v"),
        ('{"prediction_type": "epsilon"}', "eps"),
        ("{}", "eps"),
        ('{"prediction_type": "other"}', None),
        ("[", None),
        ("[]", None),
        (None, None),
    ],
)
def test_a_folders_scheduler_states_it(tmp_path, text, stated):
    if text is not None:
        (tmp_path / "scheduler").mkdir()
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    assert stated_prediction(tmp_path) == stated


@pytest.mark.parametrize(
    "file, helps",
    [("stable-diffusion/v2-inference.yaml", "v2-inference-v.yaml"), (VIDEOFUSION, "if the network is trained")],
)
def test_what_helps_to_choose_is_said_of_the_model_at_hand(file, helps):
    assert helps in which_prediction(OmegaConf.load(ROOT / "configs" / file))


# The script


def test_the_machine(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in out and "computes in float32" in out
    assert "published models are not here" in out and "FAULT" not in out


def test_formats_that_a_device_does_not_compute_in_are_left_out(monkeypatch):
    real = torch.nn.functional.conv2d

    def conv2d(x, weight):
        if x.dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return real(x, weight)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    assert computes(torch.device("cpu")) == "computes in float32, bfloat16"


def test_published_models_that_are_here(tmp_path):
    models = list(load_manifest().values())
    good, bad, plain = (next(m for m in models if m.name == name) for name in ("sd-v1-4", "sd-v1-5", "kl-f8"))
    good = good.model_copy(
        update={"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    )  # of no bytes
    for model in (good, bad, plain):
        model.file(tmp_path).parent.mkdir(parents=True, exist_ok=True)
        model.file(tmp_path).touch()
    save_file({"a": torch.zeros(1)}, plain.file(tmp_path))
    here = [good, bad, plain, next(m for m in models if m.name == "vq-f4")]
    lines = [str(finding) for finding in published(here, False, tmp_path)]
    assert lines[0] == "ok    sd-v1-4: here, not verified (--verify); configs/stable-diffusion/v1-inference.yaml"
    assert lines[-1].startswith("note  1 published models are not here: vq-f4")
    lines = [str(finding) for finding in published(here, True, tmp_path)]
    assert "here, as published" in lines[0] and "no published SHA-256" in lines[2]
    assert lines[1].startswith("FAULT sd-v1-5:") and "download_models.py sd-v1-5" in lines[1]


def test_each_published_model_has_its_config():
    for model in load_manifest().values():
        assert (ROOT / model.config).is_file(), model.name


def test_files_that_belong_together(capsys):
    assert main(FILES) == 0
    out = capsys.readouterr().out
    assert "every weight has its place" in out
    assert "parameterization v: one prediction on pure noise looks like v" in out


def test_the_wrong_parameterization(tmp_path, capsys):
    config = OmegaConf.load(FILES[1])
    config.model.params.parameterization = "eps"
    OmegaConf.save(config, tmp_path / "c.yaml")
    assert main(["--config", str(tmp_path / "c.yaml"), *FILES[2:]]) == 1
    out = capsys.readouterr().out
    assert "FAULT parameterization eps in the config, but one prediction on pure noise looks like v" in out
    assert "-> set parameterization: v in the config's model.params" in out


def sd2(path: Path) -> Path:
    """A file with just what tells Stable Diffusion 2."""
    unet, transformer = "model.diffusion_model.", "model.diffusion_model.input_blocks.1.1."
    sizes = {
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{transformer}proj_in.weight": (320, 320),
        f"{transformer}transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
        "cond_stage_model.model.token_embedding.weight": (1, 1024),
    }
    sizes |= {f"first_stage_model.encoder.down.{i}.block.0.norm1.bias": (1,) for i in range(4)}
    save_file({key: torch.zeros(size) for key, size in sizes.items()}, path)
    return path


def test_the_config_of_another_model(tmp_path, capsys):
    config = str(ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml")
    assert main(["--config", config, "--ckpt", str(sd2(tmp_path / "m.safetensors"))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAULT context width: 768 in the config, 1024 in the checkpoint" in lines
    assert "FAULT conditioner: CLIP in the config, OpenCLIP in the checkpoint" in lines
    assert lines[-1].endswith(
        "fits --config configs/stable-diffusion/v2-inference.yaml or configs/stable-diffusion/v2-inference-v.yaml"
    )
    assert not any("first stage" in line for line in lines)


def test_a_checkpoint_that_lacks_a_weight(tmp_path, capsys):
    state = load_file(FILES[3])
    del state["model.diffusion_model.out.2.bias"]
    save_file(state, tmp_path / "m.safetensors")
    assert main([*FILES[:3], str(tmp_path / "m.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "FAULT" in out and "1 missing (model.diffusion_model.out.2.bias)" in out
    assert "-> the checkpoint fits no published config; it is: input channels of the network: 24" in out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path, capsys, value):
    state = load_file(FILES[3])
    state["model.diffusion_model.out.2.bias"][3] = value
    save_file(state, tmp_path / "m.safetensors")
    assert main([*FILES[:3], str(tmp_path / "m.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "FAULT 1 weights hold NaN or infinite numbers (model.diffusion_model.out.2.bias)" in out
    assert "looks like" not in out


def test_the_prediction_is_measured_with_as_many_tokens_as_the_model_reads():
    model, asked = load_model(FILES[1], FILES[3]), []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: asked.append(args[2].shape))
    assert [finding.kind for finding in prediction(OmegaConf.load(FILES[1]), model, Path(FILES[3]))] == ["ok"]
    assert {shape[1] for shape in asked} == {16}


def test_weights_of_whole_numbers(tmp_path, capsys):
    state = load_file(FILES[3])
    state["model.diffusion_model.out.2.bias"] = state["model.diffusion_model.out.2.bias"].to(torch.int64)
    save_file(state, tmp_path / "m.safetensors")
    assert main([*FILES[:3], str(tmp_path / "m.safetensors")]) == 1
    assert "not floating-point numbers (model.diffusion_model.out.2.bias torch.int64, config" in capsys.readouterr().out


def test_a_config_that_does_not_build(tmp_path, capsys):
    config = OmegaConf.load(FILES[1])
    config.model.params.cond_stage_config.params.tokenizer = "missing.json"
    OmegaConf.save(config, tmp_path / "c.yaml")
    assert main(["--config", str(tmp_path / "c.yaml"), *FILES[2:]]) == 1
    assert re.search("FAULT the config does not build a model: .*missing.json: no such", capsys.readouterr().out)


def test_a_stage_of_deepfloyd_if(tmp_path, capsys):
    """What its folder describes, whether the weights are those, and whether T5 is beside them."""
    unet = write_t5(tmp_path) / "unet"
    unet.mkdir()
    state = recipe_state(deepfloyd_params(FIRST), seed=1, gain=0.6)
    (unet / "config.json").write_text(json.dumps(FIRST))
    save_file(state, unet / "diffusion_pytorch_model.safetensors")
    assert main(["--ckpt", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "stage 1 of DeepFloyd-IF, images of 8 x 8 pixels, channels 32, 64; it reads states of width 32" in printed
    assert "ok    every weight has its place" in printed and "ok    T5 is beside it: " in printed

    (tmp_path / "text_encoder" / "config.json").unlink()
    state["conv_in.bias"][0] = float("nan")
    save_file(state, unet / "diffusion_pytorch_model.safetensors")
    assert main(["--ckpt", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAULT 1 weights hold NaN or infinite numbers" in printed and "note  no T5 beside it" in printed

    (unet / "config.json").write_text(json.dumps(FIRST | {"encoder_hid_dim": 64}))
    assert main(["--ckpt", str(tmp_path)]) == 1
    assert "FAULT " in (printed := capsys.readouterr().out) and "v_proj.bias (32,), config (64,)" in printed
    (unet / "config.json").write_text("{}")
    assert main(["--ckpt", str(tmp_path)]) == 2
    assert "--ckpt: not the config.json of a stage of DeepFloyd-IF" in capsys.readouterr().err


def test_a_first_stage_by_itself(tmp_path, capsys):
    config = OmegaConf.load(FILES[1]).model.params.first_stage_config
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "c.yaml")
    prefix = "first_stage_model."
    state = {k.removeprefix(prefix): v for k, v in load_file(FILES[3]).items() if k.startswith(prefix)}
    save_file(state, tmp_path / "m.safetensors")
    assert main(["--config", str(tmp_path / "c.yaml"), "--ckpt", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "first stage: KL, 24 channels, factor 8" in out and "parameterization" not in out


@pytest.mark.parametrize(
    "args, why",
    [
        (["--config", "c.yaml"], "--config: c.yaml: no such file"),
        ([*FILES, "--verify"], "--verify: not with --config"),
        (["--config", "c.yaml", "--ckpt", "m.ckpt"], "--config: c.yaml: no such file"),
        ([*FILES[:3], "m.ckpt"], "--ckpt: m.ckpt: no such file"),
    ],
)
def test_bad_arguments(args, why, capsys):
    assert main(args) == 2
    output = capsys.readouterr()
    assert why in output.err and output.err.count("\n") == 1 and output.out == ""
