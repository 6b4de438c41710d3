"""The order of the data and the random numbers of a training. Both depend only on its seed and the step.

Nothing depends on earlier random numbers. So a resumed training gives the same weights as an uninterrupted one, and
validation and sample grids do not change them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

IMAGE, STEP = 0, 1  # purposes of random numbers


def seed_of(purpose: int, *place: int) -> int:
    """A seed for PyTorch for one purpose at one place (epoch, batch, ...)."""
    return int(np.random.SeedSequence((purpose, *place)).generate_state(1, np.uint64)[0])


class SeededImages(Dataset):
    """A dataset indexed by (index, seed of the image's random numbers)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return self.dataset[index]


class ImageOrder(DistributedSampler):
    """The indices for `SeededImages` in the order of an epoch, without the first `skip`."""

    skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place, index in enumerate(super().__iter__()):
            if place >= self.skip:
                yield index, seed_of(IMAGE, self.seed, self.epoch, self.rank, place)


class TrainingBatches(DataLoader):
    """Shuffled batches; an incomplete last one is dropped. A resumed epoch continues with its remaining batches.

    Args:
        dataset: its random numbers (`torch.rand`, ...) depend on the image and the epoch only.
        rank, processes: this process among those that train together; each gets other images.
        workers: processes that read images; they change no result.

    Raises:
        ValueError: there is no whole batch.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, rank: int = 0, processes: int = 1, workers: int = 0
    ):
        order = ImageOrder(dataset, processes, rank, shuffle=True, seed=seed, drop_last=True)
        if len(order) < batch_size:
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"data.params.batch_size: {batch_size} is more than the training set has: "
                f"{len(order)} images{each}; only whole batches are trained on"
            )
        super().__init__(SeededImages(dataset), batch_size, sampler=order, drop_last=True, num_workers=workers)
        self.given = 0  # batches of this epoch
        self.resumed = {"epoch": -1, "given": 0}

    def __iter__(self) -> Iterator[Any]:
        # A generator, so this runs when the first batch is requested: only then the epoch is known.
        self.given = self.resumed["given"] if self.resumed["epoch"] == self.sampler.epoch else 0
        self.sampler.skip = self.given * self.batch_size
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = dict(state)


class StepSeeds(pl.Callback):
    """Seeds the random numbers of a step (timesteps, noise, dropout) by its place in the training."""

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(seed_of(STEP, self.seed, trainer.current_epoch, batch_idx, trainer.global_rank))
