"""Bad input to scripts/txt2img.py: one line that names the argument, exit code 2, nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import read_checkpoint, save_weights
from tests.helpers.paths import ROOT, SCRIPTS
from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import tiny_params, write_model

main = load_script("txt2img").main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def refused(files, tmp_path, capsys):
    """Run the command line; check that it refuses in one line and leaves nothing; return that line."""

    def run(*arguments: str, config: Path | None = None, ckpt: Path | None = None, steps: str | None = "5") -> str:
        kept = sorted(tmp_path.rglob("*"))
        code = main(
            [
                "--config",
                str(config or files[0]),
                "--ckpt",
                str(ckpt or files[1]),
                "--outdir",
                str(tmp_path / "out"),
                *(() if steps is None else ("--steps", steps)),
                "--n_samples",
                "1",
                *arguments,
            ]
        )
        output = capsys.readouterr()
        # What goes wrong on the way does so after the line that says what is to be done.
        assert code == 2 and re.fullmatch("(plan .*\n)?", output.out)
        (line,) = output.err.splitlines()
        assert line.startswith("txt2img.py: error: --")
        assert sorted(tmp_path.rglob("*")) == kept
        return line.removeprefix("txt2img.py: error: ")

    return run


@pytest.mark.parametrize(
    "arguments, why",
    [
        # Plans
        (["--plan", "nonsense"], "--plan: .*'nonsense'.*accepted: off, uniform:N.*faster-diffusion"),
        (["--plan", "fasterdiffusion"], "--plan: .*; did you mean faster-diffusion"),
        (["--plan", "1,2,3"], "--plan: .*must start with node 0"),
        (["--plan", "0,2,2"], "--plan: .*strictly"),
        (["--plan", "0,1,50"], "--plan: key 50 is past the last node 4"),
        (["--plan", "uniform:0"], "--plan: a uniform plan needs N >= 1"),
        (["--plan", "nowhere.yaml"], "--plan: .*nowhere.yaml"),
        (["--compare", "--plan", "off"], "--plan: off skips no encoder"),
        (["--parallel", "0"], "--parallel: expected auto or a whole number in 1..1000000; got '0'"),
        (["--noise-weight", "-1"], "--noise-weight: expected a number in 0..100"),
        (["--noise-weight", "nan"], "--noise-weight: expected"),
        (["--noise-order", "sideways"], "--noise-order: .*'sideways'.*before.*after"),
        (["--guidance-reuse", "--plan", "deepcache:3"], "--guidance-reuse: .*deepcache:3 has other steps"),
        (["--guidance-interval", "800,200"], "--guidance-interval: .*must be low,high; got 800,200"),
        # Sizes
        (["--H", "17"], "--H: must be a multiple of 4 for this model; got 17"),
        (["--W", "18"], "--W: must be a multiple of 4 for this model; got 18"),
        (["--H", "0"], "--H/--height: expected a whole number in 1..16384"),
        (["--C", "3"], "--C: this model's is 4; got 3"),
        (["--f", "8"], "--f: this model's is 2; got 8"),
        # Numbers
        (["--n_samples", "0"], "--n_samples: expected a whole number in 1..1000000; got '0'"),
        (["--n_iter", "0"], "--n_iter: expected"),
        (["--repeat", "-1"], "--repeat: expected"),
        (["--n_rows", "-1"], "--n_rows: expected"),
        (["--n_samples", "many"], "--n_samples: .*'many'"),
        (["--steps", "0"], "--steps.*: expected"),
        (["--steps", "2000"], "--steps: .*1..1000.*2000"),
        (["--ddim_eta", "1.5"], "--ddim_eta: expected a number in 0..1"),
        (["--scale", "inf"], "--scale/--guidance_scale: expected"),
        (["--seed", "-3"], "--seed: expected 0..2"),
        (["--seed", "1.5"], "--seed: expected"),
        # Prompts, samplers, devices, other choices
        (["--from-file", "nowhere.txt"], "--from-file: .*nowhere.txt"),
        (["--prompt", "a", "--from-file", "b"], "--from-file: not allowed with argument --prompt"),
        (["--sampler", "magic"], "--sampler: .*'magic'.*accepted: .*ddim"),
        (["--sampler", "uni-pc"], "--sampler: .*; did you mean unipc\\?"),
        (["--negative_prompt", "grey", "--scale", "1"], "--negative_prompt: needs guidance"),
        (["--guidance-interval", "200,800", "--scale", "1"], "--guidance-interval: needs guidance"),
        (["--guidance-reuse", "--scale", "1"], "--guidance-reuse: needs guidance"),
        (["--guidance-forecast", "linear", "--scale", "1"], "--guidance-forecast: needs guidance"),
        (["--fp16", "--precision", "full"], "--precision: not allowed with argument --fp16"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there; on this machine: auto, .*cpu"),
        (["--device", "toaster"], "--device: toaster is not there"),
        (["--precision", "half"], "--precision: .*'half'.*full.*autocast"),
        (["--weights", "best"], "--weights: .*'best'.*auto.*ema.*raw"),
        (["--weights", "ema"], "--ckpt: .*'ema' asked for, but the file has no model_ema"),
        (["--config", "nowhere.yaml"], "--config: nowhere.yaml: no such file"),
        (["--ckpt", "nowhere.ckpt"], "--ckpt: nowhere.ckpt: no such file"),
        (["--spacing", "cosine"], "--spacing: .*'cosine'.*time.*logsnr.*karras.*quad"),
        (["--sampler", "dpm++2m-karras", "--spacing", "time"], "--spacing: must be karras for this solver; got 'time'"),
        (["--timesteps-at", "981,500"], "--timesteps-at: 2 timesteps are 2 steps; got 5 steps beside them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(refused, arguments, why):
    assert re.match(why, refused(*arguments))


@pytest.mark.parametrize(
    "timesteps, more, why",
    [
        ("981,500,500", (), "--timesteps-at: timesteps must fall strictly.*; got 500 after 500"),
        ("1000,500", (), "--timesteps-at: timesteps must be 1..999 .*; got 1000"),
        ("500,0", (), "--timesteps-at: timesteps must be 1..999 .* lands on 0; got 0"),
        ("981;500", (), "--timesteps-at: expected a whole number in 0..10000; got '981;500'"),
        ("981,500", ("--spacing", "quad"), "--spacing: must be left out where the timesteps are given"),
        ("981,500", ("--plan", "0,1,2"), "--plan: key 2 is past the last node 1"),
    ],
)
def test_bad_timesteps_of_ones_own(refused, timesteps, more, why):
    assert re.match(why, refused("--timesteps-at", timesteps, *more, steps=None))


def test_eta_needs_a_sampler_that_takes_it(refused):
    for flag, name in (("--plms", "plms"), ("--dpm", "dpm-solver++-published")):
        line = refused(flag, "--ddim_eta", "0.5")
        assert line == f"--ddim_eta: {name} has no choice of it; expected 0, or a sampler that has: ddim; got 0.5"


def test_unknown_and_shortened_flags_are_refused(capsys):
    for flags, near in (
        (["--tint", "red"], ""),
        (["--n_sample", "3"], "; did you mean --n_samples?"),
        (["--hight=3"], "; did you mean --height?"),
    ):
        assert main(flags) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"txt2img.py: error: unrecognized arguments: {' '.join(flags)}{near}"
        ]


def test_empty_and_unreadable_prompt_files(refused, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n\n")
    line = refused("--from-file", str(tmp_path / "empty.txt"))
    assert line.startswith("--from-file: ") and line.endswith("is empty; expected one prompt per line")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert refused("--from-file", str(tmp_path / "binary.txt")).startswith("--from-file: ")
    assert refused("--from-file", str(tmp_path)).startswith("--from-file: ")


def test_plan_files_that_are_none(refused, tmp_path):
    for name, text in (
        ("broken.yaml", "steps: ["),
        ("foreign.yaml", "a: 1"),
        ("late.yaml", "source: me\nsteps: {5: [1, 2]}"),
    ):
        (tmp_path / name).write_text(text)
        assert refused("--plan", str(tmp_path / name)).startswith("--plan: ")


# Checkpoints


@pytest.mark.parametrize(
    "content, why",
    [(b"", "the file is empty"), (b"<html>404</html>", "web page"), (b"\x00" * 64, "neither a safetensors")],
)
def test_files_that_are_no_checkpoint(refused, tmp_path, content, why):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    assert re.match(f"--ckpt: {path}: .*{why}", refused(ckpt=path))


def test_truncated_checkpoints(refused, files, tmp_path):
    short = tmp_path / "short.safetensors"
    short.write_bytes(files[1].read_bytes()[:50_000])
    assert re.match(f"--ckpt: {short}: truncated", refused(ckpt=short))
    whole, half = tmp_path / "whole.ckpt", tmp_path / "half.ckpt"
    torch.save({"state_dict": read_checkpoint(files[1])}, whole)
    half.write_bytes(whole.read_bytes()[:50_000])
    assert re.match(f"--ckpt: {half}: truncated", refused(ckpt=half))


def test_a_checkpoint_of_another_model(refused, tmp_path):
    path = tmp_path / "other.safetensors"
    save_weights(path, {"model.weight": torch.zeros(2), "encoder.bias": torch.zeros(1)})
    line = refused(ckpt=path)
    assert re.match(r"--ckpt: .*another model.*missing \(.* more\); 2 unexpected \(encoder.bias", line)


def test_a_folder_that_is_no_model(refused, tmp_path):
    for part in ("unet", "vae"):
        line = refused(ckpt=tmp_path)
        assert re.match(rf"--ckpt: {tmp_path}: a folder without unet/diffusion_pytorch_model.safetensors", line)
        (tmp_path / part).mkdir()


def test_a_folder_whose_network_predicts_something_else(refused, tmp_path):
    """Names and shapes do not tell; the folder's scheduler does."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    line = refused(ckpt=tmp_path)
    assert re.match(f"--config: its parameterization is eps; the network in {tmp_path} predicts v, its scheduler", line)


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_checkpoint_that_wants_to_run_code(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "extra": Evil()}, path)
    assert re.match("--ckpt: .*refused, because the pickle asks for code .(posix|nt).system", refused(ckpt=path))
    assert not (tmp_path / "hacked").exists()


