"""main.py end to end on a tiny dataset: first stage, diffusion, kill, resume, export, sampling."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins import MixedPrecision

from ldm.checkpoint import load_model, load_state, load_weights, read_checkpoint
from ldm.cli.setup import model_files
from ldm.data.emoji import EmojiDataset
from ldm.io.files import UNFINISHED
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.denoiser import eps_from_v, eps_from_x0, v_from_eps
from ldm.modules.ema import LitEma
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.training import watch
from ldm.training.autoencoder import AutoencoderTraining, start_from_principal_components
from ldm.training.callbacks import KeptState, Monitor
from ldm.training.configuration import read_configuration, scale_schedule
from ldm.training.diffusion import DiffusionTraining
from ldm.training.export import sampling_weights
from ldm.training.run import fit
from ldm.training.state import read_state, steps_done
from ldm.util import instantiate_from_config
from main import given_files, main, parser
from tests.helpers.goldens import recipe_weights
from tests.helpers.paths import ROOT
from tests.helpers.processes import Child, quick_help
from tests.helpers.scripts import load_script
from tests.helpers.tiny_data import SIDE, write_data
from tests.helpers.tiny_models import tiny_params

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": SIDE,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "patch_size": 2,
    "linear_shortcut": True,
}
LIGHTNING = {
    "checkpoint_every_minutes": 0.0,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "val_check_interval": 2,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "enable_progress_bar": False,
    },
}


def first_stage_config(data: Path) -> dict:
    return {
        "model": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "ddconfig": DDCONFIG,
                "lossconfig": {"target": "ldm.modules.losses.reconstruction.ReconstructionLoss"},
            },
        },
        "training": {"target": "ldm.training.autoencoder.AutoencoderTraining", "params": {"learning_rate": 1e-3}},
        "data": {
            "target": "ldm.training.data.EmojiImagesData",
            "params": {"root": str(data), "batch_size": 4, "val_split": "heldout_pair"},
        },
        "lightning": LIGHTNING,
    }


def diffusion_config(data: Path, folder: Path) -> dict:
    """On the first stage that the run `folder`/first exported."""
    params = tiny_params(folder) | {"cond_stage_trainable": True, "parameterization": "v"}
    weights = str(folder / "first.safetensors")
    params["first_stage_config"] = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": 4, "ddconfig": DDCONFIG, "ckpt_path": weights},
    }
    return {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
        "training": {
            "target": "ldm.training.diffusion.DiffusionTraining",
            "params": {"learning_rate": 1e-3, "sample_steps": 2},
        },
        "data": {
            "target": "ldm.training.data.EmojiLatentsData",
            "params": {
                "root": str(data),
                "batch_size": 4,
                "max_tier": 1,
                "first_stage": {"config": str(folder / "first.yaml"), "ckpt": weights},
            },
        },
        "lightning": LIGHTNING,
    }


def steps_of(logdir: Path) -> int:
    return steps_done(logdir / "last.ckpt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the runs `first` (a first stage, exported) and `second` (a diffusion model on it)."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "data"
    data.mkdir()
    write_data(data)
    train_tokenizer(["a thing 0, noto style"], 60, 8).save(str(folder / "tokenizer.json"))
    OmegaConf.save(OmegaConf.create(first_stage_config(data)), folder / "first.yaml")
    OmegaConf.save(OmegaConf.create(diffusion_config(data, folder)), folder / "second.yaml")
    export = load_script("export_model").main
    assert main(["-b", str(folder / "first.yaml"), "-t", "-l", str(folder)]) == 0
    assert export([str(folder / "first"), "--out", str(folder / "first.safetensors"), "--normalize"]) == 0
    assert main(["-b", str(folder / "second.yaml"), "-t", "-l", str(folder)]) == 0
    assert export([str(folder / "second"), "--out", str(folder / "second.safetensors")]) == 0
    return folder


def test_a_run_leaves_all_it_made(trained):
    for run in ("first", "second"):
        for made in ("config.yaml", "last.ckpt", "metrics/00000000/metrics.csv", "samples/00000002.png"):
            assert (trained / run / made).is_file(), f"{run}/{made}"
        assert list((trained / run / "tensorboard").glob("events.out.tfevents*"))


def test_the_exported_first_stage_has_normalized_latents(trained):
    model = instantiate_from_config(OmegaConf.load(trained / "first.yaml").model).eval()
    model.load_state_dict(read_checkpoint(trained / "first.safetensors"))
    data = EmojiDataset(trained / "data")
    with torch.no_grad():
        z = torch.cat([model.encode(data[i][None]).mean for i in range(len(data))])
    assert z.mean((0, 2, 3)).abs().max() < 0.2  # the statistics are of whole batches: 16 of 19 images
    assert 0.7 < z.std() < 1.3


def test_a_configuration_cannot_allow_itself_packages(trained, tmp_path, capsys):
    """Their code would be run when the run is exported."""
    run = shutil.copytree(trained / "first", tmp_path / "run")
    config = OmegaConf.load(run / "config.yaml")
    command = {"target": "subprocess.Popen", "params": {"args": ["touch", str(tmp_path / "made")]}}
    params = {"batch_size": 1, "packages": ["subprocess"], "train": command}
    config.data = {"target": "main.DataModuleFromConfig", "params": params}
    OmegaConf.save(config, run / "config.yaml")
    argv = [str(run), "--out", str(tmp_path / "m.safetensors"), "--normalize"]
    assert load_script("export_model").main(argv) == 2
    assert "packages can't be set here" in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_the_exported_model_samples_and_holds_the_averages(trained):
    model = load_model(trained / "second.yaml", trained / "second.safetensors")
    z = model.first_stage_model.decode(torch.zeros(1, 4, 8, 8))
    assert z.shape == (1, 3, SIDE, SIDE)
    state = read_state(trained / "second" / "last.ckpt")["state_dict"]
    weights = sampling_weights(state)
    key = "model.diffusion_model.out.2.weight"
    average = state["network_ema.diffusion_modelout2weight"]
    assert torch.equal(weights[key], average) and not torch.equal(state[f"model.{key}"], average)
    torch.testing.assert_close(model.state_dict()[key], average)


def test_the_folder_of_a_run_is_enough_to_sample_from(trained):
    """Its averages are those that are exported; the weights as trained are there, too."""
    config, ckpt = model_files(trained / "second", trained / "second")
    assert (config, ckpt) == (trained / "second" / "config.yaml", trained / "second" / "last.ckpt")
    assert model_files(None, trained / "second") == (config, ckpt)
    exported = read_checkpoint(trained / "second.safetensors")
    for name, value in load_model(config, ckpt).state_dict().items():
        assert torch.equal(value, exported[name]), name
    raw, state = load_state(ckpt, "raw"), read_state(ckpt)["state_dict"]
    key = "model.diffusion_model.out.2.weight"
    assert torch.equal(raw[key], state[f"model.{key}"]) and not torch.equal(raw[key], exported[key])
    encoder = read_checkpoint(trained / "first" / "last.ckpt")["encoder.conv_in.weight"]
    assert torch.equal(
        encoder, read_state(trained / "first" / "last.ckpt")["state_dict"]["model.encoder.conv_in.weight"]
    )


def test_half_precision_is_for_weights_only(trained):
    half, whole = trained / "half.safetensors", read_checkpoint(trained / "second.safetensors")
    assert load_script("export_model").main([str(trained / "second"), "--out", str(half), "--dtype", "fp16"]) == 0
    for key, value in read_checkpoint(half).items():
        assert value.dtype == (torch.float16 if "." in key else torch.float32)
        torch.testing.assert_close(value.float(), whole[key].float(), rtol=1e-3, atol=1e-6)
    part = trained / "part.safetensors"
    assert load_script("export_model").main([str(half), "--part", "first_stage_model", "--out", str(part)]) == 0
    assert read_checkpoint(part).keys() == read_checkpoint(trained / "first.safetensors").keys()


def test_resume_goes_on_where_the_run_stood(trained):
    assert steps_of(trained / "second") == 2
    before = (trained / "second" / "metrics" / "00000000" / "metrics.csv").read_text()
    assert main(["-r", str(trained / "second"), "-t", "lightning.trainer.max_steps=3"]) == 0
    assert steps_of(trained / "second") == 3
    assert (trained / "second" / "metrics" / "00000000" / "metrics.csv").read_text() == before
    assert (trained / "second" / "metrics" / "00000002" / "metrics.csv").is_file()


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Nested values are equal; tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            assert_same(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{place}.{i}")
    else:
        assert a == b, place


def test_a_killed_command_resumes(trained, tmp_path):
    """The command itself, killed when its first state has its name."""
    logdir = tmp_path / "k"

    def work() -> int:
        replace = os.replace

        def replace_and_kill(source, target) -> None:
            replace(source, target)
            if Path(target) == logdir / "last.ckpt":
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_and_kill
        sys.argv = ["main.py", "-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path), "-n", logdir.name]
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")

    assert Child(work, tmp_path / "log").end() == -signal.SIGKILL, (tmp_path / "log").read_text()
    reached = steps_of(logdir)
    assert reached == 1
    assert main(["-r", str(logdir), "-t", f"lightning.trainer.max_steps={reached + 2}"]) == 0
    assert steps_of(logdir) == reached + 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="as many processes as cores at most")
def test_several_processes_train_together(trained, tmp_path):
    """As torchrun starts them; the first one writes the states. The conditioner has weights that are never used."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["-b", str(trained / "second.yaml"), "-t", "-l", str(tmp_path), "-n", "two", "lightning.trainer.devices=2"]
    env = {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    children = [
        Child(lambda: main(run), log, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    assert [child.end() for child in children] == [0, 0], "".join(log.read_text() for log in logs)
    said = [log.read_text() for log in logs]
    assert f"{tmp_path / 'two'}: " in said[0] and "for sampling: " in said[0] and said[1] == ""
    assert steps_of(tmp_path / "two") == steps_done(tmp_path / "two" / "previous.ckpt") + 1 == 2
    assert not list((tmp_path / "two").glob(f"{UNFINISHED}*"))


def test_an_old_run_is_not_overwritten(trained, capsys):
    assert main(["-b", str(trained / "first.yaml"), "-t", "-l", str(trained)]) == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "--base"),
        (["-b", "nothing.yaml"], "no file nothing.yaml"),
        (["-r", "nowhere"], "--resume"),
        (["-b", "n" * 5000], "--base: "),
        (["-r", "n" * 5000], "--resume: "),
        (["-b", "FIRST", "batch_size=3"], "expected KEY=VALUE with the whole name"),
        (["-b", "FIRST", "-t", "data"], "got 'data'"),
        (["-b", "FIRST", "data.params.root=[1"], "data.params.root=[1: "),
        (["-b", "FIRST", "--steps", "0"], "--steps: expected a whole number in 1.."),
        (["-b", "LIST"], "got a list"),
        (["-b", "DAMAGED"], "not YAML"),
        (["-b", "FIRST", "trainer.max_steps=3"], "has 'trainer'; accepted: model"),
        (["-b", "FIRST", "data.parms.batch_size=3"], "data has 'parms'; accepted: target, params; did you mean"),
        (["-b", "FIRST", "data.params.batch_siz=3"], "batch_siz"),
        (["-b", "FIRST", "data.params.batch_size=few"], "batch_size should be a valid integer; got 'few'"),
        (["-b", "FIRST", "training.params.foo=1"], "accepted: model, learning_rate, scheduler_config"),
        (["-b", "FIRST", "lightning.trainer=5"], "lightning.trainer should be a mapping; got 5"),
        (["-b", "FIRST", "lightning.trainer.max_step=3"], "lightning.trainer has 'max_step'; accepted: accelerator, "),
        (["-b", "FIRST", "lightning.trainer.max_steps=few"], "max_steps should be a valid integer; got 'few'"),
        (["-b", "FIRST", "model.params.monitor=${oc.env:HOME}"], "model.params.monitor: '${oc.env:HOME}' reads from"),
        (["-b", "FIRST", "data.params.root=['${ oc.env:HOME}']"], "data.params.root: ['${ oc.env:HOME}'] reads"),
        (["-b", "FIRST", "lightning.trainer.precision=17"], "Precision 17 is invalid"),
        (["-b", "FIRST", "lightning.trainer.logger=false"], "lightning.trainer has 'logger'; accepted: "),
    ],
)
def test_wrong_arguments_say_why(trained, tmp_path, arguments, why, capsys):
    (tmp_path / "list.yaml").write_text("- model")
    (tmp_path / "damaged.yaml").write_text("model: [1, {a:")
    files = {"FIRST": trained / "first.yaml", "LIST": tmp_path / "list.yaml", "DAMAGED": tmp_path / "damaged.yaml"}
    logdir = ["-l", str(tmp_path / "logs")]
    assert main([*(str(files.get(text, text)) for text in arguments), *logdir]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_the_config_of_a_first_stage_is_data(trained, tmp_path, capsys):
    config = OmegaConf.load(trained / "first.yaml")
    config.model.params.monitor = "${oc.env:HOME}"
    OmegaConf.save(config, tmp_path / "asks.yaml")
    assert (
        main(
            [
                "-b",
                str(trained / "second.yaml"),
                "-t",
                "-l",
                str(tmp_path),
                "-n",
                "run",
                f"data.params.first_stage.config={tmp_path / 'asks.yaml'}",
            ]
        )
        == 2
    )
    assert "asks.yaml: not a model's config: model.params.monitor: an interpolation" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value, accepted",
    [
        ("SLURM_PROCID", "x", "a whole number from 0 on"),
        ("SLURM_PROCID", "", "a whole number from 0 on"),
        ("RANK", "-1", "a whole number in 0..0"),
        ("WORLD_SIZE", "two", "a whole number in 1..65536"),
        ("WORLD_SIZE", "0", "a whole number in 1..65536"),
    ],
)
def test_what_the_environment_says_of_processes_is_checked(
    trained, tmp_path, monkeypatch, capsys, name, value, accepted
):
    monkeypatch.setenv(name, value)
    assert main(["-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: error: environment variable {name}: expected {accepted}; got {value!r}")


def test_the_environment_is_checked_before_lightning_is_imported(trained, tmp_path):
    """In a new process: Lightning reads the variable when it is imported."""
    run = subprocess.run(
        [sys.executable, ROOT / "main.py", "-b", trained / "first.yaml", "-t", "-l", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"SLURM_PROCID": "x"},
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert run.stderr.startswith("main.py: error: environment variable SLURM_PROCID: expected a whole number from 0 on")


def test_help_answers_at_once():
    assert "--steps N" in quick_help(ROOT / "main.py")


def test_no_gpu_is_said(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["-b", str(trained / "first.yaml"), "-l", str(tmp_path), "lightning.trainer.accelerator=gpu"]) == 2
    assert "lightning.trainer.accelerator: 'gpu', but there is no GPU" in capsys.readouterr().err


def configuration(argv: list[str]) -> DictConfig:
    """What a command line trains."""
    args = parser().parse_args(argv)
    return read_configuration(*given_files(args)[1:], args.seed, args.steps)


def test_configurations_of_older_runs_are_read(trained):
    section = OmegaConf.load(trained / "first.yaml").data
    section.target = "ldm.training.data.EmojiPicturesData"
    data = instantiate_from_config(section)
    data.setup("fit")
    assert len(data.train) == 19


def test_latents_are_drawn_of_images_and_their_mirror_images(trained, tmp_path):
    root = shutil.copytree(trained / "data", tmp_path / "data")
    notes = json.loads((root / "captions.json").read_text())
    notes["images"][0]["name"] = "thing pointing left"
    (root / "captions.json").write_text(json.dumps(notes))
    section = OmegaConf.load(trained / "second.yaml").data
    section.params |= {"root": str(root), "flip": True}
    data = instantiate_from_config(section)
    data.setup("fit")
    first_stage = AutoencoderKL(DDCONFIG, embed_dim=4).eval()
    load_weights(first_stage, trained / "first.safetensors")
    images = EmojiDataset(root, max_tier=1)
    for i, mirrored in ((0, False), (1, True)):
        seen = [data.train[i]["latent"] for _ in range(16)]
        with torch.no_grad():
            plain, flipped = (first_stage.encode(x[None]).mode()[0] for x in (images[i], images[i].flip(-1)))
        assert any(torch.allclose(z, plain, atol=1e-5) for z in seen)
        assert any(torch.allclose(z, flipped, atol=1e-5) for z in seen) is mirrored
    assert data.val[0]["latent"].ndim == 3


def test_a_setting_may_refer_to_another(trained):
    argv = ["-b", str(trained / "first.yaml"), "lightning.trainer.max_steps=${data.params.batch_size}"]
    assert configuration(argv).lightning.trainer.max_steps == 4


def test_settings_may_stand_anywhere(trained):
    first = str(trained / "first.yaml")
    for argv in (
        ["-b", first, "data.params.batch_size=3", "-t", "lightning.trainer.max_steps=7"],
        ["data.params.batch_size=3", "-b", first, "-t", "lightning.trainer.max_steps=7"],
        ["-b", first, "-t", "data.params.batch_size=3", "-n", "x", "lightning.trainer.max_steps=7"],
    ):
        args = parser().parse_args(argv)
        config = configuration(argv)
        assert given_files(args)[1] == [Path(first)] and args.train
        assert config.data.params.batch_size == 3 and config.lightning.trainer.max_steps == 7


@pytest.mark.parametrize(
    "refused, why",
    [
        ("data.params.batch_size=20", "data.params.batch_size: 20 is more than the training set has: 19 images"),
        ("data.params.val_split=other", "accepted: train, heldout_concept"),
        ("training.params.learning_rate=-1", "AutoencoderTraining': learning_rate should be greater than 0"),
        ("model.params.embed_dim=0", "the network fails in its first step"),
        ("lightning.trainer.limit_train_batches=0", "no step was made"),
        ("lightning.trainer.val_check_interval=0", "trainer.val_check_interval should be greater than 0; got 0"),
        ("lightning.trainer.devices=9999", "lightning.trainer.devices: 9999 processes on a CPU"),
        ("lightning.trainer.max_steps=0", "0 steps train nothing"),
        ("lightning.trainer.strategy=fsdp", "'fsdp' may give each process a part of the weights only"),
    ],
)
def test_a_refused_training_leaves_nothing(trained, tmp_path, refused, why, capsys):
    assert main(["-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path / "logs"), "-n", "r", refused]) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1
    assert not (tmp_path / "logs" / "r").exists()


def test_a_loss_that_is_not_finite_ends_the_training_and_its_state_is_not_kept(trained, tmp_path, capsys):
    command = [
        "-b",
        str(trained / "first.yaml"),
        "-t",
        "-l",
        str(tmp_path),
        "-n",
        "r",
        "training.params.learning_rate=1e30",
        "lightning.trainer.max_steps=9",
    ]
    assert main(command) == 2
    err = capsys.readouterr().err
    kept = steps_of(tmp_path / "r")
    where = f"batch {kept + 1}, at step {kept + 1} (epoch 0)"
    assert f"loss is nan, {where}; {tmp_path}/r/last.ckpt holds step {kept}" in err
    state = read_state(tmp_path / "r" / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


def test_a_loss_that_explodes_ends_the_training(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "FIRST", 2)
    command = ["-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path), "-n", "r", "lightning.loss_limit=1e-3"]
    assert main([*command, "lightning.trainer.max_steps=9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train/loss is " in line and "more than lightning.loss_limit = 0.001 times the greatest" in line
    assert f"batch 3, at step 3 (epoch 0); {tmp_path}/r/last.ckpt holds step 2" in line
    # Resumed, it knows the first losses.
    assert main(["--resume", str(tmp_path / "r"), "-t"]) == 2
    assert "batch 3, at step 3" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "r"), "-t", "lightning.loss_limit=null", "--steps", "4"]) == 0


def test_the_best_state_is_kept_and_goes_on(trained, tmp_path, capsys):
    """Resumed from it, a run ends as one that was not stopped."""
    run = ["-t", "-l", str(tmp_path), "lightning.trainer.val_check_interval=2", "lightning.trainer.max_steps=7"]
    kept = ["lightning.checkpoint_every_minutes=9", "model.params.monitor=val/psnr"]
    rate = "training.params.learning_rate=0.3"
    assert main(["-b", str(trained / "first.yaml"), *run, *kept, "-n", "r", rate]) == 0
    assert "kept: last.ckpt, and best.ckpt by the greatest val/psnr" in capsys.readouterr().out
    best, whole = (read_state(tmp_path / "r" / name) for name in ("best.ckpt", "last.ckpt"))
    with (tmp_path / "r" / "metrics" / "00000000" / "metrics.csv").open() as stream:
        measured = [float(row["val/psnr"]) for row in csv.DictReader(stream) if row["val/psnr"]]
    step = 2 + 2 * measured.index(max(measured))
    assert len(measured) == 3 and step < 6
    assert best["global_step"] == step == whole["callbacks"]["KeptState"]["best"]["step"]
    assert best["callbacks"]["KeptState"]["best"]["value"] == pytest.approx(max(measured))
    assert main(["--resume", str(tmp_path / "r" / "best.ckpt"), "-t"]) == 0
    again = read_state(tmp_path / "r" / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "callbacks"):
        assert_same(whole[part], again[part], part)
    assert main(["--resume", str(tmp_path / "r" / "other.ckpt"), "-t"]) == 2
    assert "r/other.ckpt; a run may keep last.ckpt, previous.ckpt, best.ckpt" in capsys.readouterr().err
    out = tmp_path / "best.safetensors"
    assert load_script("export_model").main([str(tmp_path / "r" / "best.ckpt"), "--out", str(out)]) == 0
    key = "encoder.conv_in.weight"
    assert torch.equal(read_checkpoint(out)[key], best["state_dict"][f"model.{key}"])


def test_a_monitor_that_is_not_measured_is_said(trained, tmp_path, capsys):
    run = ["-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path), "-n", "r", "model.params.monitor=val/los"]
    assert main(run) == 0
    assert "model.params.monitor: the validation has no 'val/los'" in capsys.readouterr().out
    assert not (tmp_path / "r" / "best.ckpt").exists()


@pytest.mark.parametrize(
    "name, best", [("val/rec_loss", 1.0), ("val/loss_simple_ema", 1.0), ("val/psnr", 3.0), ("val/R@5", 3.0)]
)
def test_a_monitor_knows_which_way_is_better(name, best):
    monitor, kept = Monitor(name), None
    for value in (2.0, 1.0, math.nan, 3.0, math.inf):
        measured = monitor.value({name.removesuffix("_ema"): torch.tensor(value)})
        kept = measured if monitor.better(measured, kept) else kept
    assert kept == best


def test_a_damaged_state_is_noticed(trained, tmp_path, capsys):
    """Whatever byte is another: it is said, or changes nothing."""
    content = bytearray((trained / "first" / "last.ckpt").read_bytes())
    whole, path = read_state(trained / "first" / "last.ckpt"), tmp_path / "last.ckpt"
    places = random.Random(0)
    noticed = 0
    for _ in range(40):
        place = places.randrange(len(content))
        content[place] ^= 4
        path.write_bytes(content)
        content[place] ^= 4
        try:
            assert_same(read_state(path), whole)
        except ValueError as error:
            assert "is damaged" in str(error)
            noticed += 1
    assert noticed > 20
    for damaged in (bytes(content[: len(content) // 2]), b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged .*; begin a new run"):
            read_state(path)


@pytest.mark.parametrize(
    "part, value",
    [
        ("state_dict", []),
        ("loops", None),
        ("callbacks", 5),
        ("lr_schedulers", {}),
        ("optimizer_states", "x"),
        ("pytorch-lightning_version", None),
    ],
)
def test_a_file_that_is_no_state_is_refused(trained, tmp_path, part, value, capsys):
    shutil.copytree(trained / "first", tmp_path / "r")
    path = tmp_path / "r" / "last.ckpt"
    torch.save(torch.load(path, weights_only=True) | {part: value}, path)
    assert main(["--resume", str(tmp_path / "r"), "-t", "--steps", "9"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "last.ckpt is damaged (it does not hold the state of a training)" in err


def test_a_state_of_another_model_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / "first", tmp_path / "r")
    command = ["--resume", str(tmp_path / "r"), "-t", "--steps", "9"]
    assert main([*command, "model.params.embed_dim=8"]) == 2
    assert "last.ckpt does not fit the configuration: model.quant_conv.weight is (" in capsys.readouterr().err
    path = tmp_path / "r" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["state_dict"]["model.quant_conv.weight"] = state["state_dict"]["model.quant_conv.weight"].long()
    torch.save(state, path)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "torch.int64 there, and" in err and err.count("\n") == 1


def test_a_damaged_state_names_the_one_before_it(trained, tmp_path, capsys):
    logdir = tmp_path / "r"
    shutil.copytree(trained / "first", logdir)
    content = bytearray((logdir / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (logdir / "last.ckpt").write_bytes(content)
    resume = ["-r", str(logdir), "-t"]
    for command in (
        lambda: main(resume),
        lambda: load_script("export_model").main([str(logdir), "--out", str(tmp_path / "m.safetensors")]),
    ):
        assert command() == 2
        err = capsys.readouterr().err
        assert "last.ckpt is damaged" in err and "previous.ckpt" in err and err.count("\n") == 1
    (logdir / "previous.ckpt").replace(logdir / "last.ckpt")
    assert steps_of(logdir) == 1
    assert main(resume) == 0
    assert steps_of(logdir) == 2


def test_a_changed_setting_is_said(trained, tmp_path, capsys):
    logdir = tmp_path / "r"
    shutil.copytree(trained / "first", logdir)
    assert main(["-r", str(logdir), "-t", "lightning.trainer.max_steps=3", "data.params.max_val=2"]) == 0
    out = capsys.readouterr().out
    assert "changed at step 2: data.params.max_val: None -> 2\n" in out
    assert "changed at step 2: lightning.trainer.max_steps: 2 -> 3\n" in out and out.count("changed at") == 2
    assert main(["-r", str(logdir), "-t"]) == 0
    out = capsys.readouterr().out
    assert "changed at" not in out and "all 3 steps are done" in out


def test_a_state_without_its_place_in_the_data_resumes_with_a_note(trained, tmp_path, capsys):
    """As the versions before wrote it."""
    logdir = tmp_path / "r"
    shutil.copytree(trained / "first", logdir)
    state = read_state(logdir / "last.ckpt")
    state["callbacks"].clear()
    del state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    torch.save(state, tmp_path / "old.ckpt")
    (tmp_path / "old.ckpt").replace(logdir / "last.ckpt")
    assert main(["-r", str(logdir), "-t", "lightning.trainer.max_steps=6"]) == 0
    assert capsys.readouterr().out.count("was written before its place in the data was kept") == 1
    assert steps_of(logdir) == 6


def test_steps_scale_the_schedule(trained, tmp_path):
    config = OmegaConf.load(trained / "first.yaml")
    schedule = {"warm_up_steps": 300, "max_decay_steps": 12000, "lr_start": 0.01, "lr_max": 1.0, "lr_min": 0.05}
    config.training.params.scheduler_config = {
        "target": "ldm.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": schedule,
    }
    config.lightning.trainer.update(max_steps=10000, val_check_interval=1500)
    OmegaConf.save(config, tmp_path / "c.yaml")
    short = configuration(["-b", str(tmp_path / "c.yaml"), "-t", "--steps", "500"])
    trainer, params = short.lightning.trainer, short.training.params.scheduler_config.params
    assert (trainer.max_steps, trainer.val_check_interval) == (500, 500)
    assert (params.warm_up_steps, params.max_decay_steps) == (15, 600)
    whole, scaled = (LambdaWarmUpCosineScheduler(**p) for p in (schedule, params))
    assert [scaled(s) for s in (3, 15, 100, 500)] == pytest.approx([whole(20 * s) for s in (3, 15, 100, 500)])
    one = configuration(["-b", str(tmp_path / "c.yaml"), "--steps", "1"]).training.params.scheduler_config
    assert instantiate_from_config(one)(1) == pytest.approx(0.525)  # half of its two steps of decay
    cycles = OmegaConf.create({"warm_up_steps": [10], "cycle_lengths": [1e4]})
    scale_schedule(cycles, 0.5)
    assert cycles == {"warm_up_steps": [5], "cycle_lengths": [5000]}


def test_the_screen_shows_what_is_trained_and_nothing_else(trained, tmp_path):
    logs = tmp_path / "log"
    command = [
        "-b",
        str(trained / "second.yaml"),
        "-t",
        "-l",
        str(tmp_path),
        "-n",
        "r",
        "lightning.trainer.enable_progress_bar=true",
    ]
    assert Child(lambda: main(command), logs).end() == 0
    first, *rest = logs.read_text().splitlines()
    assert first.startswith(f"{tmp_path}/r: ") and first.endswith(" M weights, from step 0 to 2; kept: last.ckpt")
    assert rest[0].startswith("step 2: val/loss ") and rest[1].startswith("for sampling: ") and len(rest) == 2


def test_only_frozen_parts_are_in_evaluation_mode_while_training(trained):
    """Lightning warns of those; main.py leaves the warning out."""
    config = OmegaConf.load(trained / "second.yaml")
    module = DiffusionTraining(instantiate_from_config(config.model), learning_rate=1e-3)
    resting = [name for name, part in module.named_modules() if not part.training]
    assert resting and all(name.startswith("model.first_stage_model") for name in resting)
    module.eval().train()
    assert resting == [name for name, part in module.named_modules() if not part.training]


@pytest.mark.parametrize("kind, algorithm", [("first", "norm"), ("first", "value"), ("second", "norm")])
def test_gradients_are_clipped_under_bf16(trained, tmp_path, kind, algorithm):
    """The optimizer is fused, for which Lightning itself refuses."""
    config = OmegaConf.merge(
        OmegaConf.load(trained / f"{kind}.yaml"),
        {
            "lightning": {
                "trainer": {
                    "max_steps": 1,
                    "precision": "bf16-mixed",
                    "gradient_clip_val": 1e-4,
                    "gradient_clip_algorithm": algorithm,
                }
            }
        },
    )
    module = fit(config, tmp_path / "run")
    gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
    if algorithm == "value":
        assert max(grad.abs().max() for grad in gradients) == pytest.approx(1e-4)
    else:
        assert torch.stack([grad.norm() for grad in gradients]).norm() == pytest.approx(1e-4, rel=1e-2)


def test_gradients_are_clipped_under_fp16_without_the_scale_of_the_loss(trained):
    config = OmegaConf.load(trained / "first.yaml")
    config.model.params.ckpt_path = str(trained / "first.safetensors")
    module = AutoencoderTraining(instantiate_from_config(config.model), learning_rate=1e-3)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=16.0))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=1, gradient_clip_val=1e-4, plugins=[precision], **quiet
    )
    batch = {"image": torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1}
    trainer.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    gradients = [p.grad for p in module.model.parameters() if p.grad is not None]
    assert torch.stack([grad.norm() for grad in gradients]).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_lightning_warns_of_nothing_that_changes_the_weights(trained, tmp_path):
    """It counts modules in evaluation mode: those are the frozen first stage's. It asks whether the place in the data
    is kept when a training goes on within an epoch: it is."""
    config = OmegaConf.load(trained / "second.yaml")
    config.lightning.trainer.max_steps = 2  # of four in an epoch
    fit(config, tmp_path / "run")
    config.lightning.trainer.max_steps = 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit(config, tmp_path / "run")
    modes = {name: part.training for name, part in module.named_modules()}
    frozen = {name for name in modes if f"{name}.".startswith("model.first_stage_model.")}
    assert {name for name, training in modes.items() if not training} == frozen
    said = [str(warning.message) for warning in caught]
    assert any(f"Found {len(frozen)} module(s) in eval mode" in text for text in said)
    assert not [text for text in said if "resum" in text]


def test_ctrl_c_keeps_the_step_that_was_made(trained, tmp_path):
    """However seldom states are written."""

    def work() -> int:
        batch_end = KeptState.on_train_batch_end

        def interrupted(self, trainer, *rest):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)
            batch_end(self, trainer, *rest)

        KeptState.on_train_batch_end = interrupted
        return main(
            [
                "-b",
                str(trained / "first.yaml"),
                "-t",
                "-l",
                str(tmp_path),
                "-n",
                "r",
                "lightning.trainer.max_steps=1000",
                "lightning.checkpoint_every_minutes=1000",
            ]
        )

    assert Child(work, tmp_path / "log").end() == 130
    assert steps_of(tmp_path / "r") == 3
    assert "stopped; go on with --resume LOGDIR" in (tmp_path / "log").read_text()


# Parts


def test_the_first_stage_begins_as_the_best_linear_one():
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG | {"z_channels": 12}, embed_dim=12).eval()  # as many as a patch has pixels
    images = torch.rand(8, 3, SIDE, SIDE) * 2 - 1
    start_from_principal_components(model, images)
    with torch.no_grad():
        reconstruction, posterior = model(images, sample_posterior=False)
    torch.testing.assert_close(reconstruction, images, rtol=0, atol=1e-4)
    assert posterior.mean.std() == pytest.approx(1.0, abs=0.05) and posterior.std.max() < 0.1


def test_all_conditions_dropped_means_none_is_read(trained):
    config = OmegaConf.load(trained / "second.yaml")
    # As built, the last layers of a network are zero, and it would read no condition at all.
    model = recipe_weights(instantiate_from_config(config.model), seed=1, gain=0.6)
    batch = {"latent": torch.randn(3, 4, 8, 8)}
    for dropout, same in ((1.0, True), (0.0, False)):
        training = DiffusionTraining(model, learning_rate=1e-3, condition_dropout=dropout)
        training.log_dict = lambda *args, **kwargs: None
        losses = []
        for captions in (["a", "b", "c"], ["x", "y", "z"]):
            torch.manual_seed(0)
            losses.append(training.training_step(batch | {"caption": captions}, 0))
        assert torch.equal(*losses) is same


def test_min_snr_weights_never_exceed_the_plain_ones(trained):
    config = OmegaConf.load(trained / "second.yaml")
    training = DiffusionTraining(instantiate_from_config(config.model), learning_rate=1e-3, min_snr_gamma=5.0)
    weights = training.timestep_weights(torch.arange(1000))
    snr = training.model.alphas_cumprod / (1 - training.model.alphas_cumprod)
    torch.testing.assert_close(weights * (snr + 1), snr.clamp(max=5.0))  # v-prediction: error in x_0 is 1/(SNR+1)


@pytest.mark.parametrize("predicts, loss_of", [("eps", "v"), ("v", "eps"), ("x0", "eps")])
def test_the_loss_can_be_the_error_of_another_quantity(trained, predicts, loss_of):
    config = OmegaConf.load(trained / "second.yaml")
    config.model.params.parameterization = predicts
    training = DiffusionTraining(instantiate_from_config(config.model), learning_rate=1e-3, loss_of=loss_of)
    x, right, wrong = torch.randn(3, 1000).double()
    for t in (1, 500, 999):
        abar = float(training.model.alphas_cumprod[t])
        if predicts == "eps":
            errors = v_from_eps(wrong, x, abar) - v_from_eps(right, x, abar)
        else:
            eps_from = {"v": eps_from_v, "x0": eps_from_x0}[predicts]
            errors = eps_from(wrong, x, abar) - eps_from(right, x, abar)
        weight = training.timestep_weights(torch.tensor([t])).double()
        torch.testing.assert_close(weight * (wrong - right) ** 2, errors**2, rtol=1e-3, atol=0)


def test_timesteps_are_weighted_in_one_way(trained):
    model = instantiate_from_config(OmegaConf.load(trained / "second.yaml").model)
    with pytest.raises(ValueError, match="min_snr_gamma and loss_of both weight the timesteps"):
        DiffusionTraining(model, learning_rate=1e-3, min_snr_gamma=5.0, loss_of="v")


def test_warm_up_then_cosine():
    factor = LambdaWarmUpCosineScheduler(warm_up_steps=10, lr_min=0.1, lr_max=1.0, lr_start=0.0, max_decay_steps=110)
    assert [factor(s) for s in (0, 5, 10, 60, 110, 500)] == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_linear_cycles():
    factor = LambdaLinearScheduler([10, 0], [0.0, 0.5], [1.0, 1.0], [0.0, 1.0], [100, 100])
    assert [factor(s) for s in (0, 5, 10, 50)] == pytest.approx([0.0, 0.5, 0.9, 0.5])
    assert factor(150) == pytest.approx(0.75) and factor(1000) == pytest.approx(0.5)


def test_the_average_is_of_what_is_trained():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))
    assert [n for n, _ in LitEma(model).named_buffers()] == ["decay", "num_updates", "0weight", "0bias"]
