"""A training whose losses are lost ends, and says where; the last good state stays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ldm.training.state import BEST, LAST, steps_done

FIRST = 100  # batches whose greatest loss the later ones are compared with
GREATEST = 100.0  # times that loss


class LossWatch(pl.Callback):
    """End a training when a loss is not finite, or explodes.

    All losses that a step logs must be finite. The loss that the training module names in `watched` explodes when it is
    more than `limit` times the greatest of the first FIRST batches.

    Args:
        folder: of the run.
        limit: None = a loss may be as great as it wants.

    Raises:
        ValueError: (while training) such a loss; the message says which one, where, and what is kept.
    """

    def __init__(self, folder: Path, limit: float | None = GREATEST):
        self.folder, self.limit = folder, limit
        self.seen, self.greatest = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "greatest": self.greatest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.greatest = state["seen"], state["greatest"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        what = self.wrong({"loss": outputs["loss"]} | losses_of(trainer), module.watched)
        # Processes that train together end together: one that waited for the others would wait for ever.
        if trainer.strategy.reduce_boolean_decision(what is not None, all=False):
            raise diverged(trainer, self.folder, f"{what or 'a loss of another process'}, batch {batch_idx + 1}")

    def wrong(self, losses: Mapping[str, Tensor], watched: str) -> str | None:
        """What is wrong with the losses of a batch; None = nothing."""
        values = {name: value.item() for name, value in losses.items()}
        for name, value in losses.items():
            if not value.isfinite():
                return f"{name} is {values[name]}"
        value = abs(values.get(watched, values["loss"]))
        if self.seen < FIRST:
            self.seen, self.greatest = self.seen + 1, max(self.greatest, value)
        elif self.limit is not None and value > self.limit * self.greatest:
            return (
                f"{watched} is {value:.4g}, more than lightning.loss_limit = {self.limit:g} times the greatest of the "
                f"first {FIRST} batches, {self.greatest:.4g}"
            )
        return None


def losses_of(trainer: pl.Trainer) -> dict[str, Tensor]:
    """The losses that the last step logged, by their names."""
    return {name: v for name, v in trainer.callback_metrics.items() if name.startswith("train/") and "loss" in name}


def kept_in(folder: Path) -> str:
    """What is printed about the states in the folder of a run."""
    states = [path for path in (folder / LAST, folder / BEST) if path.exists()]
    return ", ".join(f"{path} holds step {steps_done(path)}" for path in states) or "nothing was kept yet"


def diverged(trainer: pl.Trainer, folder: Path, what: str) -> ValueError:
    """The error of a training that can't go on: what is wrong, where, and what is kept."""
    return ValueError(
        f"{what}, at step {trainer.global_step} (epoch {trainer.current_epoch}); {kept_in(folder)}. A lower "
        f"training.params.learning_rate or lightning.trainer.gradient_clip_val may help"
    )
