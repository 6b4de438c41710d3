"""Fill a module with the weights of a file, and report every key that does not match.

Published checkpoints hold keys of their training (schedule buffers, averages, losses). Keys known to be harmless are
reported in one line; any other mismatch is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.file import read_checkpoint
from ldm.checkpoint.weight_file import CheckpointError
from ldm.io.errors import some
from ldm.modules.ema import ema_name

log = logging.getLogger(__name__)

WEIGHTS = ("auto", "ema", "raw")
EMA_BOOKKEEPING = ("model_ema.decay", "model_ema.num_updates")
SCHEDULE = re.compile(
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights"
)
OPTIONAL = re.compile(
    SCHEDULE.pattern + r"|logvar"
    r"|model_ema\..+"
    r"|(.+\.)?(position_ids|logit_scale|text_projection)"
    r"|(first_stage_model\.)?loss\..+"
)
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
