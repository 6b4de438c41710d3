"""A module filled with the weights of a file; every key that finds no place is named.

Published checkpoints carry their training's leftovers (schedule buffers, averages, losses); what is known to
be harmless is reported in one line, and anything else that does not match is an error.
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
        return (
            f"{self.path}: {self.weights} weights; {len(self.ignored)} optional keys ignored"
            f"{some(self.ignored)}; {len(self.absent)} optional keys absent{some(self.absent)}"
        )


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
    # Only trained parameters have an average: what is frozen keeps its one value.
    for key in [k for k in chosen if k.startswith("model.")]:
        chosen[key] = averages.pop(average_of(key), chosen[key])
    refuse_averages(averages, path)
    return chosen, "ema"


def refuse_averages(left: Collection[str], path: str | Path) -> None:
    """Averages that no weight has taken."""
    if left:
        raise CheckpointError(f"{path}: averages of no model.* weight{some(left)}; use weights 'raw'")


def _averages_alone(path: str | Path, state: dict[str, Tensor], weights: str) -> tuple[dict[str, Tensor], str]:
    """A file of averages without the weights that they are of, as trainers write for sampling; `fill` names them."""
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
    """Fill `module` and use up `state`; with `assign` its tensors become the module's, which may be on meta."""
    expected = module.state_dict(keep_vars=True)
    state |= {key: state.pop(average_of(key)) for key in expected if key not in state and average_of(key) in state}
    refuse_averages([key for key in state if key.startswith("model_ema.") and key not in EMA_BOOKKEEPING], path)
    averages = {average_of(key): key for key in state if key.startswith("model.")}
    state |= {average: state[key] for average, key in averages.items() if average in expected}
    ignored, absent = _unmatched(expected, state, path)
    for key in [key for key in state if key in expected and _rounded(key, state[key], expected[key])]:
        del state[key]
        ignored.add(key)
    for key in list(state):  # one after the other, so that the file is let go of on the way
        value = state.pop(key)
        if key in expected:
            state[key] = _aligned(value.to(expected[key].dtype))
    if assign:  # what the file leaves out and the model never reads still needs a place
        state |= {key: torch.zeros_like(expected[key], device="cpu") for key in absent if expected[key].is_meta}
    module.load_state_dict(state, strict=False, assign=assign)
    return Report(path, used, tuple(sorted(ignored)), tuple(sorted(absent)))


def _rounded(key: str, value: Tensor, own: Tensor) -> bool:
    """A noise schedule that was stored in half precision, as in checkpoints converted as a whole.

    The config gives it exactly. Rounded, the first steps of a fine schedule have no noise at all.
    """
    return bool(SCHEDULE.fullmatch(key)) and value.itemsize < own.itemsize


def _unmatched(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> tuple[set[str], set[str]]:
    """Keys of the file without a place in the module, and of the module that the file lacks: harmless ones only.

    Raises:
        CheckpointError: one that is not known to be harmless, or tensors of another shape or kind of number.
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
        "that are no real numbers": dtypes,
    }
    if any(faults.values()):
        problems = [f"{len(names)} {what}{some(names)}" for what, names in faults.items() if names]
        raise CheckpointError(
            f"{path}: keys do not match the config (is it the config of another model?): {'; '.join(problems)}"
        )
    return ignored | copies, absent


def _aligned(value: Tensor) -> Tensor:
    """The tensor as PyTorch would allocate it: elsewhere the last digits of what is computed from it may differ.

    So what a model computes depends on its weights, not on where they lie in a file.
    """
    return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()


def _twin(key: str) -> str:
    return key.replace("cond_stage_model.", "first_stage_model.", 1)


def _shared(key: str, expected: Mapping[str, Tensor]) -> bool:
    """A module whose conditioner is its first stage lists the same tensors twice."""
    return key.startswith("cond_stage_model.") and _twin(key) in expected and expected[key] is expected[_twin(key)]


def _copied(key: str, state: Mapping[str, Tensor]) -> bool:
    """A file of such a model may hold the first stage's weights twice."""
    return key.startswith("cond_stage_model.") and _twin(key) in state and torch.equal(state[key], state[_twin(key)])
