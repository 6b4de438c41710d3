"""Build a model from its config and fill it from a checkpoint, without allocating weights that the file replaces."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.file import read_checkpoint
from ldm.checkpoint.fill import choose_weights, fill
from ldm.io.files import FileError, read_config
from ldm.io.schema import Number, Schema, parse
from ldm.util import ConfigError, check_config, instantiate_from_config

log = logging.getLogger(__name__)


MOST_TENSORS = 10_000  # of a model; the largest of this family has some 3,000
MOST_TIMESTEPS = 100_000


class _Open(Schema, extra="allow"):
    """Other names are allowed; the model's constructor checks them."""


class _Sampling(_Open):
    scale: Number | None = None


class _Params(_Open):
    timesteps: Annotated[int, Field(ge=1, le=MOST_TIMESTEPS)] = 1000


class _Model(_Open):
    target: Any
    params: _Params | None = None


class _Config(_Open):
    model: _Model
    sampling: _Sampling = _Sampling()


class Bounded(TorchFunctionMode):
    """Raises ConfigError when a config builds more than MOST_TENSORS tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.tensors += func is torch.empty
        if self.tensors > MOST_TENSORS:
            raise ConfigError(
                f"the config describes a model of more than {MOST_TENSORS} tensors; see its numbers of "
                f"blocks and layers"
            )
        return func(*args, **(kwargs or {}))


class _Unmade(TorchFunctionMode):
    """Layers are built without memory or random values, which the checkpoint replaces.

    Only tensors to be filled (`torch.empty`) go to the meta device. Buffers that a constructor computes, such as the
    noise schedule, are real, since a file may lack them. Moving layers to a device inside a constructor has no effect;
    the caller chooses the device.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func is Tensor.to and args[0].is_meta:
            args = tuple("meta" if isinstance(arg, (str, torch.device)) else arg for arg in args)
        return func(*args, **kwargs)


def load_config(path: str | Path) -> Any:
    """The YAML config of a model as an OmegaConf mapping: `model` (target and params) and other sections.

    Interpolations (${...}) are refused, because they could read the environment. Published configs have none.

    Raises:
        OSError: no such file, or not a regular one.
        ConfigError: not YAML, without `model.target`, or with a value of the wrong type.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; expected a model's .yaml config")
    try:
        config = read_config(path)
    except FileError as error:
        raise ConfigError(str(error)) from error
    plain = OmegaConf.to_container(config, resolve=False)
    try:
        _check_values(plain)
        parse(_Config, plain)
        check_config(plain["model"])
    except ValueError as error:
        raise ConfigError(f"{path}: not a model's config: {error}") from error
    return config


def diffusion_params(path: str | Path) -> dict[str, Any]:
    """The `model.params` of a diffusion model's config, as plain values.

    Raises:
        OSError, ConfigError: see `load_config`; or the model has no UNet.
    """
    params = OmegaConf.to_container(load_config(path).model, resolve=True).get("params") or {}
    if "unet_config" not in params:
        raise ConfigError(f"{path}: not the config of a diffusion model: no unet_config")
    return params


def _check_values(value: Any, place: str = "") -> None:
    """Raise ConfigError for interpolations and missing values (???)."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, str) and ("${" in value or value == "???"):
        what = "no value (???)" if value == "???" else f"an interpolation, {value!r}"
        raise ConfigError(f"{place}: {what}; write the value itself")


def unmade_model(config_path: str | Path) -> nn.Module:
    """The model of a config without weights, which are on the meta device; computed buffers (noise schedule) are real.

    It has no moving average, which only training needs.

    Raises:
        FileNotFoundError, ConfigError: see `load_config` and `instantiate_from_config`.
    """
    config = OmegaConf.to_container(load_config(config_path).model, resolve=True)
    if config.get("params", {}).get("unet_config") is not None:
        config["params"]["use_ema"] = False
    with Bounded(), _Unmade():
        return instantiate_from_config(config)


def load_model(
    config_path: str | Path, ckpt_path: str | Path, device: str | torch.device = "cpu", weights: str = "auto"
) -> nn.Module:
    """The model of a config (a `LatentDiffusion`), filled from a checkpoint, ready to sample from.

    It is in evaluation mode, without gradients and without a moving average. Its weights may be mapped from the file
    (docs/loading.md), so replace such a file, as `save_weights` does, rather than write into it. Its attribute
    `weights_file` is ckpt_path; plans find its calibrations by it.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `unmade_model` and `load_weights`.
    """
    load_config(config_path)  # checked before the checkpoint, which takes longer
    state, used = choose_weights(ckpt_path, read_checkpoint(ckpt_path), weights)
    model = unmade_model(config_path)
    log.info("%s", fill(model, state, Path(ckpt_path), used, assign=True))
    model.weights_file = Path(ckpt_path)
    return model.eval().requires_grad_(False).to(device)
