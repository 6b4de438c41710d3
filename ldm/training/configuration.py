"""A training's configuration: files and single settings, read together and checked."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import model_validator
from yaml import YAMLError

from ldm.io.errors import fault_of, shown
from ldm.io.files import AboveZero, Count, NotNegative, Schema, Seed, Text, check_names, parse, read_config
from ldm.training.published import completed
from ldm.training.watch import GREATEST

SEED = 23  # of weights, data order and noise, if the configuration has none
OURS = {"logger", "callbacks", "enable_checkpointing", "use_distributed_sampler"}  # that a config can't set
TRAINER = set(inspect.signature(pl.Trainer.__init__).parameters) - OURS - {"self"}
WORDS = "training.params.new_tokens"
RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")


class _Section(Schema):
    target: Text
    params: dict[str, Any] | None = None


class _Trainer(Schema, extra="allow"):
    """Arguments of Lightning's trainer; Lightning checks the others."""

    max_steps: int | None = None
    min_steps: int | None = None
    max_epochs: int | None = None
    min_epochs: int | None = None
    accumulate_grad_batches: Count | None = None
    gradient_clip_val: NotNegative | None = None
    log_every_n_steps: int | None = None
    val_check_interval: AboveZero | None = None  # batches, or a share of an epoch

    @model_validator(mode="before")
    @classmethod
    def _has_lightnings_names(cls, content: Any) -> Any:
        if isinstance(content, Mapping):
            check_names(content, sorted(TRAINER))
        return content


class _Lightning(Schema):
    trainer: _Trainer
    checkpoint_every_minutes: NotNegative = 3.0
    loss_limit: AboveZero | None = GREATEST
    callbacks: dict[str, _Section] = {}
    seed: Seed = SEED


class _Config(Schema):
    model: _Section
    training: _Section
    data: _Section
    lightning: _Lightning


def read_configuration(
    files: Sequence[Path],
    overrides: Sequence[str],
    seed: int | None = None,
    steps: int | None = None,
    scale_lr: bool = False,
    allow: Sequence[str] = (),
) -> DictConfig:
    """What configuration files and single settings say together.

    Args:
        files: later ones override earlier ones.
        overrides: KEY=VALUE, in the words of OmegaConf.
        seed: of weights, data order and noise; None = the configuration's, or 23.
        steps: in all, see `with_steps`; None = the configuration's.
        scale_lr, allow: see `ldm.training.published.completed`.

    Raises:
        SettingError: a single setting can't be used.
        ValueError, OSError: a file can't be read, or says what is not accepted.
    """
    config = OmegaConf.create()
    for path in files:
        part = read_config(path)
        if not OmegaConf.is_dict(part):
            raise ValueError(f"{path}: expected sections and their settings; got a list")
        merge(config, part)
    # The targets first: with another one, params that were for the old one go.
    for text in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".target")):
        with fault_of(text, (ValueError, OmegaConfBaseException, YAMLError)):
            merge(config, OmegaConf.from_dotlist([text]), words=text.partition("=")[0] == WORDS)
    try:
        check_references(config)
        config, lines = completed(config, scale_lr, allow)
        print(*lines, sep="\n", end="\n" if lines else "")
        check(config)
        config.lightning.seed = seed if seed is not None else config.lightning.get("seed", SEED)
        return with_steps(config, steps) if steps else config
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error


def merge(config: DictConfig, part: DictConfig, words: bool = True) -> None:
    """Add what a part says to the configuration; a dataset that is replaced by another leaves no params to it.

    words: new words of the part are all of them, in the place of those that a configuration names as an example.
    """
    if words and OmegaConf.select(config, WORDS) and OmegaConf.select(part, WORDS):
        OmegaConf.update(config, WORDS, {}, merge=False)
    for name in ("train", "validation"):
        before, after = (OmegaConf.select(one, f"data.params.{name}.target") for one in (config, part))
        if before and after and before != after:
            config.data.params[name].params = {}
    config.merge_with(part)


def check(config: DictConfig) -> None:
    """Raise ValueError unless the sections and the names in them are those of a training."""
    check_references(config)
    parse(_Config, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def check_references(config: DictConfig) -> None:
    """Raise ValueError if a setting refers to the environment: it may refer to others (${data.params.root}) only."""
    for key, value in flat(OmegaConf.to_container(config)).items():
        if RESOLVER.search(str(value)):
            raise ValueError(
                f"{key}: {shown(value)} reads from outside of the configuration; accepted: a value, or a "
                f"reference such as ${{data.params.batch_size}}"
            )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    values = {}
    for key, value in settings.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


# A shorter or longer run


def with_steps(config: DictConfig, steps: int) -> DictConfig:
    """The configuration for another number of steps; the learning-rate schedule is stretched with them.

    There is a validation at the end at the latest.
    """
    config = config.copy()
    trainer = config.lightning.trainer
    before, trainer.max_steps = trainer.get("max_steps", -1), steps
    for key in ("val_check_interval", "log_every_n_steps"):
        if isinstance(trainer.get(key), int):
            trainer[key] = min(trainer[key], steps)
    sections = (OmegaConf.select(s, "params.scheduler_config.params") for s in (config.model, config.training))
    schedules = [schedule for schedule in sections if schedule is not None]
    if isinstance(before, int) and before > 0:
        for schedule in schedules:
            scale_schedule(schedule, steps / before)
    elif schedules:
        print("--steps: the learning-rate schedule stays as it is; no lightning.trainer.max_steps says what it was for")
    return config


def scale_schedule(params: DictConfig, ratio: float) -> None:
    """Scale the numbers of steps of a schedule of `ldm.lr_scheduler`."""
    for key, rounded in (("warm_up_steps", math.floor), ("max_decay_steps", math.ceil), ("cycle_lengths", math.ceil)):
        if key in params:
            value = params[key]
            params[key] = (
                rounded(value * ratio) if isinstance(value, int | float) else [rounded(v * ratio) for v in value]
            )
