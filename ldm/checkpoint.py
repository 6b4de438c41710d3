"""Safe loading and saving of weights; every key that finds no place is named.

Published checkpoints carry their training's leftovers (schedule buffers, averages, losses); what is known to
be harmless is reported in one line, and anything else that does not match is an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from yaml import YAMLError

from ldm.conversion import PARTS, TEXT_ACTIVATIONS, ConversionError, to_ldm
from ldm.modules.ema import ema_name
from ldm.util import ConfigError, atomic_write, file_sha256, instantiate_from_config

log = logging.getLogger(__name__)

WEIGHTS = ("auto", "ema", "raw")
EMA_BOOKKEEPING = ("model_ema.decay", "model_ema.num_updates")
SCHEDULE = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights")
OPTIONAL = re.compile(
    SCHEDULE.pattern +
    r"|logvar"
    r"|model_ema\..+"
    r"|(.+\.)?(position_ids|logit_scale|text_projection)"
    r"|(first_stage_model\.)?loss\..+")


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be."""


class _Callback:
    """Stands for the training callback that published checkpoints name as a mere dictionary key."""


ALIGNMENT = 64      # bytes, of the memory that PyTorch allocates
GROUP = 2 ** 28     # bytes of a safetensors file that are mapped, and let go of, together
PART_FILES = {part: [f"{stem}{variant}{suffix}" for suffix, stem in stems.items() for variant in ("", ".fp16")]
              for part, stems in {
                  **dict.fromkeys(("unet", "vae"), dict.fromkeys((".safetensors", ".bin"), "diffusion_pytorch_model")),
                  "text_encoder": {".safetensors": "model", ".bin": "pytorch_model"}}.items()}
