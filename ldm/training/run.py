"""One training run: from a configuration to a folder with all its results."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.io.files import Text, parse
from ldm.training.callbacks import KeptState, Monitor, SampleGrid, StepBar
from ldm.training.configuration import SEED, check, flat
from ldm.training.datasets import data_of
from ldm.training.order import StepSeeds
from ldm.training.published import MEASURES, devices_of
from ldm.training.state import BEST, LAST, check_fits, read_state
from ldm.training.watch import GREATEST, LossWatch
from ldm.util import get_obj_from_str, instantiate_from_config

WHOLE = ("auto", "ddp", "single_device")  # strategies whose processes each have all weights
DIED = re.compile(r"DataLoader worker .*(exited|killed)")  # how PyTorch says so


def fit(
    config: DictConfig, logdir: Path, train: bool = True, allow: Sequence[str] = (), resumed: str = LAST
) -> pl.LightningModule:
    """Train (or, with train=False, validate) what `config` describes; resume if `logdir` has the state `resumed`.

    The weights depend on the configuration and its seed only, not on where the training was stopped and resumed.

    Args:
        resumed: the file of that state in the folder: last.ckpt, previous.ckpt or best.ckpt.
        allow: packages of one's own from which the sections `data` and `lightning.callbacks` may name classes.

    Raises:
        ValueError: a section or an argument in it is missing, unknown or wrong; the state is damaged; the loss is
            not finite, or explodes.
    """
    check(config)
    seed, file = config.lightning.get("seed", SEED), logdir / resumed
    state = read_state(file) if file.exists() or resumed != LAST else None
    done = state["global_step"] if state else 0
    if state:
        say_what_changed(state, config, logdir)
    pl.seed_everything(seed, workers=True, verbose=False)
    model = built("model", config.model)
    settings = OmegaConf.to_container(config.lightning.trainer, resolve=True)
    module = built("training", config.training, model=model, **managed(config.training, settings))
    if state:
        check_fits(state, module, file)
    with naming("data"):
        data = data_of(config.data, seed, allow)
    if several(settings):
        settings.setdefault("strategy", module.strategy)
    bar = [StepBar()] if settings.pop("enable_progress_bar", True) else []
    kept = KeptState(logdir / LAST, config.lightning.get("checkpoint_every_minutes", 3.0), config, monitor_of(config))
    callbacks = [
        StepSeeds(seed),
        LossWatch(logdir, config.lightning.get("loss_limit", GREATEST)),
        *callbacks_of(config.lightning, allow),  # before what depends on their measures
        kept,
        *([SampleGrid(logdir / "samples")] if train else []),
        *bar,
    ]
    trainer = trainer_of(settings, logger=loggers(logdir, done) if train else False, callbacks=callbacks)
    begun = file if state else None
    if not train:
        print(f"{logdir}: " + (f"validating step {done}" if state else "no training yet: validating new weights"))
        trainer.validate(module, data, ckpt_path=begun, weights_only=True, verbose=False)
    elif trainer.max_steps == 0:
        raise ValueError("lightning.trainer.max_steps: 0 steps train nothing")
    elif 0 < trainer.max_steps <= done:
        print(f"{logdir}: all {trainer.max_steps} steps are done; lightning.trainer.max_steps=N continues to step N")
    else:
        print(f"{logdir}: {what_is_trained(trainer, module, done)}; {kept_states(kept.monitor)}")
        with no_trace_unless_begun(logdir), kept.stopped_after_a_step():
            make_steps(trainer, module, data, begun, done)
    return module


def loggers(logdir: Path, done: int) -> list[Logger]:
    """CSV and TensorBoard. The CSV logger empties its folder, so each start of the run has its own."""
    return [
        CSVLogger(logdir, name="metrics", version=f"{done:08d}"),
        TensorBoardLogger(logdir, name="", version="tensorboard"),
    ]


def what_is_trained(trainer: pl.Trainer, module: pl.LightningModule, done: int) -> str:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    end = f"to {trainer.max_steps}" if trainer.max_steps > 0 else f"to the end of epoch {trainer.max_epochs}"
    return f"{trained / 1e6:.2f} M weights, from step {done} {end}"


def callbacks_of(lightning: DictConfig, allow: Sequence[str]) -> list[pl.Callback]:
    """What the section lightning.callbacks names: measures of `evaluation`, or callbacks of an allowed package."""
    made = []
    for name, section in (lightning.get("callbacks") or {}).items():
        with naming(f"lightning.callbacks.{name}"):
            kind = get_obj_from_str(section.target, (*MEASURES, *allow))
            if not (inspect.isclass(kind) and issubclass(kind, pl.Callback)):
                raise ValueError(f"target: {section.target!r} is not a callback of Lightning")
            made.append(instantiate_from_config(section, (*MEASURES, *allow)))
    return made


def monitor_of(config: DictConfig) -> Monitor | None:
    """The measure by which the model's configuration says that states are compared."""
    name = OmegaConf.select(config, "model.params.monitor")
    return Monitor(parse(Text, name, "model.params.monitor")) if name is not None else None


