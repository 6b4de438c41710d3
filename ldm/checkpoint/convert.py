"""Files of weights from one layout to the other: a CompVis checkpoint, or a folder of the diffusers library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import conversion_xl
from ldm.checkpoint.conversion import (
    ConversionError,
    diffusers_configs,
    first_stage_to_ldm,
    is_openclip,
    to_diffusers,
    transformer_to_ldm,
)
from ldm.checkpoint.diagnosis import differences, facts_of_config, facts_of_weights
from ldm.checkpoint.file import PART_FILES, read_checkpoint, save_weights
from ldm.checkpoint.model import diffusion_params, load_config, load_state
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import clean, unfinished


def folder_to_checkpoint(source: str | Path, out: str | Path) -> int:
    """Write the weights of a diffusers folder as one file; how many tensors it has.

    Raises:
        SettingError: `source` is no such folder, or `out` can't be written.
    """
    with fault_of("source"):
        if not Path(source).is_dir():
            kind = "a file" if Path(source).exists() else "no such folder"
            raise ValueError(f"{source}: {kind}; --to ldm converts a diffusers folder, or with --vae a published DiT")
        state = read_checkpoint(source)
    with fault_of("out"):
        save_weights(out, state)
    return len(state)


def joined_transformer(source: str | Path, vae: str | Path, out: str | Path) -> int:
    """Write a published DiT together with its first stage as one file; how many tensors it has.

    Args:
        source: the transformer as published.
        vae: the first stage, a file.

    Raises:
        SettingError: one of them is something else, or `out` can't be written.
    """
    with fault_of("source"):
        state = transformer_to_ldm(read_checkpoint(source))
    with fault_of("vae"):
        state |= first_stage_to_ldm(read_checkpoint(vae))
    with fault_of("out"):
        save_weights(out, state)
    return len(state)


def checkpoint_to_folder(
    source: str | Path, config: str | Path, out: str | Path, weights: str = "auto"
) -> dict[str, int]:
    """Write a model as a diffusers folder; how many tensors each part has.

    Args:
        source: its weights.
        config: its YAML.
        out: the folder, which is made.
        weights: averaged or last weights of the UNet, see `load_state`.

    Raises:
        SettingError: a file can't be read or written, or the model is none that diffusers has.
    """
    with fault_of("out"):
        if Path(out).exists():
            raise SettingError("out", f"{out} exists; expected a folder to make")
    with fault_of("config"):
        params, stated = diffusion_params(config), facts_of_config(load_config(config).model)
    with fault_of("source"):
        state = load_state(source, weights)
        try:
            parts = conversion_xl.to_diffusers(state) if conversion_xl.is_xl(state) else to_diffusers(state)
        except ConversionError as error:
            raise ConversionError(f"{error}; folders are written for Stable Diffusion 1, 2 and XL") from error
    with fault_of("config", (ValueError, TypeError)):
        if faults := differences(stated, facts_of_weights(state)):
            raise ConversionError(f"{config} is not the config of these weights: {faults[0]}")
        configs = configs_of(params, parts, state, config)
    with fault_of("out"):
        write_folder(Path(out), parts, configs)
    return {part: len(tensors) for part, tensors in parts.items()}


def configs_of(
    params: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    config: str | Path,
) -> dict[str, dict[str, Any]]:
    """The content of a folder's JSON files, see `diffusers_configs`; `config`: where params are from.

    Raises:
        ConversionError: params are those of another model.
    """
    try:
        if conversion_xl.is_xl(state):
            return conversion_xl.configs(params, parts)
        return diffusers_configs(params, parts, is_openclip(state))
    except KeyError as error:
        raise ConversionError(f"{config} is not the config of these weights: it has no {error}") from error


def write_folder(
    folder: Path, parts: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write weights and configs by the names of the parts; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean(folder.parent)
    with unfinished(folder.parent) as place:
        temporary = place / folder.name
        for name, config in configs.items():
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (temporary / name).mkdir(parents=True)
            (temporary / name / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for part, weights in parts.items():
            save_weights(temporary / part / PART_FILES[part][0], weights)
        temporary.rename(folder)
