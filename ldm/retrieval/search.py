"""The nearest neighbours of queries in a database, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.io.errors import SettingError
from ldm.retrieval.database import Database

CHOSEN_FROM = 1 << 16  # cosines, at least, that the greatest are chosen from at a time
SHORTEST = 1e-12  # length of an embedding that is divided by; one of zeros is like nothing


class Nearest(NamedTuple):
    """The k rows nearest to each of Q queries, nearest first: their numbers and cosines, both (Q, k)."""

    rows: Tensor
    similarities: Tensor


class Searcher(Protocol):
    """Finds neighbours."""

    def __call__(self, queries: Tensor, k: int) -> Nearest:
        """Queries (Q, D) of any length -> their k nearest rows.

        Raises:
            SettingError: `knn`: the database has fewer rows; `database`: its embeddings have another width, or are
                not finite.
        """


@dataclass(frozen=True)
class ExactSearch:
    """Every row is compared with every query, while the embeddings are read once."""

    database: Database

    @torch.no_grad()
    def __call__(self, queries: Tensor, k: int) -> Nearest:
        check_queries(self.database, queries, k)
        directions = normalize(queries.float()).T.contiguous().numpy()  # (D, Q)
        best = Nearest(torch.empty(len(queries), 0, dtype=torch.int64), torch.empty(len(queries), 0))
        first = 0
        for cosines in self._cosines(directions):
            best = _better(best, torch.from_numpy(cosines).T, first, k)
            first += len(cosines)
        if not best.similarities.isfinite().all():
            raise SettingError("database", f"{self.database.folder}: has embeddings that are not finite")
        return best

    def _cosines(self, directions: np.ndarray) -> Iterator[np.ndarray]:
        """The cosines of all rows with the queries (D, Q), in order, (some, Q) at a time: enough for a cheap choice."""
        waiting: list[np.ndarray] = []
        count = 0
        for chunk, lengths in self.database.chunks():
            waiting.append(_products(chunk, directions) / np.maximum(lengths, SHORTEST)[:, None])
            count += waiting[-1].size
            if count >= CHOSEN_FROM:
                yield np.concatenate(waiting)
                waiting, count = [], 0
        if waiting:
            yield np.concatenate(waiting)


def _products(chunk: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """(n, D) times (D, Q).

    Of one query NumPy's product takes half the time of PyTorch's, and a third more than reading, if the rows are
    aligned. With several queries NumPy's threads would wait for those of PyTorch, which choose the greatest.
    """
    if directions.shape[1] == 1:
        return chunk @ directions
    return (torch.from_numpy(chunk) @ torch.from_numpy(directions)).numpy()


def _better(best: Nearest, similarities: Tensor, first: int, k: int) -> Nearest:
    """The best of those so far and of the next rows, which begin at `first`; similarities (Q, n)."""
    numbers = torch.arange(first, first + similarities.shape[1])
    if best.rows.shape[1] == k:  # few of the next rows are nearer to any query; NaN counts as nearer, to be noticed
        nearer = (~(similarities <= best.similarities[:, -1:])).any(0)
        numbers, similarities = numbers[nearer], similarities[:, nearer]
    top = similarities.topk(min(k, similarities.shape[1]))
    rows = torch.cat([best.rows, numbers[top.indices]], 1)
    found = torch.cat([best.similarities, top.values], 1)
    kept = found.topk(min(k, found.shape[1]))
    return Nearest(rows.gather(1, kept.indices), kept.values)


def check_queries(database: Database, queries: Tensor, k: int) -> None:
    """Raise SettingError for queries, or a number of neighbours, that don't fit the database."""
    if queries.ndim != 2 or queries.shape[1] != database.width:
        raise SettingError(
            "database", f"{database.folder}: embeddings {database.width} wide; the queries are {queries.shape[-1]} wide"
        )
    if not 1 <= k <= len(database):
        raise SettingError("knn", f"expected 1..{len(database)}, the rows of {database.folder}; got {k}")
    if not queries.isfinite().all():
        raise SettingError("queries", "expected finite embeddings; got NaN or infinity")


def nearest_others(queries: Tensor, rows: Tensor, k: int, own: Tensor | None = None, batch: int = 1024) -> Tensor:
    """The k rows nearest to each query, by cosine and nearest first, (Q, k).

    Args:
        queries, rows: embeddings (Q, D) and (N, D), of any length.
        own: for each query the row that is the same image, which is never found, (Q,); -1 = none.

    Raises:
        ValueError: there are too few rows.
    """
    if not 1 <= k < len(rows):
        raise ValueError(f"k: expected 1..{len(rows) - 1}, fewer than there are images; got {k}")
    queries, rows, found = normalize(queries), normalize(rows), []
    for first in range(0, len(queries), batch):
        cosines = queries[first : first + batch] @ rows.T  # (b, N)
        if own is not None:
            mine = own[first : first + batch]
            cosines[torch.arange(len(mine))[mine >= 0], mine[mine >= 0]] = -torch.inf
        found.append(cosines.topk(k).indices)
    return torch.cat(found)