def kept_states(monitor: Monitor | None) -> str:
    """What is printed about the states that a training keeps."""
    if monitor is None:
        return f"kept: {LAST}"
    return f"kept: {LAST}, and {BEST} by the {'greatest' if monitor.greatest else 'least'} {monitor.name}"


def managed(training: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Take those settings out of the trainer's that the training module manages itself."""
    kind = get_obj_from_str(training["target"])
    return {name: settings.pop(name) for name in getattr(kind, "manages", ()) if settings.get(name) is not None}


def several(settings: Mapping[str, Any]) -> bool:
    """Whether the trainer will be several processes."""
    return settings.get("num_nodes", 1) > 1 or devices_of(OmegaConf.create(dict(settings))) > 1


def make_steps(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, resumed: Path | None, done: int
) -> None:
    """Train on from step `done`, whose state is in the file `resumed`.

    Raises:
        ValueError: the first step fails, none is made, an image can't be read, or a process that reads images dies.
    """
    try:
        trainer.fit(module, data, ckpt_path=resumed, weights_only=True)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, ConnectionError) or DIED.search(str(error)):
            hear_of_no_more_deaths()
            raise ValueError(
                f"a process that reads images died at step {trainer.global_step}, maybe for want of memory (with "
                f"data.params.num_workers=0 there is none); the last state that was saved is kept"
            ) from error
        if not isinstance(error, RuntimeError):
            raise ValueError(of_worker(str(error))) from error
        if trainer.global_step > done:
            raise
        raise ValueError(f"the network fails in its first step: {error}") from error
    if trainer.global_step == done:
        raise ValueError("no step was made: lightning.trainer limits epochs, time or batches to none")


def hear_of_no_more_deaths() -> None:
    """Take PyTorch's handler of SIGCHLD away.

    It raises wherever the program is when a process that reads images dies. A pipe that breaks may have told of the
    same death before; what is done about it then must come to its end.
    """
    for _ in range(2):  # a signal that is under way is raised in the place of the first call
        with suppress(RuntimeError, ValueError):  # a thread other than the main one has no handlers
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def of_worker(message: str) -> str:
    """The message of an error, without the trace that PyTorch puts around one of a process that reads images."""
    if not (message.startswith("Caught ") and "DataLoader worker" in message):
        return message
    last = message.strip().rpartition("\n")[2]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", last)


@contextmanager
def no_trace_unless_begun(logdir: Path) -> Iterator[None]:
    """Delete the new folder of a training that fails before its first step; Lightning's errors become ValueErrors."""
    new = not logdir.exists()
    try:
        yield
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    finally:
        if new and not (logdir / "config.yaml").exists():
            shutil.rmtree(logdir, ignore_errors=True)


def built(section: str, config: Mapping[str, Any], **given: Any) -> Any:
    """The object of a section; errors of its constructor name the section."""
    with naming(section):
        return instantiate_from_config(config, **given)


@contextmanager
def naming(section: str) -> Iterator[None]:
    """Errors in the block become ValueErrors that name the section."""
    try:
        yield
    except (TypeError, AttributeError, OSError, ValueError, OmegaConfBaseException) as error:
        raise ValueError(f"{section}: {error}") from error


def trainer_of(settings: Mapping[str, Any], **ours: Any) -> pl.Trainer:
    """A trainer with the settings of `lightning.trainer`.

    Raises:
        ValueError: a setting that can't be used on this machine, or that Lightning refuses.
    """
    accelerator = settings.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"lightning.trainer.accelerator: {accelerator!r}, but there is no GPU that PyTorch can use; "
            f"accepted here: 'cpu', 'auto'"
        )
    strategy = str(settings.get("strategy", "auto"))
    if not strategy.startswith(WHOLE):
        raise ValueError(
            f"lightning.trainer.strategy: {strategy!r} may give each process a part of the weights only; averages and "
            f"states need all of them; accepted: {', '.join(WHOLE)} and their kinds. Memory is saved by precision: "
            f"bf16-mixed, use_checkpoint: true of the network, and accumulate_grad_batches"
        )
    devices, cores = settings.get("devices"), os.cpu_count()
    if accelerator == "cpu" and isinstance(devices, int) and devices > cores:
        raise ValueError(f"lightning.trainer.devices: {devices} processes on a CPU of {cores} cores")
    quiet = {"enable_model_summary": False, "enable_progress_bar": False}
    try:
        return pl.Trainer(**quiet | settings, **ours, enable_checkpointing=False)
    except Exception as error:  # Lightning checks the settings and raises exceptions of many kinds
        raise ValueError(f"lightning.trainer: {error}; got {dict(settings)}") from error


# A run that goes on


def say_what_changed(state: Mapping[str, Any], config: DictConfig, logdir: Path) -> None:
    """Print each setting that differs from those of the saved state."""
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
