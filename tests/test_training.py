"""main.py end to end on a tiny dataset: first stage, diffusion, kill, resume, export, sampling."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from contracts import recipe_weights
from omegaconf import OmegaConf
from tiny_data import SIDE, write_data
from txt2img_model import load_script, tiny_params

from ldm.checkpoint import load_model, read_checkpoint
from ldm.data.emoji import EmojiPictures
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.ema import LitEma
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.training.autoencoder import start_from_principal_components
from ldm.training.diffusion import DiffusionTraining
from ldm.training.export import sampling_weights
from ldm.training.run import steps_done
from ldm.util import instantiate_from_config
from main import main

ROOT = Path(__file__).parents[1]
DDCONFIG = {"double_z": True, "z_channels": 4, "resolution": SIDE, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "patch_size": 2, "linear_shortcut": True}
LIGHTNING = {"checkpoint_every_minutes": 0.0,
             "trainer": {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1,
                         "check_val_every_n_epoch": None, "enable_progress_bar": False}}


def first_stage_config(data: Path) -> dict:
    return {"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
                "embed_dim": 4, "ddconfig": DDCONFIG,
                "lossconfig": {"target": "ldm.modules.losses.reconstruction.ReconstructionLoss"}}},
            "training": {"target": "ldm.training.autoencoder.AutoencoderTraining",
                         "params": {"learning_rate": 1e-3}},
            "data": {"target": "ldm.training.data.EmojiPicturesData",
                     "params": {"root": str(data), "batch_size": 4, "val_split": "heldout_pair"}},
            "lightning": LIGHTNING}


def diffusion_config(data: Path, folder: Path) -> dict:
    """On the first stage that the run `folder`/first exported."""
    params = tiny_params(folder) | {"cond_stage_trainable": True, "parameterization": "v"}
    weights = str(folder / "first.safetensors")
    params["first_stage_config"] = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {
        "embed_dim": 4, "ddconfig": DDCONFIG, "ckpt_path": weights}}
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params},
            "training": {"target": "ldm.training.diffusion.DiffusionTraining",
                         "params": {"learning_rate": 1e-3, "sample_steps": 2}},
            "data": {"target": "ldm.training.data.EmojiLatentsData", "params": {
                "root": str(data), "batch_size": 4, "max_tier": 1,
                "first_stage": {"config": str(folder / "first.yaml"), "ckpt": weights}}},
            "lightning": LIGHTNING}


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
    data = EmojiPictures(trained / "data")
    with torch.no_grad():
        z = torch.cat([model.encode(data[i][None]).mean for i in range(len(data))])
    assert z.mean((0, 2, 3)).abs().max() < 0.2      # the statistics are of whole batches: 16 of 19 pictures
    assert 0.7 < z.std() < 1.3


def test_the_exported_model_samples_and_holds_the_averages(trained):
    model = load_model(trained / "second.yaml", trained / "second.safetensors")
    z = model.first_stage_model.decode(torch.zeros(1, 4, 8, 8))
    assert z.shape == (1, 3, SIDE, SIDE)
    state = read_checkpoint(trained / "second" / "last.ckpt")
    weights = sampling_weights(state)
    key = "model.diffusion_model.out.2.weight"
    average = state["network_ema.diffusion_modelout2weight"]
    assert torch.equal(weights[key], average) and not torch.equal(state[f"model.{key}"], average)
    torch.testing.assert_close(model.state_dict()[key], average)


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


def test_a_killed_run_resumes(trained, tmp_path):
    command = [sys.executable, "main.py", "-b", str(trained / "first.yaml"), "-t", "-l", str(tmp_path), "-n", "k",
               "lightning.trainer.max_steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logdir = tmp_path / "k"
    waited = time.monotonic()
    while not (logdir / "last.ckpt").exists() and time.monotonic() - waited < 120:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = steps_of(logdir)
    assert reached >= 1
    assert main(["-r", str(logdir), "-t", f"lightning.trainer.max_steps={reached + 2}"]) == 0
    assert steps_of(logdir) == reached + 2


def test_an_old_run_is_not_overwritten(trained, capsys):
    assert main(["-b", str(trained / "first.yaml"), "-t", "-l", str(trained)]) == 2
    assert "--name" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, why", [
    ([], "--base"), (["-b", "nothing.yaml"], "no file nothing.yaml"), (["-r", "nowhere"], "--resume")])
def test_wrong_arguments_say_why(arguments, why, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


def test_unknown_sections_are_refused(trained, tmp_path, capsys):
    config = OmegaConf.load(trained / "first.yaml")
    config.trainer = {}
    OmegaConf.save(config, tmp_path / "c.yaml")
    assert main(["-b", str(tmp_path / "c.yaml"), "-l", str(tmp_path)]) == 2
    assert "trainer" in capsys.readouterr().err


# Parts

def test_the_first_stage_begins_as_the_best_linear_one():
    torch.manual_seed(0)
    model = AutoencoderKL(DDCONFIG | {"z_channels": 12}, embed_dim=12).eval()       # as many as a patch has pixels
    pictures = torch.rand(8, 3, SIDE, SIDE) * 2 - 1
    start_from_principal_components(model, pictures)
    with torch.no_grad():
        reconstruction, posterior = model(pictures, sample_posterior=False)
    torch.testing.assert_close(reconstruction, pictures, rtol=0, atol=1e-4)
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
    torch.testing.assert_close(weights * (snr + 1), snr.clamp(max=5.0))     # v-prediction: error in x_0 is 1/(SNR+1)


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
