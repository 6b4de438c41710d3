"""Data modules of datasets that a configuration names: published ones, or one's own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm.io.files import Count, Seed
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.training.data import TrainingData
from ldm.training.latents import EncodedImages
from ldm.training.order import IMAGE, SeededImages, seed_of
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config

MOST_WORKERS = 8


def channels_first(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example whose images are (C, H, W) float32. Datasets give them as (H, W, C), as published."""
    return {key: first(value) for key, value in example.items()}


def first(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor) and value.ndim == 3:
        return value.movedim(-1, 0).float().contiguous()
    return value


class Examples(Dataset):
    """A dataset with its images as (C, H, W)."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return channels_first(self.dataset[i])


class Stream(IterableDataset):
    """As `Examples`, of a dataset that only gives one example after another."""

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(channels_first, self.dataset)


class InOrder(Sampler):
    """Indices for `SeededImages`, in order, always with the same random numbers."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((i, seed_of(IMAGE, self.seed, i)) for i in range(self.count))


@contextmanager
def naming_of(section: str) -> Iterator[None]:
    """Errors in the block name the section of the configuration."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{section}: {error}") from error


class DataModuleFromConfig(TrainingData):
    """Datasets by their `target:` and `params:`, under the published name (`main.DataModuleFromConfig`).

    Args:
        batch_size: images per step and process.
        train, validation: `target` and `params` of a dataset. An example is a dict; its images are (H, W, C) float32
            in [-1, 1].
        latents: folder where latents are kept, which the model's first stage encodes once; None = it encodes at every
            step. See `ldm.training.latents.EncodedImages`.
        num_workers: processes that read images; None = one for each core, at most 8. They change no result.
        test, predict, wrap, shuffle_test_loader, shuffle_val_dataloader, use_worker_init_fn: accepted for published
            configs; without effect here.
        seed: of the order and of the datasets' random numbers.
        packages: of one's own that may be named.

    Raises:
        ValueError: no training set; a dataset can't be made.
    """

    def __init__(
        self,
        batch_size: Count,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        seed: Seed = 23,
        packages: Sequence[str] = (),
        latents: str | None = None,
    ):
        super().__init__(batch_size, seed)
        if train is None:
            raise ValueError("train: expected target and params of the training set")
        self.sections = {"train": train, "validation": validation}
        self.workers = min(os.cpu_count() or 1, MOST_WORKERS) if num_workers is None else num_workers
        self.packages = tuple(packages)
        self.latents = Path(latents) if latents else None

    def made(self, name: str) -> Dataset | None:
        section = self.sections[name]
        if section is None:
            return None
        with naming_of(f"data.params.{name}"):
            dataset = instantiate_from_config(section, self.packages)
        if self.latents is not None:
            return self.encoded(dataset, name)
        return Stream(dataset) if isinstance(dataset, IterableDataset) else Examples(dataset)

    def encoded(self, dataset: Dataset, name: str) -> EncodedImages:
        """The dataset with its latents; the first process encodes them."""
        strategy, model = self.trainer.strategy, self.trainer.lightning_module.model
        if not isinstance(model, LatentDiffusion):
            raise ValueError("data.params.latents: only latent diffusion is trained on latents")
        first_stage = model.first_stage_model.to(strategy.root_device)
        with naming_of(f"data.params.{name}"):
            if not self.trainer.is_global_zero:
                strategy.barrier("latents")
            found = EncodedImages(dataset, first_stage, self.latents)
            if self.trainer.is_global_zero:
                strategy.barrier("latents")
        return found

    def setup(self, stage: str) -> None:
        self.train, self.val = self.made("train"), self.made("validation")

    def train_dataloader(self) -> DataLoader:
        if not isinstance(self.train, IterableDataset):
            return super().train_dataloader()
        print("data.params.train gives its images in an order of its own: a resumed run begins with its first ones")
        # New workers would begin each epoch with the order of the first one.
        kept = {"num_workers": self.workers, "persistent_workers": self.workers > 0}
        return DataLoader(self.train, self.batch_size, drop_last=True, **kept)

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        if isinstance(self.val, IterableDataset):
            return DataLoader(self.val, self.batch_size, num_workers=min(self.workers, 1))
        order = InOrder(len(self.val), self.seed)
        return DataLoader(SeededImages(self.val), self.batch_size, sampler=order, num_workers=self.workers)


OF_MODULE = tuple(inspect.signature(DataModuleFromConfig).parameters)


def data_of(section: Mapping[str, Any], seed: int, allow: Sequence[str] = ()) -> pl.LightningDataModule:
    """The data that a configuration's section `data` names.

    Its target is a data module, or a dataset, which becomes the training set of a `DataModuleFromConfig`; then the
    params are those of both.

    Args:
        allow: packages of one's own that may be named.

    Raises:
        ConfigError, ValueError: nothing such can be made.
    """
    kind, params = get_obj_from_str(section["target"], allow), dict(section.get("params") or {})
    if not inspect.isclass(kind) or not issubclass(kind, pl.LightningDataModule | Dataset):
        raise ConfigError(f"target: {section['target']!r} is neither a LightningDataModule nor a Dataset")
    own = inspect.signature(kind).parameters
    if issubclass(kind, Dataset):
        train = {"target": section["target"], "params": {k: v for k, v in params.items() if k not in OF_MODULE}}
        kept = {k: v for k, v in params.items() if k in ("batch_size", "num_workers")}
        say_unused([k for k in params if k in OF_MODULE and k not in kept], section["target"])
        return DataModuleFromConfig(**{"batch_size": 1} | kept, train=train, seed=seed, packages=allow)
    given = {"seed": seed, "packages": tuple(allow)}
    if not issubclass(kind, TrainingData):  # of the user: what a published base says of other data is not for it
        unused = [k for k in params if k in OF_MODULE and k not in own]
        say_unused(unused, section["target"])
        params = {k: v for k, v in params.items() if k not in unused}
    return instantiate_from_config(
        {"target": section["target"], "params": params}, allow, **{k: v for k, v in given.items() if k in own}
    )


def say_unused(names: Iterable[str], target: str) -> None:
    if names := list(names):
        print(f"data.params: {', '.join(names)} of the configuration: not used, {target} does not take them")


def entry_of(batch: Mapping[str, Any], name: str) -> Any:
    """What a batch has under a name.

    Raises:
        ValueError: nothing: the data is for another kind of model.
    """
    if name not in batch:
        raise ValueError(
            f"data: its examples have no {name!r}, which this model is trained on; they have {', '.join(batch)}"
        )
    return batch[name]
