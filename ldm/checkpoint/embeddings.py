"""Textual-inversion embeddings: vectors of new tokens, in the layouts of diffusers and of the A1111 web UI.

Source: Gal et al. (arXiv 2208.01618).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.file import CheckpointError, read_pickle, save_weights, weight_format
from ldm.checkpoint.file import read_checkpoint as read_tensors
from ldm.io.errors import shown


def read_embeddings(path: str | Path) -> dict[str, Tensor]:
    """The vectors of each new token, (k, D).

    The token's name is in files of diffusers; in those of A1111 it is the name of the file.

    Raises:
        OSError: no such file. CheckpointError: it can't be read, or is no such file.
    """
    path = Path(path)
    kind = weight_format(path)
    content = read_tensors(path) if kind == "safetensors" else read_pickle(path, zipped=kind == "zip")
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: expected the vectors of new tokens; got {shown(content)}")
    if {"clip_g", "clip_l"} & content.keys():
        raise CheckpointError(f"{path}: vectors for the two text encoders of SDXL, which take no new tokens here")
    if "string_to_param" in content:  # A1111: one entry, "*"
        entries = content["string_to_param"]
        content = {path.stem: next(iter(entries.values()), None) if isinstance(entries, Mapping) else entries}
    elif [*content] == ["emb_params"]:
        content = {path.stem: content["emb_params"]}
    vectors = {}
    for name, value in content.items():
        fits = isinstance(value, Tensor) and value.ndim in (1, 2) and value.is_floating_point() and value.numel() > 0
        if not fits:
            raise CheckpointError(f"{path}: expected a vector, or several, for each token; {name!r} is {shown(value)}")
        vectors[str(name)] = torch.atleast_2d(value.detach()).float()
    return vectors


def add_embeddings(encoder: nn.Module, path: str | Path) -> list[str]:
    """Give a text encoder the new tokens of a file; their names.

    Raises:
        OSError, CheckpointError: see `read_embeddings`; or they are for another encoder, or their names are taken.
    """
    found = read_embeddings(path)
    try:
        width = encoder.token_table.embedding_dim
    except (AttributeError, ValueError) as error:
        kind = type(encoder).__name__
        raise CheckpointError(
            f"{path}: {kind} takes no new tokens; expected one text encoder, as of SD 1 or 2"
        ) from error
    for name, vectors in found.items():
        if vectors.shape[1] != width:
            raise CheckpointError(
                f"{path}: made for another model: {name!r} has vectors of {vectors.shape[1]} numbers, this model's "
                f"text encoder takes {width}"
            )
    for name, vectors in found.items():
        try:
            encoder.add_token(name, vectors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return [*found]


def save_embeddings(path: str | Path, vectors: Mapping[str, Tensor]) -> None:
    """Write vectors (k, D) of tokens, in the layout of diffusers."""
    save_weights(path, {name: value.detach().cpu().contiguous() for name, value in vectors.items()})
