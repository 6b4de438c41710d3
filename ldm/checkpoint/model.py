"""Build a model from its config and fill it from a checkpoint, without allocating weights that the file replaces."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.conversion import TRANSFORMER
from ldm.checkpoint.file import CheckpointError, read_checkpoint
from ldm.checkpoint.sgm import ENGINE, in_our_form
from ldm.io.errors import some
from ldm.io.files import FileError, Number, Schema, parse, read_config
from ldm.modules.diffusionmodules.util import Unfilled
from ldm.modules.ema import ema_name
from ldm.util import ConfigError, check_config, instantiate_from_config

log = logging.getLogger(__name__)
Module = TypeVar("Module", bound=nn.Module)


MOST_TENSORS = 10_000  # of a model; the largest of this family has some 3,000
MOST_TIMESTEPS = 100_000


class _Open(Schema, extra="allow"):
    """Other names are allowed; the model's constructor checks them."""


class _Sampling(_Open):
    scale: Number | None = None
    uncond_class: Annotated[int, Field(ge=0)] | None = None


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


class _Unmade(Unfilled):
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
        return super().__torch_function__(func, types, args, kwargs)


def load_config(path: str | Path) -> Any:
    """The YAML config of a model as an OmegaConf mapping: `model` (target and params) and other sections.

    The publisher's form of an SDXL config comes in ours, see `ldm.checkpoint.sgm`.

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
        if plain["model"]["target"] == ENGINE:
            plain["model"] = in_our_form(plain["model"])
        check_config(plain["model"])
    except ValueError as error:
        raise ConfigError(f"{path}: not a model's config: {error}") from error
    return OmegaConf.create(plain)


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


def unmade_model(config: DictConfig) -> nn.Module:
    """The model of a config, see `load_config`, without weights, which are on the meta device; computed buffers (noise
    schedule) are real.

    It has no moving average, which only training needs.

    Raises:
        ConfigError: see `instantiate_from_config`.
    """
    model = OmegaConf.to_container(config.model, resolve=True)
    if model.get("params", {}).get("unet_config") is not None:
        model["params"]["use_ema"] = False
    return unmade(lambda: instantiate_from_config(model))


def unmade(build: Callable[[], Module]) -> Module:
    """What build() makes, without weights, which are on the meta device."""
    with Bounded(), _Unmade():
        return build()


def check_whole(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for the weights of a published DiT, which are not those of a whole model."""
    if TRANSFORMER in state:
        raise CheckpointError(
            f"{path}: a DiT as published, without its first stage; scripts/convert.py --to ldm --vae FILE adds it"
        )


def load_model(
    config: str | Path | DictConfig,
    ckpt_path: str | Path,
    device: str | torch.device = "cpu",
    weights: str = "auto",
    free: int | None = None,
) -> nn.Module:
    """The model of a config (a `LatentDiffusion`), filled from a checkpoint, ready to sample from.

    It is in evaluation mode, without gradients and without a moving average. Its weights may be mapped from the file
    (docs/loading.md), so replace such a file, as `save_weights` does, rather than write into it. Its attribute
    `weights_file` is ckpt_path; plans find its calibrations by it.

    Args:
        config: its path, or what `load_config` returned.
        free: bytes of the device's memory that the weights may take; None = any.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `load_config`, `unmade_model` and `load_weights`.
    """
    if not isinstance(config, DictConfig):
        config = load_config(config)  # before the checkpoint, which takes longer
    state, used = choose_weights(ckpt_path, read_checkpoint(ckpt_path), weights)
    check_whole(ckpt_path, state)
    model = unmade_model(config)
    need = new_bytes(model, state, torch.device(device))
    check_free(ckpt_path, need, free)
    log.info("%s", fill(model, state, Path(ckpt_path), used, assign=True))
    model.weights_file = Path(ckpt_path)
    return model.eval().requires_grad_(False).to(device)


