"""Deltas of Custom Diffusion: the weights that it trained and its new tokens, in both published layouts.

diffusers: {"unet": {key: weight}, "modifier_token": {token: vector}}; CompVis: {"state_dict": {key: weight, "embed":
vectors}}, which does not name its tokens. In compressed files a weight is {"u": u, "v": v}, to be added as u @ v.
Source: Kumari et al. (arXiv 2212.04488).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.conversion import UNET, ConversionError, unet_to_diffusers
from ldm.checkpoint.file import CheckpointError, read_pickle, weight_format
from ldm.io.errors import shown, some
from ldm.io.files import atomic_write

TOKEN = "<new{}>"  # the name of a token in a file without names, from 1


@dataclass(frozen=True)
class Delta:
    """What a file holds: weights by their names in it, each a tensor or u and v; vectors of tokens.

    named: whether the names of the tokens are the file's, not ours.
    """

    weights: Mapping[str, Tensor | tuple[Tensor, Tensor]]
    tokens: Mapping[str, Tensor]
    named: bool = True


def read_delta(path: str | Path) -> Delta:
    """The content of a file in either layout.

    Raises:
        OSError: no such file. CheckpointError: it can't be read, or is no such file.
    """
    path = Path(path)
    kind = weight_format(path)
    content = None if kind == "safetensors" else read_pickle(path, zipped=kind == "zip")
    if not isinstance(content, Mapping) or not ({"unet", "state_dict"} & content.keys()):
        raise CheckpointError(f"{path}: not a delta of Custom Diffusion; expected a file with unet or state_dict")
    if "text_encoder" in content and "unet" in content:
        raise CheckpointError(f"{path}: holds a whole text encoder too, which is not read here")
    part = "unet" if "unet" in content else "state_dict"
    weights = _named(path, part, content[part])
    embed = _vectors(path, "embed", weights.pop("embed", torch.empty(0, 1)))
    tokens = {TOKEN.format(i + 1): vector for i, vector in enumerate(embed)}
    tokens = _named(path, "modifier_token", content.get("modifier_token", tokens))
    return Delta(
        {key: _weight(path, key, value) for key, value in weights.items()},
        {name: _vectors(path, name, value) for name, value in tokens.items()},
        "modifier_token" in content,
    )


def read_deltas(paths: Sequence[str | Path]) -> list[Delta]:
    """The contents of files that are used together.

    Tokens without a name are called <new1>, <new2>, ... in the order of the files, but as none that has a name.

    Raises:
        OSError, CheckpointError: see `read_delta`.
    """
    deltas = [read_delta(path) for path in paths]
    taken = {name.lower() for delta in deltas if delta.named for name in delta.tokens}
    free = (name for i in count(1) if (name := TOKEN.format(i)) not in taken)
    return [
        delta if delta.named else replace(delta, tokens={next(free): vector for vector in delta.tokens.values()})
        for delta in deltas
    ]


def _named(path: Path, part: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: {part}: expected weights or vectors by their names; got {shown(content)}")
    return dict(content)


def _vectors(path: Path, name: str, value: Any) -> Tensor:
    """The vectors of a token, (k, D)."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.is_floating_point():
        raise CheckpointError(f"{path}: {name}: expected the vector of a token; got {shown(value)}")
    return torch.atleast_2d(value.detach()).float()


def _weight(path: Path, key: str, value: Any) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(value, Tensor):
        return value.detach().float()
    if isinstance(value, Mapping) and all(isinstance(value.get(part), Tensor) for part in "uv"):
        return value["u"].detach().float(), value["v"].detach().float()
    raise CheckpointError(f"{path}: {key}: expected a weight, or u and v; got {shown(value)}")


