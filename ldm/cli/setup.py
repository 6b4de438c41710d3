"""The model of a run, from its files' names and its config: all that can be known before a slow load."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import Files
from ldm.cli.devices import find_device
from ldm.cli.model_files import model_files
from ldm.cli.processes import ALONE, Processes
from ldm.io.errors import BadInput, blame
from ldm.io.files import clean, unfinished

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling.engine import Sizes


@dataclass(frozen=True)
class Setup:
    """The model to use, from its files' names and its config: all that can be known before it is loaded."""

    config_path: Path
    ckpt: Path
    config: Any
    sizes: Sizes
    device: torch.device
    processes: Processes

    def load(self, weights: str) -> LatentDiffusion:
        """The model on the run's device; `weights` as `load_model` takes them.

        Raises:
            BadInput: the files do not make a model.
        """
        from ldm.checkpoint import CheckpointError, load_model

        # A config that does not build a model may fail in any way that a constructor can.
        with blame("--config", (ValueError, OSError, TypeError, KeyError)), blame("--ckpt", (CheckpointError,)):
            return load_model(self.config_path, self.ckpt, self.device, weights)


def make_setup(args: argparse.Namespace, default: Files | None = None, processes: Processes | None = None) -> Setup:
    """What is quick to check comes before what is slow to load.

    args: what `model_arguments` give, and outdir, which may be None.
    processes: that make each picture together; None = those that torchrun has started.
    """
    config_path, ckpt = model_files(args, default)
    if args.outdir is not None:
        check_outdir(Path(args.outdir))
    processes = Processes.of_run() if processes is None else processes
    device = find_device(args.device, processes)
    if processes.several and args.guidance_reuse:
        raise BadInput(
            "--guidance-reuse: needs the key step's guidance at every later step, so it does not go with "
            "several processes"
        )

    setup = read_setup(config_path, ckpt, device, processes)
    for flag, given, real in (("--C", args.C, setup.sizes.channels), ("--f", args.f, setup.sizes.factor)):
        if given not in (None, real):
            raise BadInput(f"{flag}: this model's is {real}; got {given}")
    return setup


def read_setup(config_path: Path, ckpt: Path, device: torch.device, processes: Processes = ALONE) -> Setup:
    """What the files say."""
    from ldm.checkpoint import check_weights, load_config
    from ldm.checkpoint.diagnosis import stated_prediction
    from ldm.sampling.engine import Sizes

    with blame("--config"):
        config = load_config(config_path)
        sizes = Sizes.of(config.model)
    says, stated = config.model.params.get("parameterization", "eps"), stated_prediction(ckpt)
    if stated not in (None, says):
        raise BadInput(
            f"--config: its parameterization is {says}; the network in {ckpt} predicts {stated}, its scheduler says"
        )
    with blame("--ckpt"):
        check_weights(ckpt)
    return Setup(config_path, ckpt, config, sizes, device, processes)


def check_output(path: str | None, flag: str = "--out") -> None:
    """It must be possible to write the file; found out before the work."""
    if path is None:
        return
    with blame(flag, (OSError,)):  # a name that no file can have
        place = next(p for p in Path(path).absolute().parents if p.exists())
        if Path(path).is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
            raise BadInput(f"{flag}: can't write {path}; expected a file in a writable directory")


def check_outdir(outdir: Path, flag: str = "--outdir") -> None:
    """It must be possible to write there; nothing is left behind by finding out."""
    with blame(flag, (OSError,)):  # a name that no file can have
        place = next(p for p in (outdir, *outdir.absolute().parents) if p.exists())
    if not place.is_dir():
        raise BadInput(f"{flag}: {place} is a file; expected a directory")
    try:
        clean(place)
        with unfinished(place):
            pass
    except OSError as error:
        raise BadInput(f"{flag}: can't write to {outdir}: {error.strerror}") from error


def picture_size(args: argparse.Namespace, sizes: Sizes, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of the pictures, from --H and --W; default: the model's."""
    height, width = default or (sizes.default, sizes.default)
    height, width = args.H or height, args.W or width
    for flag, value in (("--H", height), ("--W", width)):
        if value % sizes.multiple:
            raise BadInput(f"{flag}: must be a multiple of {sizes.multiple} for this model; got {value}")
    return height, width


def conditioner(setup: Setup) -> nn.Module:
    """The model's conditioner without its weights, to see what it takes."""
    config = setup.config.model.params.get("cond_stage_config")
    if isinstance(config, str):
        raise BadInput(f"--config: a model without a conditioner of its own: its cond_stage_config is {config}")
    return without_weights(config)


def without_weights(config: Any) -> nn.Module:
    """The model, or a part of it, built from its part of the config."""
    import torch

    from ldm.checkpoint import Bounded
    from ldm.util import instantiate_from_config

    with blame("--config", (ValueError, OSError, TypeError, KeyError)), torch.device("meta"), Bounded():
        return instantiate_from_config(config)
