"""Checkpoints that survive a kill, and sample grids."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from ldm.images import grid, save_png, to_pil


class AtomicCheckpoint(pl.Callback):
    """Keep the newest state in `LOGDIR/last.ckpt`, replaced in one rename every few minutes.

    A kill at any moment leaves the last whole file, from which `main.py --resume LOGDIR` goes on.
    """

    def __init__(self, path: Path, every_minutes: float):
        self.path, self.every_seconds = path, 60.0 * every_minutes
        self.saved_at = time.monotonic()

    def save(self, trainer: pl.Trainer) -> None:
        unfinished = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(unfinished)
        os.replace(unfinished, self.path)
        self.saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if time.monotonic() - self.saved_at > self.every_seconds:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer)


class SampleGrid(pl.Callback):
    """After each validation, save `module.pictures(first validation batch)` as `LOGDIR/samples/STEP.png`."""

    def __init__(self, folder: Path, columns: int = 8, rows: int = 2):
        self.folder, self.columns, self.rows = folder, columns, rows

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        batch = next(iter(trainer.val_dataloaders))
        count = self.columns * self.rows
        batch = {k: v[:count].to(module.device) if isinstance(v, Tensor) else v[:count] for k, v in batch.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"{trainer.global_step:08d}.png", grid(to_pil(module.pictures(batch)), self.columns),
                 {"step": trainer.global_step})
