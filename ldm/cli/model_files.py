"""The files of a run's model: those given, one of them found from the other, or the script's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoint.published import Published, load_manifest
from ldm.cli.arguments import EMOJI64, Files
from ldm.io.errors import BadInput, blame
from ldm.util import PROJECT_ROOT

# PyTorch and what needs it are imported where they are used: --help must answer at once.
if TYPE_CHECKING:
    from ldm.checkpoint.diagnosis import Facts


def model_files(args: argparse.Namespace, default: Files | None) -> Files:
    """Config and weights, from --config, --ckpt or both; without them the default.

    Raises:
        BadInput: a file is not there, or there is not exactly one that belongs to the one given.
    """
    if args.config is None and args.ckpt is None and default is None:
        raise BadInput("--config: needed, together with --ckpt: the files of the model")
    config, ckpt = default if args.config is None and args.ckpt is None else (args.config, args.ckpt)
    with blame("--config", (OSError,)):  # a name that no file can have
        if config is not None and not Path(config).is_file():
            raise BadInput(f"--config: {config}: no such file")
    ckpt = weights_for(Path(config)) if ckpt is None else Path(ckpt)
    with blame("--ckpt", (OSError,)):
        found = ckpt.exists()
    if not found:
        raise BadInput(f"--ckpt: {ckpt}: no such file, nor a diffusers folder{how_to_get(ckpt)}")
    return config_for(ckpt) if config is None else Path(config), ckpt


def how_to_get(ckpt: Path) -> str:
    """The end of an error message about weights that are not here: what fetches them, if they are published."""
    names = [model.name for model in _published() if model.file().resolve() == ckpt.resolve()]
    return f"; python scripts/download_models.py {names[0]} fetches it" if names else ""


def weights_for(config: Path) -> Path:
    """Where the one published checkpoint lies, or is to lie, that belongs to a config."""
    if config.resolve() == EMOJI64[0].resolve():
        return EMOJI64[1]
    models = [model for model in _published() if (PROJECT_ROOT / model.config).resolve() == config.resolve()]
    if len(models) != 1:
        names = ", ".join(model.name for model in models)
        raise BadInput(
            f"--ckpt: needed together with --config {config}, since "
            + (f"several published models have it: {names}" if models else "no published model has it")
        )
    return models[0].file()


def config_for(ckpt: Path) -> Path:
    """config.yaml beside the weights, or the one published config that states what they are."""
    from ldm.checkpoint import CheckpointError, read_checkpoint
    from ldm.checkpoint.diagnosis import facts_of_weights, summary

    beside = (ckpt if ckpt.is_dir() else ckpt.parent) / "config.yaml"
    if beside.is_file():
        return beside
    with blame("--ckpt", (CheckpointError, ValueError, OSError)):
        facts = facts_of_weights(read_checkpoint(ckpt))
    found = fitting_configs(facts)
    if len(found) == 1:
        return PROJECT_ROOT / found[0]
    raise BadInput(
        f"--config: needed together with --ckpt {ckpt}, which fits "
        + (" and ".join(found) if found else f"no published config; it is: {summary(facts)}")
    )


def fitting_configs(weights: Facts) -> Sequence[str]:
    """Published configs that state what a checkpoint is, as paths in the project."""
    from ldm.checkpoint import load_config
    from ldm.checkpoint.diagnosis import facts_of_config, fitting

    paths = dict.fromkeys(model.config for model in _published())
    return fitting(weights, [(path, facts_of_config(load_config(PROJECT_ROOT / path).model)) for path in paths])


def _published() -> Sequence[Published]:
    with blame("models/published.yaml"):
        return [*load_manifest().values()]
