"""The published command lines of main.py, and what ours does where theirs set traps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ldm.training.configuration import TRAINER, read_configuration
from ldm.training.published import completed, devices_of
from ldm.training.run import several
from ldm.training.state import read_state
from main import TRAINER_FLAGS, folder_of, main, name_of, of_gpus, parser, plain
from tests.training.test_adversarial import tiny_config

A = {
    "model": {
        "base_learning_rate": 2.0e-6,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {"timesteps": 1000, "channels": 3},
    },
    "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 48}},
    "lightning": {
        "trainer": {"accumulate_grad_batches": 2},
        "callbacks": {"image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 5000}}},
    },
}


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["-b", "A.yaml", "-t", "True", "--scale_lr", "False"], {"train": True, "scale_lr": False}),
        (["-b", "A.yaml", "-t", "no", "--no-test", "-s", "42", "-d"], {"train": False, "debug": True, "seed": 42}),
        (["-b", "A.yaml", "-n", "faces", "-f", "_2", "-l", "runs", "-p", "x"], {"name": "faces", "postfix": "_2"}),
        (["-b", "A.yaml", "-t", "--gpus", "0,1", "--scale_lr"], {"gpus": "0,1", "scale_lr": True, "train": True}),
        (
            ["-t", "data.params.batch_size=8", "-b", "A.yaml"],
            {"overrides": ["data.params.batch_size=8"], "train": True},
        ),
        (["-b", "A.yaml", "-t", "--data.target=p.D"], {"overrides": ["data.target=p.D"]}),
        (["--train", "yes", "--allow", "p", "-b", "A.yaml"], {"train": True, "allow": ["p"]}),
    ],
)
def test_published_flags(argv, expected):
    args = vars(parser().parse_args(plain(argv)))
    assert {key: args[key] for key in expected} == expected


@pytest.mark.parametrize("text, devices", [("0,", [0]), ("0,1", [0, 1]), ("2", 2), ("3,", [3])])
def test_gpus_are_numbers_or_a_count(text, devices):
    config = OmegaConf.from_dotlist(of_gpus(text))
    assert config.lightning.trainer.devices == devices and config.lightning.trainer.accelerator == "gpu"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["-b", "A.yaml", "--gpus", "all"], "--gpus: expected numbers of GPUs such as 0,1"),
        (["-b", "A.yaml", "--gpus", "0"], "--gpus: expected numbers"),
        (["-r", "logs/x", "-n", "y"], "--name: a run that is resumed keeps its name"),
        (["-b", "A.yaml", "--gpu", "0,"], "unrecognized arguments: --gpu"),
        (["-b", "A.yaml", "-t", "--max_epochs", "10"], "--max_epochs: what the trainer does is a setting of the conf"),
        (["-b", "A.yaml", "--accelerator=ddp", "-t"], "here: lightning.trainer.accelerator=VALUE"),
        (["-b", "A.yaml", "-t", "model.params.channel=3"], "model"),
        (["-b", "A.yaml", "-t", "data.params.batch_size=few"], "data.params.batch_size should be a valid integer; got"),
        (["-b", "A.yaml", "-t", "data.params.batch_size=${oc.env:HOME}"], "reads from outside of the configuration"),
        (["-b", "A.yaml", "-t", "data.params=x"], "data.params should be a mapping; got 'x'"),
        (["-b", "A.yaml", "-t", "model.base_learning_rate=fast"], "model.base_learning_rate should be a valid number"),
        (["-b", "A.yaml", "-t", "lightning.trainer=5"], "lightning.trainer should be a mapping; got 5"),
        (["-b", "A.yaml", "-t", "lightning.trainer.accumulate_grad_batches=0"], "greater than or equal to 1; got 0"),
        (["-b", "A.yaml", "-t", "lightning.trainer.gradient_clip_val=-1"], "greater than or equal to 0; got -1"),
    ],
)
def test_refused(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("A.yaml").write_text(yaml.safe_dump(A))
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_is_resumed_by_its_folder_or_a_checkpoint():
    for given in ("logs/x", "logs/x/last.ckpt", "logs/x/checkpoints/last.ckpt", "logs/x/checkpoints"):
        assert folder_of(given) == Path("logs/x")


def test_a_run_has_the_name_of_its_model():
    assert name_of(None, Path("models/ldm/ffhq256/config.yaml")) == "ffhq256"
    assert name_of(None, Path("configs/a.yaml")) == "a" and name_of("b", Path("configs/a.yaml")) == "b"


def test_the_learning_rate_is_the_one_given_unless_scaled():
    config = OmegaConf.create(A)
    plain_, (line, ignored) = completed(config)
    assert plain_.training.params.learning_rate == 2e-6
    assert line == (
        "learning rate 2e-06, as given; published scaling (2 accumulated x 1 devices x batch size 48) would make it "
        "0.000192: --scale_lr"
    )
    assert ignored == "lightning.callbacks: without effect; images are saved after each validation"
    config.lightning.trainer.devices = [0, 1]
    scaled, (line, _) = completed(config, scale_lr=True)
    assert scaled.training.params.learning_rate == pytest.approx(2 * 2 * 48 * 2e-6)
    assert "0.000384 = 2e-06 x 2 accumulated x 2 devices x batch size 48 (--scale_lr)" in line
    config.model.base_learning_rate = 1e-4
    assert "above 0.001" in completed(config, scale_lr=True)[1][0]


@pytest.mark.parametrize(
    "trainer, count",
    [
        ({}, 4),
        ({"devices": "auto"}, 4),
        ({"devices": -1}, 4),
        ({"devices": "3"}, 3),
        ({"devices": [1]}, 1),
        ({"accelerator": "cpu"}, 1),
    ],
)
def test_devices_that_are_not_named_are_all(trainer, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert devices_of(OmegaConf.create(trainer)) == count
    assert several(trainer) is (count > 1)


def test_what_lightning_has_is_hinted_at():
    assert TRAINER_FLAGS <= TRAINER


def test_a_published_configuration_is_completed():
    config = OmegaConf.create(A)
    config.model.params.ucg_training = {"caption": {"p": 0.1, "val": None}}
    done, _ = completed(config)
    assert done.training.target == "ldm.training.diffusion.DiffusionTraining"
    assert done.training.params.published_optimizer and done.training.params.condition_dropout == 0.0
    assert done.training.params.ucg_training.caption.p == 0.1 and "ucg_training" not in done.model.params
    assert done.model.params.use_ema is False and "base_learning_rate" not in done.model
    assert completed(done)[0] == done and "training" not in config
    config.training = {"params": {"condition_dropout": 0.2}}
    assert completed(config)[0].training == OmegaConf.merge(done.training, config.training)
    for change, message in (
        ({"model": {"target": "ldm.Other"}}, "'ldm.Other' is not trained here; accepted: AutoencoderKL"),
        ({"model": {"base_learning_rate": None}}, "model.base_learning_rate: not given"),
    ):
        with pytest.raises(ValueError, match=message):
            completed(OmegaConf.merge(OmegaConf.create(A), change))


def test_a_schedule_without_its_number_of_steps_is_not_scaled_and_that_is_said(tmp_path, capsys):
    config = OmegaConf.create(A)
    config.model.params.scheduler_config = {"target": "ldm.lr_scheduler.X", "params": {"warm_up_steps": [10000]}}
    OmegaConf.save(config, tmp_path / "A.yaml")
    for settings, scaled in (([], [10000]), (["lightning.trainer.max_steps=100"], [500])):
        done = read_configuration([tmp_path / "A.yaml"], settings, steps=5)
        assert done.lightning.trainer.max_steps == 5
        assert done.model.params.scheduler_config.params.warm_up_steps == scaled
        assert ("--steps: the learning-rate schedule stays as it is" in capsys.readouterr().out) == (not settings)


OWN = """
import numpy as np
from torch.utils.data import Dataset

class Stripes(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"image": np.full((16, 16, 3), i / 2 - 1, np.float32)}
"""


def test_a_dataset_of_ones_own_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "stripes_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path)
    del config["training"]
    config["data"] = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": {"target": "x"}}}
    config["model"]["base_learning_rate"] = 1e-3
    (tmp_path / "A.yaml").write_text(yaml.safe_dump(config))
    argv = ["-b", "A.yaml", "-t", "-l", "logs", "--steps", "2", "--data.target=stripes_of_mine.Stripes"]
    argv += ["data.params.num_workers=0"]
    assert main(argv) == 2
    assert "outside the allowed packages" in capsys.readouterr().err
    assert main([*argv, "--allow", "stripes_of_mine"]) == 0
    assert read_state(Path("logs/A/last.ckpt"))["global_step"] == 2
