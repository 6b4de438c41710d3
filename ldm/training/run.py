"""One training run: from a configuration to a folder with everything the run made."""

from __future__ import annotations

import inspect
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.io.errors import did_you_mean
from ldm.training.callbacks import KeptState, SampleGrid, StepBar
from ldm.training.order import StepSeeds
from ldm.training.state import LAST, check_fits, read_state
from ldm.util import instantiate_from_config

SECTIONS = {
    "model": {"target", "params"},
    "training": {"target", "params"},
    "data": {"target", "params"},
    "lightning": {"trainer", "checkpoint_every_minutes", "seed"},
}
SEED = 23  # of weights, data order and noise, if the configuration names none
OURS = {"logger", "callbacks", "enable_checkpointing", "use_distributed_sampler"}  # that a config can't set
WHOLE = {"max_steps", "min_steps", "max_epochs", "min_epochs", "accumulate_grad_batches", "log_every_n_steps"}
TRAINER = set(inspect.signature(pl.Trainer.__init__).parameters) - OURS - {"self"}


def fit(config: DictConfig, logdir: Path, train: bool = True) -> pl.LightningModule:
    """Train (or, with train=False, validate) what `config` describes; resume if `logdir` has a last.ckpt.

    The weights depend on the configuration and its seed only, not on where the training was stopped and resumed.

    Raises:
        ValueError: a section is missing or not known, or an argument in it is wrong; last.ckpt is damaged; the loss
            is not finite.
    """
    check(config)
    seed, last = config.lightning.get("seed", SEED), logdir / LAST
    state = read_state(last) if last.exists() else None
    done = state["global_step"] if state else 0
    if state:
        say_what_changed(state, config, logdir)
    pl.seed_everything(seed, workers=True, verbose=False)
    model = built("model", config.model)
    module = built("training", config.training, model=model)
    if state:
        check_fits(state, module, last)
    data = built("data", config.data, seed=seed)
    settings = OmegaConf.to_container(config.lightning.trainer)
    bar = [StepBar()] if settings.pop("enable_progress_bar", True) else []
    kept = KeptState(last, config.lightning.get("checkpoint_every_minutes", 3.0), config)
    trainer = trainer_of(
        settings,
        # The CSV logger deletes what it finds in its folder, so every start of the run gets its own.
        logger=[
            CSVLogger(logdir, name="metrics", version=f"{done:08d}"),
            TensorBoardLogger(logdir, name="", version="tensorboard"),
        ]
        if train
        else False,
        callbacks=[StepSeeds(seed), kept, *([SampleGrid(logdir / "samples")] if train else []), *bar],
    )
    resumed = last if state else None
    if not train:
        print(f"{logdir}: " + (f"validating step {done}" if state else "no training yet: validating new weights"))
        trainer.validate(module, data, ckpt_path=resumed, weights_only=True, verbose=False)
    elif trainer.max_steps == 0:
        raise ValueError("lightning.trainer.max_steps: 0 steps train nothing")
    elif 0 < trainer.max_steps <= done:
        print(f"{logdir}: all {trainer.max_steps} steps are done; lightning.trainer.max_steps=N goes on to step N")
    else:
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        print(f"{logdir}: {trained / 1e6:.2f} M weights, from step {done} to {trainer.max_steps}")
        with no_trace_unless_begun(logdir), kept.stopped_after_a_step():
            make_steps(trainer, module, data, resumed, done)
    return module


def make_steps(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, resumed: Path | None, done: int
) -> None:
    """Train on from step `done`, whose state is in the file `resumed`.

    Raises:
        ValueError: the first step fails, or none is made.
    """
    try:
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    except RuntimeError as error:
        if trainer.global_step > done:
            raise
        raise ValueError(f"the network fails in its first step: {error}") from error
    if trainer.global_step == done:
        raise ValueError("no step was made: lightning.trainer limits epochs, time or batches to none")


@contextmanager
def no_trace_unless_begun(logdir: Path) -> Iterator[None]:
    """Of a training that is refused before its first step, no folder stays; Lightning's refusals are ValueErrors."""
    new = not logdir.exists()
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    finally:
        if new and not (logdir / "config.yaml").exists():
            shutil.rmtree(logdir, ignore_errors=True)