INERT = [(_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


@dataclass(frozen=True)
class Report:
    """What loading did beside the plain match of keys.

    path:    the file.
    weights: "ema" or "raw", which of the network's weights were taken.
    ignored: known-optional keys of the file that the module has no place for.
    absent:  known-optional keys of the module that the file does not have.
    """

    path: Path
    weights: str
    ignored: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (f"{self.path}: {self.weights} weights; {len(self.ignored)} optional keys ignored"
                f"{_some(self.ignored)}; {len(self.absent)} optional keys absent{_some(self.absent)}")


def _some(names: Iterable[str], limit: int = 8) -> str:
    """' (a, b, ... and 3 more)', or nothing for no names."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})" if names else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Reading a file

def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, or of a .ckpt / .pt / .pth one (bare or under 'state_dict').

    A folder of the diffusers library (Stable Diffusion 1 or 2) is read as the CompVis checkpoint that it stands for,
    see `ldm.conversion`.

    The format is told from the content, not from the name. Tensors are mapped from the file where the
    format allows it. Nothing in the file can run code.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is empty, truncated, not a checkpoint, or asks to run code; the folder lacks a part.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .safetensors or .ckpt checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty; expected a checkpoint")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: this is a web page, not a checkpoint; the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: this is a Git LFS pointer, not a checkpoint; run 'git lfs pull'")
    if head[8:9] == b"{":
        return _read_safetensors(path, size, int.from_bytes(head[:8], "little"))
    if head[:1] == b"\x80" or head[:2] == b"PK":
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: a PyTorch checkpoint under the wrong name; rename it to .ckpt")
        return _tensors(path, _read_pickle(path, mmap=head[:2] == b"PK"))
    raise CheckpointError(f"{path}: neither a safetensors file nor a PyTorch checkpoint")


def _read_folder(path: Path) -> dict[str, Tensor]:
    files = part_files(path)
    settings = path / "text_encoder" / "config.json"
    try:
        activation = json.loads(settings.read_text(encoding="utf-8"))["hidden_act"]
        openclip = {kind: which for which, kind in TEXT_ACTIVATIONS.items()}[activation]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{settings}: expected JSON with hidden_act {' or '.join(TEXT_ACTIVATIONS.values())}, "
                              f"which tells CLIP from OpenCLIP; got {type(error).__name__} {error}") from error
    try:
        return to_ldm({part: read_checkpoint(file) for part, file in files.items()}, openclip)
    except ConversionError as error:
        raise CheckpointError(f"{path}: {error}") from error


def part_files(path: Path) -> dict[str, Path]:
    """The weights of each part of a diffusers folder.

    Raises:
        CheckpointError: a part is not there.
    """
    files = {}
    for part, names in PART_FILES.items():
        found = [file for file in (path / part / name for name in names) if file.is_file()]
        if not found:
            raise CheckpointError(f"{path}: a folder without {part}/{names[0]} (or {', '.join(names[1:])}); a "
                                  f"diffusers folder needs {'/, '.join(PARTS)}/, anything else is a file")
        files[part] = found[0]
    return files


def _read_safetensors(path: Path, size: int, header: int) -> dict[str, Tensor]:
    if 8 + header > size:
        raise CheckpointError(f"{path}: truncated safetensors file: {size} bytes, header of {8 + header}")
    try:
        return _map_safetensors(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or damaged safetensors file: {_one_line(error)}") from error


def _map_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, in its order; none is read before it is used.

    Each group of them has a mapping of its own. What was read of a mapping stays in memory as long as one of its
    tensors lives, so with a single one a model copied from the file would need the whole file beside it.
    """
    state, file = {}, safe_open(path, framework="pt")
    room = GROUP
    for key in file.offset_keys():
        if room <= 0:
            file, room = safe_open(path, framework="pt"), GROUP
        state[key] = file.get_tensor(key)
        room -= state[key].nbytes
    return state


def _read_pickle(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a hostile or cut-off pickle can make the reader fail in any way
        wanted = _unsafe_globals(path, mmap, str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: refused, because the pickle asks to run {', '.join(wanted)}; ask its author for a "
                f".safetensors file, or convert it in a sandbox: torch.load(weights_only=False), then "
                f"ldm.checkpoint.save_weights of its state_dict") from error
        raise CheckpointError(f"{path}: truncated, damaged or not a PyTorch checkpoint: "
                              f"{type(error).__name__}") from error


def _unsafe_globals(path: Path, zipped: bool, refusal: str) -> list[str]:
    """The names outside PyTorch's own that a refused pickle asked for; the older format tells the first."""
    named = re.findall(r"\bGLOBAL (\S+)", refusal)
    if zipped and named:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    return named[:1]


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path}: expected a dictionary of tensors or one under 'state_dict'; "
                              f"got {type(state).__name__}{' without entries' if state == {} else ''}")
    strangers = [str(key) for key, value in state.items()
                 if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strangers:
        raise CheckpointError(f"{path}: expected a dictionary of tensors or one under 'state_dict'; "
                              f"not tensors:{_some(strangers)}")
    return dict(state)


# Choosing the weights

def average_of(key: str) -> str:
    """'model.diffusion_model.out.0.bias' -> 'model_ema.diffusion_modelout0bias', as published."""
    return "model_ema." + ema_name(key.removeprefix("model."))


def load_state(path: str | Path, weights: str = "auto") -> dict[str, Tensor]:
    """The state dict of a file, without averages: with `ema` they take the place of the network's weights.

    Args:
        path: see `read_checkpoint`.
        weights: "raw" (the network as trained), "ema" (its moving average), "auto" (ema if there is one).

    Raises:
        CheckpointError: see `read_checkpoint`; or there is no average, or an average of nothing.
    """
    return _choose(path, read_checkpoint(path), weights)[0]


def _choose(path: str | Path, state: dict[str, Tensor], weights: str) -> tuple[dict[str, Tensor], str]:
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
    averages = {k: v for k, v in state.items() if k.startswith("model_ema.") and k not in EMA_BOOKKEEPING}
    chosen = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    if weights == "ema" and not averages:
        raise CheckpointError(f"{path}: weights 'ema' asked for, but the file has no model_ema.* keys; "
                              f"use 'raw' or 'auto'")
    if weights == "raw" or not averages:
        return chosen, "raw"
    # Only trained parameters have an average: what is frozen keeps its one value.
    for key in [k for k in chosen if k.startswith("model.")]:
        chosen[key] = averages.pop(average_of(key), chosen[key])
    if averages:
        raise CheckpointError(f"{path}: averages of no model.* weight{_some(averages)}; use weights 'raw'")
    return chosen, "ema"


# Filling a module

def load_weights(module: nn.Module, path: str | Path, weights: str = "auto") -> Report:
    """Fill `module` from a checkpoint file; values are cast to the module's dtypes.

    A moving average kept by the module restarts from the loaded weights.

    Returns:
        a report of the optional keys, which also goes to the log.

    Raises:
        CheckpointError: see `load_state`; or keys or shapes do not match. The module is unchanged then.
    """
    state, used = _choose(path, read_checkpoint(path), weights)
    report = _fill(module, state, Path(path), used)
    log.info("%s", report)
    return report


def _fill(module: nn.Module, state: dict[str, Tensor], path: Path, used: str, assign: bool = False) -> Report:
    """Fill `module` and use up `state`; with `assign` its tensors become the module's, which may be on meta."""
    expected = module.state_dict(keep_vars=True)
    averages = {average_of(key): key for key in state if key.startswith("model.")}
    state |= {average: state[key] for average, key in averages.items() if average in expected}
    rounded = {key for key, value in state.items() if key in expected and _rounded(key, value, expected[key])}
    for key in rounded:
        del state[key]
    missing = {key for key in expected if key not in state and not _shared(key, expected)}
    unexpected = {key for key in state if key not in expected and not _copied(key, state)}
    copies = {key for key in state if key not in expected} - unexpected
    absent, ignored = ({key for key in keys if OPTIONAL.fullmatch(key)} for keys in (missing, unexpected | rounded))
    shapes = {f"{key} {tuple(value.shape)}, config {tuple(expected[key].shape)}"
              for key, value in state.items() if key in expected and value.shape != expected[key].shape}
    faults = {"missing": missing - absent, "unexpected": unexpected - ignored, "of another shape": shapes}
    if any(faults.values()):
        problems = [f"{len(names)} {what}{_some(names)}" for what, names in faults.items() if names]
        raise CheckpointError(f"{path}: keys do not match the config (is it the config of another model?): "
                              f"{'; '.join(problems)}")
    for key in list(state):     # one after the other, so that the file is let go of on the way
        value = state.pop(key)
        if key in expected:
            state[key] = _aligned(value.to(expected[key].dtype))
    if assign:                  # what the file leaves out and the model never reads still needs a place
        state |= {key: torch.zeros_like(expected[key], device="cpu") for key in absent if expected[key].is_meta}
    module.load_state_dict(state, strict=False, assign=assign)
    return Report(path, used, tuple(sorted(ignored | copies)), tuple(sorted(absent - rounded)))


def _rounded(key: str, value: Tensor, own: Tensor) -> bool:
    """A noise schedule that was stored in half precision, as in checkpoints converted as a whole.

    The config gives it exactly. Rounded, the first steps of a fine schedule have no noise at all.
    """
    return bool(SCHEDULE.fullmatch(key)) and value.itemsize < own.itemsize


def _aligned(value: Tensor) -> Tensor:
    """The tensor as PyTorch would allocate it: elsewhere the last digits of what is computed from it may differ.

    So what a model computes depends on its weights, not on where they lie in a file.
    """
    return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()


def _twin(key: str) -> str:
    return key.replace("cond_stage_model.", "first_stage_model.", 1)


def _shared(key: str, expected: Mapping[str, Tensor]) -> bool:
    """A module whose conditioner is its first stage lists the same tensors twice."""
    return (key.startswith("cond_stage_model.") and _twin(key) in expected
            and expected[key] is expected[_twin(key)])


def _copied(key: str, state: Mapping[str, Tensor]) -> bool:
    """A file of such a model may hold the first stage's weights twice."""
    return (key.startswith("cond_stage_model.") and _twin(key) in state
            and torch.equal(state[key], state[_twin(key)]))


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
        raise ConfigError(f"{path}: not a YAML config: {_one_line(error)}") from error
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
    into it.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `unmade_model` and `load_weights`.
    """
    load_config(config_path)        # what is quick to check comes first
    state, used = _choose(ckpt_path, read_checkpoint(ckpt_path), weights)
    model = unmade_model(config_path)
    log.info("%s", _fill(model, state, Path(ckpt_path), used, assign=True))
    return model.eval().requires_grad_(False).to(device)


# Writing and naming

def save_weights(path: str | Path, state: Mapping[str, Tensor],
                 metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as .safetensors; the file appears whole or not at all.

    Args:
        state: tensors by name, on any device; those that share memory are written once each.
        metadata: strings by name for the file's header.
    """
    own = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(own, temporary, metadata={"format": "pt", **(metadata or {})})


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's content (of a diffusers folder's weights), hexadecimal: names what made a picture."""
    path = Path(path)
    return file_sha256(*(part_files(path).values() if path.is_dir() else [path]))
