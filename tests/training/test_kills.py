"""A training that is killed at any moment, or runs into a full disk or a dead worker, ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm.training.callbacks import KeptState
from ldm.training.run import hear_of_no_more_deaths
from ldm.training.state import read_state
from main import main
from tests.helpers.measures import disk_with_room_for
from tests.helpers.processes import Child
from tests.training.test_training import assert_same

KILLS, STEPS, IMAGES, SIDE = 20, 16, 10, 8
UNET = {
    "image_size": SIDE,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
    "dropout": 0.1,
    "num_heads": 1,
}
CONFIG = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "image_size": SIDE,
            "channels": 3,
            "monitor": "val/loss_simple",
            "use_ema": False,
            "normalize_latents": True,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
            "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
            "cond_stage_config": "__is_unconditional__",
            "scheduler_config": {
                "target": "ldm.lr_scheduler.LambdaLinearScheduler",
                "params": {
                    "warm_up_steps": [5],
                    "cycle_lengths": [100],
                    "f_start": [0.1],
                    "f_max": [1.0],
                    "f_min": [0.5],
                },
            },
        },
    },
    "training": {
        "target": "ldm.training.diffusion.DiffusionTraining",
        "params": {"learning_rate": 1e-3, "sample_steps": 1},
    },
    "lightning": {
        "checkpoint_every_minutes": 0.0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 7,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "accumulate_grad_batches": 2,
        },
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A training that draws at every step: the order, mirrored images, crops, timesteps, noise and dropout."""
    folder = tmp_path_factory.mktemp("kills")
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE + 2, SIDE + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    params = {"root": str(folder), "size": SIDE, "random_crop": True, "flip": 0.5}
    data = {"target": "ldm.data.folder.ImageFolder", "params": params}
    module = {"batch_size": 2, "num_workers": 0, "train": data, "validation": data}
    section = {"data": {"target": "main.DataModuleFromConfig", "params": module}}
    OmegaConf.save(OmegaConf.create(CONFIG | section), folder / "c.yaml")
    return folder / "c.yaml"


class Calls:
    """Counts calls of Python functions; at the call number `kill`, if one is given, the process is killed."""

    def __init__(self, kill: int | None = None):
        self.count, self.kill = 0, kill
        sys.settrace(self.called)

    def called(self, frame: Any, event: str, argument: Any) -> None:
        self.count += 1
        if self.count == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def calls_until_steps(command: list[str], log: Path) -> tuple[int, int]:
    """How many functions a start calls until its first step is made, and how many from step to step."""
    found, counts = [], log.with_suffix(".counts")
    batch_end = KeptState.on_train_batch_end

    def work() -> int:
        calls = Calls()

        def noted(self: KeptState, *rest: Any) -> None:
            batch_end(self, *rest)
            found.append(calls.count)

        KeptState.on_train_batch_end = noted
        code = main(command)
        counts.write_text(f"{found[0]} {(found[-1] - found[0]) // (len(found) - 1)}")
        return code

    assert Child(work, log).end() == 0, log.read_text()
    start, batch = counts.read_text().split()
    return int(start), int(batch)


def test_twenty_kills_change_nothing(config, tmp_path):
    """At random calls of functions: while the model is built, in a step, in a validation, while a state is written."""
    begin = ["-b", str(config), "-t", "-l", str(tmp_path)]
    assert main([*begin, "-n", "calm"]) == 0
    start, batch = calls_until_steps([*begin, "-n", "count", "lightning.trainer.max_steps=3"], tmp_path / "log")
    moments = random.Random(16)
    logdir, killed, reached = tmp_path / "killed", 0, [0]
    while killed < KILLS:
        last = logdir / "last.ckpt"
        command = ["-r", str(logdir), "-t"] if last.exists() else [*begin, "-n", "killed"]
        at = int(moments.uniform(0.9 * start, start + 4 * batch))

        def work(command: list[str] = command, at: int = at) -> int:
            Calls(kill=at)
            return main(command)

        code = Child(work, tmp_path / "log").end()
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        killed += 1
        for state in logdir.glob("*.ckpt"):  # each is whole
            read_state(state)
        reached.append(read_state(last)["global_step"] if last.exists() else 0)
    assert 3 < len({*reached}) and reached == sorted(reached) and reached[-1] < STEPS
    assert main(["-r", str(logdir), "-t"]) == 0
    calm, disturbed = (read_state(tmp_path / name / "last.ckpt") for name in ("calm", "killed"))
    for part in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(calm[part], disturbed[part], part)


def test_a_full_disk_keeps_the_last_good_state(config, tmp_path, capsys):
    begin = ["-b", str(config), "-t", "-l", str(tmp_path), "-n", "r"]
    assert main([*begin, "lightning.trainer.max_steps=1"]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "r").glob("*.ckpt")}
    with disk_with_room_for(100_000):
        assert main(["-r", str(tmp_path / "r"), "-t", "lightning.trainer.max_steps=2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "r/last.ckpt: the state of step 2 can't be written: " in line and "File too large" in line
    assert "r/last.ckpt holds step 1" in line
    assert {path: path.read_bytes() for path in (tmp_path / "r").iterdir() if path.suffix == ".ckpt"} == files
    assert main(["-r", str(tmp_path / "r"), "-t", "lightning.trainer.max_steps=2"]) == 0


DYING = """
import os, signal
from ldm.data.folder import ImageFolder

class Dying(ImageFolder):
    def __getitem__(self, i):
        if i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)
"""


def test_a_worker_that_dies_ends_the_training_with_one_line(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "dying_data.py").write_text(DYING)
    monkeypatch.chdir(tmp_path)
    begin = ["-b", str(config), "-t", "-l", str(tmp_path), "-n", "r", "data.params.train.target=dying_data.Dying"]
    root = [f"data.params.train.params.root={config.parent}", f"data.params.train.params.size={SIDE}"]
    workers = ["data.params.num_workers=1", "--allow", "dying_data", "model.params.normalize_latents=false"]
    assert main([*begin, *root, *workers, "data.params.validation=null"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a process that reads images died" in line and "data.params.num_workers" in line


def test_a_death_that_is_known_is_not_raised_again():
    def handler(signum, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(RuntimeError, match="is killed"):
            os.kill(os.getpid(), signal.SIGCHLD)
        hear_of_no_more_deaths()
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
