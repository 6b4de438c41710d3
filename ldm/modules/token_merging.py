"""Fewer tokens for self-attention: the most similar ones are averaged before it and share its result after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 0.75  # three tokens of every 2 x 2 cell; the fourth is what they can be merged into


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless that share of tokens can be merged."""
    if not 0 <= ratio <= MOST:
        raise ValueError(f"the share of tokens to merge must be 0..{MOST}; got {ratio:g}")


@dataclass(frozen=True, eq=False)
class Merging:
    """Which tokens of each image become one.

    place: of every token among the merged ones, (B, N), values 0..count-1.
    count: merged tokens.
    """

    place: Tensor
    count: int

    @staticmethod
    def of(tokens: Tensor, size: tuple[int, int], ratio: float) -> Merging:
        """Bipartite soft matching of the tokens of a map.

        The top left token of every 2 x 2 cell stays. Of the others, the `ratio` * N (rounded down, at most all of
        them) whose most similar staying token is most similar go into that one. Similarity is the cosine.

        Args:
            tokens: (B, N, C), row by row.
            size: height and width of the map; odd sizes have cut cells at the right and at the bottom.
            ratio: share of all tokens, 0..MOST.

        Raises:
            ValueError: ratio is outside of that.

        Source: ToMe for Stable Diffusion (arXiv 2303.17604), which draws the token that stays of each cell at
        random. Here it is always the same one: an image must not depend on its batch or on a generator.
        """
        check_ratio(ratio)
        cells = torch.arange(tokens.shape[1], device=tokens.device).view(size)
        staying = cells[::2, ::2].flatten()  # (D,)
        others = torch.cat([cells[::2, 1::2].flatten(), cells[1::2].flatten()])  # (S,)
        merged = min(int(ratio * tokens.shape[1]), len(others))

        unit = F.normalize(tokens, dim=-1)
        likeness, nearest = (unit[:, others] @ unit[:, staying].mT).max(dim=-1)  # (B, S) each
        rank = likeness.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        place = cells.new_empty(tokens.shape[:2])  # (B, N)
        place[:, staying] = torch.arange(len(staying), device=cells.device)
        place[:, others] = torch.where(rank < merged, nearest, len(staying) + rank - merged)
        return Merging(place, tokens.shape[1] - merged)

    def merge(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, count, C), the mean of those that become one."""
        index = self.place.unsqueeze(-1).expand(x.shape)
        return x.new_zeros(len(x), self.count, x.shape[-1]).scatter_reduce(1, index, x, "mean", include_self=False)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, count, C) -> (B, N, C): every token gets what became of it."""
        return y.gather(1, self.place.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