# Configs


def config_file(path: Path, params: dict, target: str = "ldm.models.diffusion.ddpm.LatentDiffusion") -> Path:
    OmegaConf.save(OmegaConf.create({"model": {"target": target, "params": params}}), path)
    return path


def test_a_config_for_another_model(refused, files, tmp_path):
    params = tiny_params(files[0].parent)
    params["unet_config"]["params"]["model_channels"] = 64
    line = refused(config=config_file(tmp_path / "wide.yaml", params))
    assert re.match("--ckpt: .*config of another model.*of another shape", line)


def test_configs_that_are_none(refused, tmp_path):
    path = tmp_path / "config.yaml"
    other = "not the config of a latent diffusion model"
    for text, why in (
        ("model: [", "not YAML"),
        ("a: 1", "model is missing"),
        ("model: {target: os.system, params: {}}", "'os.system' is outside the allowed packages"),
        ("model: {target: torch.nn.Linear}", "'torch.nn.Linear': missing a required argument"),
        ("model: {target: torch.nn.Identity}", other),
    ):
        path.write_text(text)
        assert re.match(f"--config: .*{why}", refused(config=path))


def test_configs_that_build_no_model(refused, files, tmp_path):
    good = tiny_params(files[0].parent)
    for number, (change, why) in enumerate(
        (
            ({"unet_config": good["unet_config"] | {"target": "os.system"}}, "outside the allowed packages"),
            ({"colour": "red"}, "colour"),
            ({"parameterization": "y"}, "parameterization"),
            (
                {
                    "cond_stage_config": {
                        "target": "ldm.modules.encoders.modules.BERTEmbedder",
                        "params": {"n_embed": 16, "n_layer": 1, "tokenizer": "nowhere.json"},
                    }
                },
                "tokenizer.*nowhere.json",
            ),
        )
    ):
        line = refused(config=config_file(tmp_path / f"{number}.yaml", good | change))
        assert re.match(f"--config: .*{why}", line)


