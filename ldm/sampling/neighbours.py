"""Conditioning on embeddings: of a text, of the images found for it in a database, or of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.generate import Item
from ldm.sampling.task import Condition


def context_of(own: Tensor | None, neighbours: Tensor | None) -> Tensor:
    """What a retrieval-augmented network attends to, (B, L, D), every embedding of length 1.

    Args:
        own: embeddings of the queries, (B, D), which come first; None = left out.
        neighbours: those of the neighbours, (B, k, D), nearest first; None = there are none.

    Source: arXiv 2204.11824.
    """
    parts = [part for part in (None if own is None else own[:, None], neighbours) if part is not None]
    return normalize(torch.cat(parts, 1), dim=-1)


class Neighbours(Condition):
    """The embeddings of each item. Guidance leads away from embeddings of zeros, as published.

    Args:
        contexts: one for each prompt_index, (N, L, D), see `context_of`.
        facts: what images depend on beside them, as JSON values.
        texts_cut: how many of the texts were longer than their encoder reads.
    """

    kind, key = "a retrieval-augmented model", "crossattn"

    def __init__(self, contexts: Tensor, facts: Mapping[str, Any], texts_cut: int = 0):
        self.contexts, self.facts, self.texts_cut = contexts, dict(facts), texts_cut

    def tokens(self, model: LatentDiffusion) -> int:
        super().tokens(model)
        conditioner, width = model.cond_stage_model, self.contexts.shape[-1]
        takes = isinstance(conditioner, nn.Identity | nn.Flatten)
        self._need(takes, f"its conditioner {type(conditioner).__name__} takes no embeddings")
        own = model.model.config["params"].get("context_dim")
        self._need(own == width, f"its network attends to embeddings {own} wide; these are {width} wide")
        return self.contexts.shape[1]

    def settings(self) -> dict[str, Any]:
        return self.facts

    def cut(self, model: LatentDiffusion, texts: Sequence[str]) -> int:
        return self.texts_cut

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        return model.get_learned_conditioning(self.contexts[[item.prompt_index for item in items]].to(model.device))

    def unconditional(self, model: LatentDiffusion, cond: Tensor) -> Tensor:
        return torch.zeros_like(cond)
