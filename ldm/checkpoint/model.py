"""A model from its config and its checkpoint, without memory for weights that the file brings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from yaml import YAMLError

from ldm.checkpoint.file import read_checkpoint
from ldm.checkpoint.fill import choose_weights, fill
from ldm.checkpoint.messages import one_line
from ldm.util import ConfigError, instantiate_from_config

log = logging.getLogger(__name__)


class _Unmade(TorchFunctionMode):
    """Layers get no memory and no random values: the checkpoint brings both.

    Only what is made to be filled (`torch.empty`) goes to the meta device; buffers that a constructor computes,
    such as the noise schedule, are made for real, since a file need not have them. A constructor that moves its
    layers to a device moves nothing: that is for the caller to say.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        if func is Tensor.to and args[0].is_meta:
            args = tuple("meta" if isinstance(arg, (str, torch.device)) else arg for arg in args)
        return func(*args, **kwargs)


def load_config(path: str | Path) -> Any:
    """A model's YAML config as an OmegaConf mapping: `model` (target and params) and what stands beside it.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not YAML, or without `model.target`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a model's .yaml config")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a YAML config: {one_line(error)}") from error
    if not OmegaConf.is_dict(config) or OmegaConf.select(config, "model.target") is None:
        raise ConfigError(f"{path}: not a model's config: it has no model.target")
    return config


def unmade_model(config_path: str | Path) -> nn.Module:
    """The model of a config without weights: they are on the meta device, buffers of its own (noise schedule) real.

    It has no moving average: that is for training only.

    Raises:
        FileNotFoundError, ConfigError: see `load_config` and `instantiate_from_config`.
    """
    config = OmegaConf.to_container(load_config(config_path).model, resolve=True)
    if config.get("params", {}).get("unet_config") is not None:
        config["params"]["use_ema"] = False
    with _Unmade():
        return instantiate_from_config(config)


def load_model(config_path: str | Path, ckpt_path: str | Path, device: str | torch.device = "cpu",
               weights: str = "auto") -> nn.Module:
    """The model of a config (a `LatentDiffusion`), filled from a checkpoint, ready to sample from.

    It is in evaluation mode, without gradients and without a moving average of its own. Its weights may be the
    file's own, mapped into memory (docs/loading.md): replace such a file, as `save_weights` does, rather than write
    into it. Its `weights_file` is ckpt_path, by which plans find its calibrations.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `unmade_model` and `load_weights`.
    """
    load_config(config_path)        # what is quick to check comes first
    state, used = choose_weights(ckpt_path, read_checkpoint(ckpt_path), weights)
    model = unmade_model(config_path)
    log.info("%s", fill(model, state, Path(ckpt_path), used, assign=True))
    model.weights_file = Path(ckpt_path)
    return model.eval().requires_grad_(False).to(device)