def check_free(path: str | Path, need: int, free: int | None) -> None:
    """Raise CheckpointError if the weights of a file need more bytes than are free; None = any."""
    if free is not None and need > free:
        raise CheckpointError(f"{path}: its weights take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def new_bytes(model: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> int:
    """What the weights of a model take beside the file, which on a CPU is mapped."""
    return sum(
        value.nbytes
        for name, value in model.state_dict().items()
        if name in state and is_copied(state[name], value.dtype, device)
    )


def is_copied(value: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model can't compute on a tensor of a file where it is, see `_aligned`."""
    return device.type != "cpu" or value.dtype != dtype or value.data_ptr() % ALIGNMENT != 0


# Fill a module with the weights of a file, and report every key that does not match.


WEIGHTS = ("auto", "ema", "raw")
EMA_BOOKKEEPING = ("model_ema.decay", "model_ema.num_updates")
SCHEDULE = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights"
)
OPTIONAL = re.compile(
    SCHEDULE.pattern + r"|logvar"
    r"|model_ema\..+"
    r"|(.+\.)?(position_ids|logit_scale)|(?!conditioner\.)(.+\.)?text_projection"  # SDXL uses the projection
    r"|denoiser\.sigmas"
    r"|(first_stage_model\.)?loss\..+"
)
BESIDE = re.compile(r"control_model\..+")  # a control network has a loader of its own, see `ldm.checkpoint.control`
ALIGNMENT = 64  # bytes, of the memory that PyTorch allocates


@dataclass(frozen=True)
class Report:
    """The result of loading.

    path:    the file.
    weights: "ema" or "raw", the weights of the network that were loaded.
    ignored: optional keys of the file that the module does not have.
    absent:  optional keys of the module that the file does not have.
    """

    path: Path
    weights: str
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.weights} weights; {len(self.ignored)} optional keys ignored"
            f"{some(self.ignored)}; {len(self.absent)} optional keys absent{some(self.absent)}"
        )


# Choosing the weights


def average_of(key: str) -> str:
    """'model.diffusion_model.out.0.bias' -> 'model_ema.diffusion_modelout0bias', as published."""
    return "model_ema." + ema_name(key.removeprefix("model."))


def load_state(path: str | Path, weights: str = "auto") -> dict[str, Tensor]:
    """The state dict of a file without its averages; with `ema` they replace the network's weights.

    Args:
        path: see `read_checkpoint`.
        weights: "raw" (the network as trained), "ema" (its moving average), "auto" (ema if there is one).

    Raises:
        CheckpointError: see `read_checkpoint`; or there is no average, or one without its weight.
    """
    return choose_weights(path, read_checkpoint(path), weights)[0]


def choose_weights(path: str | Path, state: dict[str, Tensor], weights: str) -> tuple[dict[str, Tensor], str]:
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
    averages = {k: v for k, v in state.items() if k.startswith("model_ema.") and k not in EMA_BOOKKEEPING}
    chosen = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    if weights == "ema" and not averages:
        raise CheckpointError(
            f"{path}: weights 'ema' asked for, but the file has no model_ema.* keys; use 'raw' or 'auto'"
        )
    if averages and not any(key.startswith("model.") for key in chosen):
        return _averages_alone(path, chosen | averages, weights)
    if weights == "raw" or not averages:
        return chosen, "raw"
    # Only trained parameters have an average.
    for key in [k for k in chosen if k.startswith("model.")]:
        chosen[key] = averages.pop(average_of(key), chosen[key])
    refuse_averages(averages, path)
    return chosen, "ema"


def refuse_averages(left: Collection[str], path: str | Path) -> None:
    """Raise CheckpointError for averages without their weight."""
    if left:
        raise CheckpointError(f"{path}: averages without their model.* weight{some(left)}; use weights 'raw'")


def _averages_alone(path: str | Path, state: dict[str, Tensor], weights: str) -> tuple[dict[str, Tensor], str]:
    """A file that holds only averages, as trainers write for sampling. `fill` gives them the names of weights."""
    if weights == "raw":
        raise CheckpointError(
            f"{path}: weights 'raw' asked for, but the file has only averages (model_ema.*) of the "
            f"network, no model.* weights; use 'ema' or 'auto'"
        )
    return state, "ema"


# Filling a module


def load_weights(module: nn.Module, path: str | Path, weights: str = "auto") -> Report:
    """Fill `module` from a checkpoint file; values are cast to the module's dtypes.

    A moving average kept by the module restarts from the loaded weights.

    Returns:
        a report of the optional keys, which also goes to the log.

    Raises:
        CheckpointError: see `load_state`; or keys or shapes do not match. The module is unchanged then.
    """
    state, used = choose_weights(path, read_checkpoint(path), weights)
    report = fill(module, state, Path(path), used)
    log.info("%s", report)
    return report


