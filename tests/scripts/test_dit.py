"""scripts/dit.py end to end at a tiny width, and what joins a published transformer and its first stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from ldm.checkpoint import read_checkpoint, save_weights
from ldm.checkpoint.diagnosis import differences, facts_of_config, facts_of_weights
from ldm.checkpoint.model import load_config
from ldm.models.diffusion.propagation.load import load_plan
from tests.helpers.paths import ROOT
from tests.helpers.scripts import Script, check_resume, load_script
from tests.helpers.tiny_models import tiny_transformer

PUBLISHED = "configs/dit/dit-xl-2-256.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_transformer(tmp_path_factory.mktemp("dit"), PUBLISHED)


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script("dit", tmp_path, *files)


SHORT = ["--steps", "8", "--plan", "0,3,5", "--classes", "207"]


def test_the_defaults_are_the_authors(script):
    args = script.main.args[0].parse_args([])
    assert (args.sampler, args.steps, args.plan) == ("ddpm-learned", 250, "dit250")
    assert (args.noise_below, args.noise_order) == (300.0, "update")
    assert len(load_plan(args.plan, args.steps).keys) == 113


def test_an_image_says_how_it_was_made(script):
    (made,) = script(*SHORT)
    expected = {"class": 207, "sampler": "ddpm-learned", "steps": 8, "scale": 4.0, "uncond_class": 1000}
    assert made.items() >= (expected | {"keys": [0, 3, 5], "noise_weight": 0.003}).items()
    assert script.pixels(made).shape == (32, 32, 3)


def test_key_timesteps_by_calibration(tmp_path, capsys):
    """Classes take the place of prompts; a transformer has no outermost blocks, so that level is not measured."""
    model = tiny_transformer(tmp_path / "model", PUBLISHED)
    calibrate, short = load_script("calibrate_plan").main, ["--sampler", "ddim", "--steps", "5", "--scale", "4"]
    assert calibrate([*model, *short, "--n_samples", "2", "--keys", "3", "--level", "encoder", "skip"]) == 0
    (file,) = (Path(model[3]).parent / "calibration").iterdir()
    content = json.loads(file.read_text())
    assert content["how"] == {"classes": 2, "seed": 42} and content["rest"].keys() == {"encoder", "skip"}
    script = Script("dit", tmp_path, *model)
    made = script(*short, "--plan", "auto:3", "--classes", "207")[-1]
    assert len(made["keys"]) == 3
    capsys.readouterr()
    assert calibrate([*model, *short, "--keys", "3", "--level", "deepcache"]) == 2
    assert "--level: deepcache needs outermost blocks" in capsys.readouterr().err


def test_a_model_names_its_classes_and_the_one_that_stands_for_none(tmp_path):
    changes = {"unet_config__params__num_classes": 2, "cond_stage_config__params__n_classes": 3}
    small = tiny_transformer(tmp_path / "small", PUBLISHED, **changes)
    config = OmegaConf.load(small[1])
    config.sampling = {"scale": 2.0, "uncond_class": 2}
    OmegaConf.save(config, small[1])
    (Path(small[3]).parent / "classes.txt").write_text("round things, round\nsquare things\nnone\n")
    script = Script("dit", tmp_path, *small)
    made = script("--steps", "2", "--plan", "off")
    assert [(entry["class"], entry["uncond_class"], entry["scale"]) for entry in made] == [(0, 2, 2.0), (1, 2, 2.0)]
    (one,) = script("--steps", "2", "--plan", "off", "--classes", "Square things", "--again")
    assert one["class"] == 1


def test_parallel_is_serial(script):
    shown = []
    for number in ("1", "8"):
        script(*SHORT, "--again", "--parallel", number)
        shown.append(script.pixels(script.entries()[0]))
    assert np.abs(shown[0] - shown[1]).max() <= 1


def test_other_solvers_and_forecasts_take_it_too(script):
    shown = [
        script.pixels(script(*SHORT, *flags)[0])
        for flags in ([], ["--sampler", "ddim"], ["--sampler", "dpm-solver++"], ["--plan", "skip:2"])
    ]
    assert all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])


def test_what_is_there_is_not_made_again(script, capsys):
    check_resume(script, capsys, *SHORT, "88", "--n_samples", "2", "--batch_size", "3")


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--classes", "1001"], "--classes: expected 0..1000, the classes of this model; got 1001"),
        (["--plan", "deepcache:2"], "--plan: 1 blocks are to run anew; this network has 0 on each side"),
        (
            ["--plan", "tgate:2"],
            "--plan: tgate needs cross-attention as in Stable Diffusion, which this model's network lacks",
        ),
        (["--tome", "0.5"], "--tome: a diffusion transformer merges no tokens; accepted: 0; got 0.5"),
        (["--image-size", "128"], "--image-size: invalid choice: 128"),
        (["--image-size", "512"], "--image-size: one of the published models; leave it out beside --config or --ckpt"),
    ],
)
def test_bad_input(script, capsys, arguments, why):
    assert script.refusal(capsys, *SHORT, *arguments).startswith(why)


def test_weights_of_another_size(script, files, tmp_path, capsys):
    other = tiny_transformer(tmp_path / "other", PUBLISHED, image_size=8, unet_config__params__input_size=8)
    line = Script("dit", tmp_path, *other[:2], *files[2:]).refusal(capsys, *SHORT)
    assert re.search(r"pos_embed \(1, 4, 32\), config \(1, 16, 32\)", line)


def test_a_network_without_a_variance(tmp_path, capsys):
    plain = tiny_transformer(tmp_path / "plain", PUBLISHED, unet_config__params__learn_sigma=False)
    line = Script("dit", tmp_path, *plain).refusal(capsys, *SHORT)
    assert line.startswith("--sampler: ddpm-learned needs a network that predicts a variance")
    assert Script("dit", tmp_path, *plain)(*SHORT, "--sampler", "ddpm")


# The published weights


def test_a_published_transformer_is_joined_with_a_first_stage(files, tmp_path, capsys):
    state = read_checkpoint(files[3])
    parts = {prefix: {} for prefix in ("model.diffusion_model.", "first_stage_model.")}
    for key, value in state.items():
        for prefix, part in parts.items():
            if key.startswith(prefix):
                part[key.removeprefix(prefix)] = value
    transformer, vae, out = (str(tmp_path / f"{name}.safetensors") for name in ("dit", "vae", "out"))
    for path, part in zip((transformer, vae), parts.values(), strict=True):
        save_weights(path, part)
    main = load_script("convert").main
    assert main([transformer, "--to", "ldm", "--vae", vae, "--out", out]) == 0
    joined = read_checkpoint(out)
    assert joined.keys() == {key for key in state if key.startswith((*parts,))}
    assert all((value == state[key]).all() for key, value in joined.items())
    for config in (files[:2], []):
        line = Script("dit", tmp_path, *config, "--ckpt", transformer).refusal(capsys, *SHORT)
        assert line.endswith("without its first stage; scripts/convert.py --to ldm --vae FILE adds it")
        assert load_script("doctor").main([*config, "--ckpt", transformer]) == 2
        assert "without its first stage" in capsys.readouterr().err
    assert main([transformer, "--to", "ldm", "--out", out]) == 2
    assert "dit.safetensors: a file; --to ldm converts a diffusers folder, or with --vae a" in capsys.readouterr().err
    assert main([files[3], "--to", "diffusers", *files[:2], "--out", str(tmp_path / "folder")]) == 2
    assert "folders are written for Stable Diffusion 1, 2 and XL" in capsys.readouterr().err
    for wrong, why in ((("vae", "vae"), "source: not a published DiT"), (("dit", "dit"), "--vae: not a first stage")):
        arguments = [str(tmp_path / f"{name}.safetensors") for name in wrong]
        assert main([arguments[0], "--to", "ldm", "--vae", arguments[1], "--out", out]) == 2
        assert why in capsys.readouterr().err


def test_configs_and_weights_are_told_apart(files):
    weights = facts_of_weights(read_checkpoint(files[3]))
    own, large = (facts_of_config(load_config(path).model) for path in (files[1], ROOT / PUBLISHED))
    assert differences(own, weights) == []
    assert {difference.name for difference in differences(large, weights)} == {"width", "positions"}


def test_plans_are_listed_without_those_that_run_outer_blocks_alone(script, capsys):
    assert script.main([*script.common, "--list-plans", "--steps", "20"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"off", "skip:3", "dit250"} <= {*listed} and not any(name.startswith("deepcache") for name in listed)
