"""One training run: from a configuration to a folder with everything the run made."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from ldm.training.callbacks import AtomicCheckpoint, SampleGrid
from ldm.util import get_obj_from_str, instantiate_from_config

SECTIONS = {"model", "training", "data", "lightning"}


def steps_done(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True, mmap=True)["global_step"]


def fit(config: DictConfig, logdir: Path, train: bool = True) -> pl.LightningModule:
    """Train (or, with train=False, validate) what `config` describes; resume if `logdir` has a last.ckpt.

    Raises:
        ValueError: a section is missing or not known, or an argument in it is wrong.
    """
    if set(config) != SECTIONS:
        raise ValueError(f"config needs exactly the sections {sorted(SECTIONS)}; got {sorted(config)}")
    logdir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, logdir / "config.yaml")
    training = get_obj_from_str(config.training.target)
    module = training(instantiate_from_config(config.model), **config.training.get("params", {}))
    data = instantiate_from_config(config.data)
    last = logdir / "last.ckpt"
    resume = last if last.exists() else None
    # The CSV logger deletes what it finds in its folder, so every start of the run gets its own.
    start = f"{steps_done(last) if resume else 0:08d}"
    checkpoint = AtomicCheckpoint(last, config.lightning.get("checkpoint_every_minutes", 3.0))
    trainer = pl.Trainer(
        **OmegaConf.to_container(config.lightning.trainer),
        logger=[CSVLogger(logdir, name="metrics", version=start),
                TensorBoardLogger(logdir, name="", version="tensorboard")],
        callbacks=[checkpoint, SampleGrid(logdir / "samples")],
        enable_checkpointing=False,          # AtomicCheckpoint writes the only one
        use_distributed_sampler=True,
    )
    if train:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    else:
        trainer.validate(module, data, ckpt_path=resume, weights_only=True)
    return module
