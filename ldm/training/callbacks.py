"""Callbacks of a training: checkpoints, sample grids, a progress bar."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from ldm.io.errors import one_line
from ldm.io.files import atomic_write
from ldm.io.images import grid, save_png, to_pil
from ldm.training.state import BEST, PREVIOUS
from ldm.training.watch import diverged, kept_in

GREATER_IS_BETTER = re.compile(r"psnr|R@\d+|cluster_usage|perplexity")  # other measures are losses and distances


@dataclass(frozen=True)
class Monitor:
    """The measure of the validation by which the best state is kept, such as val/loss_simple."""

    name: str

    @property
    def greatest(self) -> bool:
        """Whether the best value is the greatest."""
        return GREATER_IS_BETTER.search(self.name) is not None

    def value(self, measured: Mapping[str, Tensor]) -> float | None:
        """Its value among those of a validation, which are of the averaged weights whether or not the name says so."""
        found = measured.get(self.name, measured.get(self.name.removesuffix("_ema")))
        if found is None:
            names = ", ".join(sorted(name for name in measured if name.startswith("val/")))
            print(
                f"model.params.monitor: the validation has no {self.name!r}, so no best state is kept; it has {names}"
            )
        return None if found is None else found.item()

    def better(self, value: float, than: float | None) -> bool:
        return math.isfinite(value) and (than is None or (value > than if self.greatest else value < than))


class Stopped(Exception):
    """The user stopped the training."""


class KeptState(pl.Callback):
    """Keep the newest state in `LOGDIR/last.ckpt`, the one before in `previous.ckpt`, the settings in `config.yaml`.

    With a monitor, a measure of the validation, the state of its best value is kept in `best.ckpt`. Files are replaced
    atomically, so a kill at any moment leaves complete files for `main.py --resume LOGDIR`. A state that is not finite
    is not saved; the training ends with an error.
    """

    def __init__(self, path: Path, every_minutes: float, config: DictConfig, monitor: Monitor | None = None):
        self.path, self.every_seconds, self.config = path, 60.0 * every_minutes, OmegaConf.to_yaml(config, resolve=True)
        self.monitor = monitor
        self.best: dict[str, Any] = {}  # the monitor's name, its best value and the step
        self.saved_at, self.saved_step = time.monotonic(), -1
        self.counted = 0  # steps when the batch before ended
        self.within = False  # a step of several batches
        self.begun = False
        self.stopping = False

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state.get("best", {})
        if self.monitor is not None and best.get("name") == self.monitor.name:
            self.best = best

    def save(self, trainer: pl.Trainer) -> None:
        for name, parameter in trainer.lightning_module.named_parameters():
            if not parameter.isfinite().all():
                raise diverged(trainer, self.path.parent, f"weights that are not finite ({name})")
        try:
            self.write(trainer)
        except (OSError, RuntimeError) as error:  # PyTorch's word on a full disk
            raise ValueError(
                f"{self.path}: the state of step {trainer.global_step} can't be written: {one_line(error)}; "
                f"{kept_in(self.path.parent)}"
            ) from error
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step

    def write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path)  # all processes take part, the first one writes the file
            return
        with atomic_write(self.path) as unfinished:
            trainer.save_checkpoint(unfinished)
            if self.best.get("step") == trainer.global_step:
                with atomic_write(self.path.with_name(BEST)) as best:
                    copy(unfinished, best)
            if self.path.exists():
                with atomic_write(self.path.with_name(PREVIOUS)) as previous:
                    copy(self.path, previous)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.counted = trainer.global_step

    def write_config(self) -> None:
        with atomic_write(self.path.with_name("config.yaml")) as unfinished:
            unfinished.write_text(self.config, encoding="utf-8")
        self.begun = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: object) -> None:
        if not self.begun and trainer.is_global_zero:
            self.write_config()  # not earlier: a training whose first batch fails must leave no folder
        # Between the batches of one step there are gradients, which a state does not hold.
        stepped, self.counted = trainer.global_step > self.counted, trainer.global_step
        self.within = not stepped
        # The last step is saved here, too: afterwards Lightning counts a partial epoch as a whole one.
        last = trainer.global_step == trainer.max_steps
        best = self.best.get("step") == trainer.global_step != self.saved_step
        due = stepped and (last or best or self.stopping or time.monotonic() - self.saved_at > self.every_seconds)
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # all processes must save together
            self.save(trainer)
        if self.stopping and stepped:
            raise Stopped

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.monitor is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        value = self.monitor.value(trainer.callback_metrics)
        if value is not None and self.monitor.better(value, self.best.get("value")):
            # Between the batches of a step the state is that at the end of it.
            self.best = {"name": self.monitor.name, "value": value, "step": trainer.global_step + self.within}
            if not self.within:
                self.save(trainer)

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