def diffusers_names(unet: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of a UNet's weights in diffusers, and ours; none for a network that diffusers has no names for."""
    try:
        return dict(zip(unet_to_diffusers(unet), unet, strict=True))
    except ConversionError:
        return {}


def changes_of(model: nn.Module, path: str | Path, delta: Delta) -> dict[str, Tensor]:
    """What a file adds to the weights of a model, float32, by the model's names.

    Raises:
        CheckpointError: the file is for another model.
    """
    own = {key: p for key, p in model.named_parameters() if key.startswith(UNET)}
    theirs = diffusers_names({key.removeprefix(UNET): p for key, p in own.items()})
    changes = {}
    for key, value in delta.weights.items():
        name = UNET + theirs.get(key, key.removeprefix(UNET))
        if name not in own:
            raise CheckpointError(f"{path}: made for another model: {key} is not in this one{some(own, 2)}")
        whole = value[0] @ value[1] if isinstance(value, tuple) else value
        if whole.shape != own[name].shape:
            raise CheckpointError(
                f"{path}: made for another model: {key} is {tuple(whole.shape)}, here {tuple(own[name].shape)}"
            )
        whole = whole.to(own[name].device)
        changes[name] = whole if isinstance(value, tuple) else whole - own[name].detach().float()
    return changes


def apply_deltas(model: nn.Module, paths: Sequence[str | Path]) -> list[Delta]:
    """Give a model the weights and tokens of files, whose differences to its own weights add up; returns their content.

    Raises:
        OSError, CheckpointError: see `read_delta`; or a file is for another model, or a token is there already.
    """
    deltas, total = read_deltas(paths), {}
    for path, delta in zip(paths, deltas, strict=True):
        for name, change in changes_of(model, path, delta).items():
            total[name] = total.get(name, 0.0) + change
        add_tokens(model.cond_stage_model, path, delta.tokens)
    for name, change in total.items():
        weight = model.get_parameter(name)
        weight.data = weight.detach() + change.to(weight)
    return deltas


def add_words(encoder: nn.Module, paths: Sequence[str | Path]) -> None:
    """Give a text encoder the tokens of files alone.

    Raises:
        OSError, CheckpointError: see `apply_deltas`.
    """
    for path, delta in zip(paths, read_deltas(paths), strict=True):
        add_tokens(encoder, path, delta.tokens)


def add_tokens(encoder: nn.Module, path: str | Path, tokens: Mapping[str, Tensor]) -> None:
    """Give a text encoder tokens of a file.

    Raises:
        CheckpointError: they are another model's, or there already; or the encoder takes none.
    """
    try:
        for name, vectors in tokens.items():
            width = encoder.token_table.embedding_dim
            if vectors.shape[1] != width:
                raise ValueError(f"made for another model: {name!r} has {vectors.shape[1]} numbers, expected {width}")
            encoder.add_token(name, vectors)
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_delta(path: str | Path, weights: Mapping[str, Tensor], tokens: Mapping[str, Tensor]) -> None:
    """Write a delta: .ckpt in the layout of CompVis, anything else in that of diffusers.

    Args:
        weights: by our names without `model.diffusion_model.`, all of the UNet's for diffusers' names to be known.
        tokens: their vectors, (1, D).

    Raises:
        ValueError: a token of several vectors, which the layouts have no place for; or a file of safetensors.
    """
    if Path(path).suffix == ".safetensors":
        raise ValueError(f"{path}: a delta of Custom Diffusion is a .bin (diffusers) or a .ckpt (CompVis)")
    if several := [name for name, vectors in tokens.items() if len(vectors) > 1]:
        raise ValueError(f"a delta keeps one vector for each token; {several[0]} has {len(tokens[several[0]])}")
    flat = {name: vectors[0].clone() for name, vectors in tokens.items()}
    chosen = {key: value.clone() for key, value in weights.items() if ".attn2." in key}
    if Path(path).suffix == ".ckpt":
        state = {UNET + key: value for key, value in chosen.items()}
        content = {"state_dict": state | ({"embed": torch.stack([*flat.values()])} if flat else {})}
    else:
        ours = diffusers_names(weights)
        content = {"unet": {name: chosen[key] for name, key in ours.items() if key in chosen}, "modifier_token": flat}
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def compressed(tuned: Tensor, pretrained: Tensor, ratio: float = 0.6) -> tuple[Tensor, Tensor]:
    """u (m, i) and v (i, n) with u @ v about tuned - pretrained, (m, n): its largest singular values.

    Kept are those before the one at which their running sum exceeds `ratio` of all of them, as published; i may be 0.
    """
    u, values, v = torch.linalg.svd(tuned - pretrained, full_matrices=False)
    share = values.cumsum(0) / values.sum()
    rank = int((share > ratio).nonzero()[0]) if bool((share > ratio).any()) else len(values)
    return u[:, :rank] * values[:rank], v[:rank]
