"""Callbacks of a training: checkpoints, sample grids, a progress bar."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from ldm.io.files import atomic_write
from ldm.io.images import grid, save_png, to_pil
from ldm.training.state import PREVIOUS, steps_done


class Stopped(Exception):
    """The user stopped the training."""


class KeptState(pl.Callback):
    """Keep the newest state in `LOGDIR/last.ckpt`, the one before in `previous.ckpt`, the settings in `config.yaml`.

    Files are replaced atomically, so a kill at any moment leaves complete files for `main.py --resume LOGDIR`. A state
    that is not finite is not saved; the training ends with an error.
    """

    def __init__(self, path: Path, every_minutes: float, config: DictConfig):
        self.path, self.every_seconds, self.config = path, 60.0 * every_minutes, OmegaConf.to_yaml(config)
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.counted = 0  # steps when the batch before ended
        self.begun = False
        self.stopping = False

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config}

    def save(self, trainer: pl.Trainer) -> None:
        for name, parameter in trainer.lightning_module.named_parameters():
            if not parameter.isfinite().all():
                self.fail(trainer, f"weights that are not finite ({name})")
        if trainer.is_global_zero:
            with atomic_write(self.path) as unfinished:
                trainer.save_checkpoint(unfinished)
                if self.path.exists():
                    with atomic_write(self.path.with_name(PREVIOUS)) as previous:
                        copy(self.path, previous)
        else:
            trainer.save_checkpoint(self.path)  # all processes take part, the first one writes the file
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def fail(self, trainer: pl.Trainer, what: str) -> None:
        kept = f"{self.path} holds step {steps_done(self.path)}" if self.path.exists() else "nothing was kept yet"
        raise ValueError(
            f"{what} at step {trainer.global_step} (epoch {trainer.current_epoch}); {kept}. A lower "
            f"training.params.learning_rate or lightning.trainer.gradient_clip_val may help"
        )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.counted = trainer.global_step

    def write_config(self) -> None:
        with atomic_write(self.path.with_name("config.yaml")) as unfinished:
            unfinished.write_text(self.config, encoding="utf-8")
        self.begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: object) -> None:
        loss = outputs["loss"]
        if not loss.isfinite():
            self.fail(trainer, f"a loss of {loss.item()}")
        if not self.begun and trainer.is_global_zero:
            self.write_config()  # not earlier: a training whose first batch fails must leave no folder
        # Between the batches of one step there are gradients, which a state does not hold.
        stepped, self.counted = trainer.global_step > self.counted, trainer.global_step
        # The last step is saved here, too: afterwards Lightning counts a partial epoch as a whole one.
        last = trainer.global_step == trainer.max_steps
        due = stepped and (last or self.stopping or time.monotonic() - self.saved_at > self.every_seconds)
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # all processes must save together
            self.save(trainer)
        if self.stopping and stepped:
            raise Stopped

    @contextmanager
    def stopped_after_a_step(self) -> Iterator[None]:
        """Ctrl-C in the block stops the training after the current step is saved; a second Ctrl-C stops it at once.

        SIGUSR1, which clusters send before they end a job, saves the current step when it is done.

        Raises:
            KeyboardInterrupt: the training was stopped.
        """

        def stop(*_: object) -> None:
            self.stopping = True
            signal.signal(signal.SIGINT, before)

        def save_soon(*_: object) -> None:
            self.saved_at = -math.inf

        if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
            yield
            return
        before = signal.signal(signal.SIGINT, stop)
        usual = signal.signal(signal.SIGUSR1, save_soon) if hasattr(signal, "SIGUSR1") else None
        try:
            yield
        except Stopped:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, before)
            if usual is not None:
                signal.signal(signal.SIGUSR1, usual)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.saved_step != trainer.global_step:
            self.save(trainer)


def copy(source: Path, target: Path) -> None:
    """A hard link to the file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class SampleGrid(pl.Callback):
    """After each validation, save `module.images(first validation batch)` as `LOGDIR/samples/STEP.png`."""

    def __init__(self, folder: Path, columns: int = 8, rows: int = 2):
        self.folder, self.columns, self.rows = folder, columns, rows

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:  # each process has other images
            return
        batch = next(iter(trainer.val_dataloaders))
        count = self.columns * self.rows
        batch = {k: v[:count].to(module.device) if isinstance(v, Tensor) else v[:count] for k, v in batch.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(
            self.folder / f"{trainer.global_step:08d}.png",
            grid(to_pil(module.images(batch)), self.columns),
            {"step": trainer.global_step},
        )


class StepBar(pl.Callback):
    """A progress bar over all steps with the latest loss, and a line for each validation."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        disable = None if trainer.is_global_zero else True
        self.bar = tqdm(total=total, initial=trainer.global_step, unit="step", disable=disable)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: object) -> None:
        self.bar.set_postfix(loss=f"{outputs['loss'].item():.4g}", refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            measured = (
                f"{name} {value.item():.4g}"
                for name, value in sorted(trainer.callback_metrics.items())
                if isinstance(value, Tensor) and name.startswith("val/")
            )
            step = f"step {trainer.global_step}: " if trainer.state.fn == "fit" else ""
            tqdm.write(f"{step}{', '.join(measured)}")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.bar.close()