def test_a_model_that_takes_no_text(refused, files, tmp_path):
    params = tiny_params(files[0].parent) | {
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"embed_dim": 16, "n_classes": 3},
        }
    }
    state = {key: value for key, value in read_checkpoint(files[1]).items() if "cond_stage" not in key}
    state["cond_stage_model.embedding.weight"] = torch.zeros(3, 16)
    ckpt = tmp_path / "classes.safetensors"
    save_weights(ckpt, state)
    line = refused(config=config_file(tmp_path / "classes.yaml", params), ckpt=ckpt)
    assert re.match("--config: not a text-to-image model: its conditioner ClassEmbedder takes no text", line)


def test_a_text_encoder_without_its_vocabulary_says_so(refused, files, tmp_path):
    params = tiny_params(files[0].parent)
    del params["cond_stage_config"]["params"]["tokenizer"]
    line = refused(config=config_file(tmp_path / "mute.yaml", params))
    assert re.match("--config: text needs a tokenizer, .*set tokenizer to", line)


def test_a_config_without_its_checkpoint_or_the_other_way_round(files, tmp_path, capsys):
    def error(*arguments: str) -> str:
        assert main([*arguments, "--outdir", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err.removeprefix("txt2img.py: error: ")

    config = tmp_path / "alone" / "config.yaml"
    config.parent.mkdir()
    config.write_bytes(files[0].read_bytes())
    why = (
        "--ckpt: needed together with config .*, since there is no model.safetensors beside it, and no published model"
    )
    assert re.match(why, error("--config", str(config)))
    few = ["--steps", "1", "--n_samples", "1", "--outdir", str(tmp_path / "beside")]
    assert main(["--config", str(files[0]), *few]) == 0  # its weights are beside it
    capsys.readouterr()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(files[1].read_bytes())
    assert re.match(
        "--config: needed together with ckpt .*, which fits no published config; it is: input channels",
        error("--ckpt", str(alone)),
    )
    configs = ROOT / "configs"
    assert re.match(
        "--ckpt: needed .*several published models have it: sd-v1-4, sd-v1-5",
        error("--config", str(configs / "stable-diffusion" / "v1-inference.yaml")),
    )
    for arguments in (["--laion400m"], ["--config", str(configs / "latent-diffusion" / "txt2img-1p4B-eval.yaml")]):
        assert re.match(
            "--ckpt: .*text2img-large/model.ckpt: no such file, nor a diffusers folder; "
            "python scripts/download_models.py txt2img-1p4B fetches it",
            error(*arguments),
        )
    # The file of DiT that is published is not the one that is read.
    assert re.search(
        "no such file, nor a diffusers folder; python scripts/download_models.py dit-xl-2-256 fetches "
        r"DiT-XL-2-256x256.pt \(.*see docs/dit.md\)$",
        error("--ckpt", str(ROOT / "models" / "dit" / "dit-xl-2-256" / "model.safetensors")),
    )


# Output


def test_places_that_can_not_be_written(refused, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "deeper"):
        assert refused("--outdir", str(place)) == f"--outdir: {file} is a file; expected a directory"
    if Path("/proc/self").is_dir():
        assert re.match("--outdir: can't write to /proc/none", refused("--outdir", "/proc/none"))


# Numbers that go wrong on the way


def test_latents_that_are_not_finite_name_step_and_layer(refused, files, tmp_path):
    state = dict(read_checkpoint(files[1]))
    key = "model.diffusion_model.output_blocks.1.0.out_layers.3.weight"
    state[key] = torch.full_like(state[key], float("nan"))
    save_weights(tmp_path / "nan.safetensors", state)
    line = refused(ckpt=tmp_path / "nan.safetensors")
    assert re.match(r"--ckpt: latents are not finite after node 0 of 5 ", line)
    assert "output_blocks.1.0.out_layers.3" in line
    line = refused("--precision", "autocast", ckpt=tmp_path / "nan.safetensors")
    assert line.startswith("--precision: latents are not finite")


def test_images_that_are_not_finite(refused, files, tmp_path):
    state = dict(read_checkpoint(files[1]))
    key = "first_stage_model.decoder.conv_out.bias"
    state[key] = torch.full_like(state[key], float("nan"))
    save_weights(tmp_path / "nan.safetensors", state)
    assert refused(ckpt=tmp_path / "nan.safetensors").startswith("--ckpt: images: expected finite values")


# As a program


def test_the_program_refuses_as_the_function_does(tmp_path):
    command = [sys.executable, str(SCRIPTS / "txt2img.py"), "--n_samples", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "txt2img.py: error: --n_samples: expected a whole number in 1..1000000; got '0'\n"
    assert list(tmp_path.iterdir()) == []