def load_part(model: nn.Module, part: str, path: str | Path) -> Report:
    """Fill one part of a model from a file of this part, or of a whole model that has it.

    Args:
        part: its name in the model, such as cond_stage_model or model (the network).

    Raises:
        ValueError: the model has no such part.
        CheckpointError: see `load_weights`.
    """
    parts = dict(model.named_children())
    if part not in parts:
        raise ValueError(f"the model has no part {part!r}; it has {', '.join(parts)}")
    state, used = choose_weights(path, read_checkpoint(path), "auto")
    own = {key.removeprefix(f"{part}."): state[key] for key in state if key.startswith(f"{part}.")}
    report = fill(parts[part], own or state, Path(path), used)
    log.info("%s: %s", part, report)
    return report


def fill(module: nn.Module, state: dict[str, Tensor], path: Path, used: str, assign: bool = False) -> Report:
    """Fill `module` and empty `state`; with `assign` its tensors replace the module's, which may be on meta."""
    expected = module.state_dict(keep_vars=True)
    state |= {key: state.pop(average_of(key)) for key in expected if key not in state and average_of(key) in state}
    refuse_averages([key for key in state if key.startswith("model_ema.") and key not in EMA_BOOKKEEPING], path)
    averages = {average_of(key): key for key in state if key.startswith("model.")}
    state |= {average: state[key] for average, key in averages.items() if average in expected}
    ignored, absent = _unmatched(expected, state, path)
    for key in [key for key in state if key in expected and _rounded(key, state[key], expected[key])]:
        del state[key]
        ignored.add(key)
    for key in list(state):  # one by one, so that the mapping of the file is released on the way
        value = state.pop(key)
        if key in expected:
            state[key] = _aligned(value.to(expected[key].dtype))
    if assign:  # keys that the file lacks and the model never reads
        state |= {key: torch.zeros_like(expected[key], device="cpu") for key in absent if expected[key].is_meta}
    module.load_state_dict(state, strict=False, assign=assign)
    return Report(path, used, tuple(sorted(ignored)), tuple(sorted(absent)))


def _rounded(key: str, value: Tensor, own: Tensor) -> bool:
    """Whether this is a noise schedule in half precision, as in checkpoints that were converted as a whole.

    The config states it exactly. Rounded, the first timesteps of a fine schedule have no noise.
    """
    return bool(SCHEDULE.fullmatch(key)) and value.itemsize < own.itemsize


def _unmatched(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> tuple[set[str], set[str]]:
    """The optional keys that only the file has, and those that only the module has.

    Raises:
        CheckpointError: other keys do not match, or tensors differ in shape, or are not floating-point numbers.
    """
    missing = {key for key in expected if key not in state and not _shared(key, expected)}
    unexpected = {key for key in state if key not in expected and not _copied(key, state)}
    copies = {key for key in state if key not in expected} - unexpected
    absent, ignored = ({key for key in keys if OPTIONAL.fullmatch(key)} for keys in (missing, unexpected))
    ignored |= {key for key in unexpected if BESIDE.fullmatch(key)}
    shapes = {
        f"{key} {tuple(value.shape)}, config {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    }
    dtypes = {
        f"{key} {value.dtype}, config {expected[key].dtype}"
        for key, value in state.items()
        if key in expected and expected[key].is_floating_point() and not value.is_floating_point()
    }
    faults = {
        "missing": missing - absent,
        "unexpected": unexpected - ignored,
        "of another shape": shapes,
        "that are not floating-point numbers": dtypes,
    }
    if any(faults.values()):
        problems = [f"{len(names)} {what}{some(names)}" for what, names in faults.items() if names]
        raise CheckpointError(
            f"{path}: keys do not match the config (is it the config of another model?): {'; '.join(problems)}"
        )
    return ignored | copies, absent


def _aligned(value: Tensor) -> Tensor:
    """The tensor with the memory alignment of PyTorch's own; with another, the last digits of results may differ.

    So results depend on the weights, not on their position in a file.
    """
    return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()


def _twin(key: str) -> str:
    return key.replace("cond_stage_model.", "first_stage_model.", 1)


def _shared(key: str, expected: Mapping[str, Tensor]) -> bool:
    """Whether this key of the conditioner is also one of the first stage: the two may be one module."""
    return key.startswith("cond_stage_model.") and _twin(key) in expected and expected[key] is expected[_twin(key)]


def _copied(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether the file holds this weight of the first stage a second time, under the conditioner's name."""
    return key.startswith("cond_stage_model.") and _twin(key) in state and torch.equal(state[key], state[_twin(key)])
