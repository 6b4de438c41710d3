"""Golden cases and the recipe for their weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.paths import GOLDENS

EMBEDDING_SUFFIXES = (
    "embedding.weight",
    "emb.weight",
    "emb.emb.weight",
    "positional_embedding",
    "token_embedding.weight",
    "position_embedding.weight",
    "label_emb.weight",
    "text_projection",
    "embedding_table.weight",
)
Module = TypeVar("Module", bound=nn.Module)


def load_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden case: its JSON and its tensors."""
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(GOLDENS / f"{name}.safetensors")


def recipe_tensor(key: str, shape: tuple[int, ...], seed: int, gain: float) -> Tensor:
    """The recipe's weight of one state-dict key: float32, exactly representable in float16."""
    r = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
    if len(shape) >= 2 and key.endswith(EMBEDDING_SUFFIXES):
        r = 0.5 * r
    elif len(shape) >= 2:
        r = gain * r * np.prod(shape[1:]) ** -0.5
    elif len(shape) == 0 or key.endswith("weight"):
        r = 1 + 0.2 * r
    else:
        r = 0.1 * r
    return torch.from_numpy(np.asarray(r, dtype=np.float16)).float()


def recipe_weights(
    module: Module,
    seed: int,
    gain: float = 1.0,
    stored: Mapping[str, Tensor] | None = None,
    sums: Mapping[str, tuple[list[int], float]] | None = None,
) -> Module:
    """Fill a module's parameters by the recipe; returns it in eval mode.

    Args:
        module: its own state-dict keys are the recipe's keys; buffers keep their values.
        seed, gain: as in the case's `weight_recipe`.
        stored: tensors to take instead, for keys (parameters or buffers) that the recipe does not give.
        sums: the case's `weights`: key -> (shape, sum of the elements). Names and shapes must match these
            exactly, which also proves the module's state-dict layout.
    """
    weights = {key: recipe_tensor(key, tuple(p.shape), seed, gain) for key, p in module.named_parameters()}
    weights.update({key: value.float() for key, value in (stored or {}).items()})
    if sums is not None:
        assert {k: list(w.shape) for k, w in weights.items()} == {k: shape for k, (shape, _) in sums.items()}
        for key, (_, total) in sums.items():
            assert abs(weights[key].double().sum().item() - total) < 2e-3, f"sum of {key}"
    result = module.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert not set(result.missing_keys) & set(weights)
    return module.eval()


def from_recipe(module: Module, case: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Module:
    """`recipe_weights` with all that the case says: seed, gain, stored weights `w.KEY`, sums."""
    stored = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    return recipe_weights(module, **case["weight_recipe"], stored=stored, sums=case.get("weights"))


def assert_golden(actual: Tensor, expected: Tensor, case: Mapping[str, Any]) -> None:
    """Equal at the tolerance that the case's JSON gives."""
    tolerance = case["tolerance"]
    torch.testing.assert_close(actual, expected, rtol=tolerance.get("rtol", 0.0), atol=tolerance["atol"])