def check(config: DictConfig) -> None:
    """Raise ValueError unless the sections, and the names in them, are those of a training."""
    if not OmegaConf.is_dict(config):
        raise ValueError(f"expected the sections {', '.join(SECTIONS)}; got a list")
    for name in config:
        if name not in SECTIONS:
            raise ValueError(f"no section {name!r}{did_you_mean(str(name), SECTIONS)}; accepted: {', '.join(SECTIONS)}")
    for name, accepted in SECTIONS.items():
        required = "trainer" if name == "lightning" else "target"
        section = config.get(name)
        if not OmegaConf.is_dict(section) or section.get(required) is None:
            raise ValueError(
                f"the section {name} is missing, or has no {required}; a training needs the sections "
                f"{', '.join(SECTIONS)}"
            )
        for key in section:
            if key not in accepted:
                raise ValueError(
                    f"{name}.{key} is not known{did_you_mean(str(key), accepted)}; accepted in {name}: "
                    f"{', '.join(sorted(accepted))}"
                )
    if not OmegaConf.is_dict(config.lightning.trainer):
        raise ValueError(f"lightning.trainer: expected settings by name; got {config.lightning.trainer!r}")
    minutes, seed = config.lightning.get("checkpoint_every_minutes", 0), config.lightning.get("seed", 0)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
        raise ValueError(f"lightning.checkpoint_every_minutes: expected a number from 0 on; got {minutes!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"lightning.seed: expected a whole number in 0..2^32-1; got {seed!r}")


def built(section: str, config: Mapping[str, Any], **given: Any) -> Any:
    """The object of a section; what its constructor can't use is the section's fault."""
    try:
        return instantiate_from_config(config, **given)
    except (TypeError, AttributeError, OSError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{section}: {error}") from error


def trainer_of(settings: Mapping[str, Any], **ours: Any) -> pl.Trainer:
    """A trainer with the settings of `lightning.trainer`, of which none may be unknown."""
    for key in settings:
        if key not in TRAINER:
            raise ValueError(
                f"lightning.trainer.{key} is not known{did_you_mean(str(key), TRAINER)}; accepted: "
                f"{', '.join(sorted(TRAINER))}"
            )
    accelerator = settings.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"lightning.trainer.accelerator: {accelerator!r}, but there is no GPU that PyTorch can use; "
            f"accepted here: 'cpu', 'auto'"
        )
    for key in WHOLE & settings.keys():
        if isinstance(settings[key], bool) or not isinstance(settings[key], int | None):
            raise ValueError(f"lightning.trainer.{key}: expected a whole number; got {settings[key]!r}")
    devices, cores = settings.get("devices"), os.cpu_count()
    if accelerator == "cpu" and isinstance(devices, int) and devices > cores:
        raise ValueError(f"lightning.trainer.devices: {devices} processes on a CPU of {cores} cores")
    every = settings.get("val_check_interval")
    if isinstance(every, int | float) and every <= 0:
        raise ValueError(
            f"lightning.trainer.val_check_interval: expected batches from 1 on, or a share of an epoch "
            f"above 0; got {every!r}"
        )
    quiet = {"enable_model_summary": False, "enable_progress_bar": False}
    try:
        return pl.Trainer(**quiet | settings, **ours, enable_checkpointing=False)
    except Exception as error:  # what a setting can't be is for Lightning to say, in exceptions of many kinds
        raise ValueError(f"lightning.trainer: {error}; got {dict(settings)}") from error


# A run that goes on


def say_what_changed(state: Mapping[str, Any], config: DictConfig, logdir: Path) -> None:
    """Print each setting that is not what the state was trained with."""
    kept = state.get("callbacks", {}).get(KeptState.__name__, {}).get("config")
    if kept is None:
        print(
            f"{logdir}: {LAST} was written before its place in the data was kept: the rest of this epoch comes in "
            f"another order, so the weights will differ from those of a run without a stop"
        )
        return
    before, now = flat(OmegaConf.to_container(OmegaConf.create(kept))), flat(OmegaConf.to_container(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            print(f"{logdir}: changed at step {state['global_step']}: {key}: {before.get(key)} -> {now.get(key)}")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    values = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


# A shorter or longer run


def with_steps(config: DictConfig, steps: int) -> DictConfig:
    """The configuration for another number of steps: the learning-rate schedule keeps its shape.

    A validation comes at the latest at the end.
    """
    config = config.copy()
    trainer = config.lightning.trainer
    before, trainer.max_steps = trainer.get("max_steps", -1), steps
    for key in ("val_check_interval", "log_every_n_steps"):
        if isinstance(trainer.get(key), int):
            trainer[key] = min(trainer[key], steps)
    if isinstance(before, int) and before > 0:
        for section in (config.model, config.training):
            scale_schedule(OmegaConf.select(section, "params.scheduler_config.params"), steps / before)
    return config


def scale_schedule(params: DictConfig | None, ratio: float) -> None:
    """Change the steps that a schedule of `ldm.lr_scheduler` is given."""
    for key, rounded in (("warm_up_steps", math.floor), ("max_decay_steps", math.ceil), ("cycle_lengths", math.ceil)):
        if params is not None and key in params:
            value = params[key]
            params[key] = (
                rounded(value * ratio) if isinstance(value, int | float) else [rounded(v * ratio) for v in value]
            )
