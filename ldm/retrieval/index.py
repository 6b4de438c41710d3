"""Search by an index of the faiss library: for millions of rows, at the price of neighbours that are missed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.io.errors import SettingError, fault_of, one_line
from ldm.io.files import Count, Schema, Share, Text, atomic_write, parse, read_json, write_json
from ldm.retrieval.database import Database
from ldm.retrieval.search import ExactSearch, Nearest, check_queries

try:
    import faiss
except ModuleNotFoundError:  # the exact search does without
    faiss = None

KINDS = ("flat", "ivf", "ivf-pq")
INDEX, CARD = "index.faiss", "searcher.json"
QUERIES = 100  # rows that recall is measured with
LEAST, PER_CLUSTER = 39, 64  # rows of a cluster that its centre is trained on
REORDERED = 10  # candidates for each neighbour of an index whose cosines are rough; they are compared again


class IndexCard(Schema):
    """What an index says of itself.

    database: fingerprint of the database.
    kind: one of KINDS. probes: clusters that are looked through. recall: as measured.
    """

    database: Text
    kind: Text
    probes: Count
    recall: Share


class Trial(NamedTuple):
    """What an index finds with so many probes: the share of the true neighbours, and milliseconds for a query."""

    probes: int
    recall: float
    milliseconds: float


@dataclass(frozen=True)
class IndexSearch:
    """Neighbours among what the index proposes; their cosines are exact."""

    database: Database
    index: Any
    candidates: int = 1  # for each neighbour

    def __call__(self, queries: Tensor, k: int) -> Nearest:
        check_queries(self.database, queries, k)
        queries = normalize(queries.float())
        count = min(len(self.database), k * self.candidates)
        _, rows = self.index.search(queries.numpy(), count)
        rows = torch.from_numpy(rows)
        if (rows < 0).any():  # too few in the clusters that were looked through
            return ExactSearch(self.database)(queries, k)
        cosines = torch.einsum("qd,qkd->qk", queries, normalize(self.database.embeddings(rows), dim=-1))
        best = cosines.topk(k)
        return Nearest(rows.gather(1, best.indices), best.values)


def train_index(database: Database, kind: str, out: Path, recall: float, k: int) -> Iterator[Trial]:
    """Build and write an index; yields what it finds with more and more probes, until that is enough.

    Args:
        kind: one of KINDS: all rows; clusters of rows; clusters of rows whose embeddings are compressed.
        recall: share of the k true neighbours that it must find.

    Raises:
        SettingError: see `check_index`; or the recall is not reached.
    """
    check_index(len(database), kind, k)
    index = empty_index(database, kind)
    for chunk, _ in database.chunks():
        index.add(unit(chunk))
    probes, found = 0, -1.0  # one trial at least
    while found < recall:
        probes = max(1, 2 * probes)
        if kind != "flat":
            index.nprobe = min(probes, index.nlist)
        trial = measure(IndexSearch(database, index, candidates_of(kind)), probes, k)
        yield trial
        found = trial.recall
        if found < recall and (kind == "flat" or probes >= index.nlist):
            raise SettingError("recall", f"{kind} finds {found:.3f} of the {k} nearest at most; got {recall:g}")
    with fault_of("target_path", (OSError, RuntimeError)):
        with atomic_write(out / INDEX) as temporary:
            faiss.write_index(index, str(temporary))
        card = IndexCard(database=database.fingerprint, kind=kind, probes=probes, recall=found)
        write_json(out / CARD, card.model_dump())


def check_index(rows: int, kind: str, k: int) -> None:
    """Raise SettingError for what no index is made of: faiss is missing, or a database has too few rows."""
    with fault_of("kind"):
        check_installed()
    if kind == "ivf-pq" and rows < LEAST * 256:
        raise SettingError("kind", f"ivf-pq needs {LEAST * 256} rows at least; the database has {rows}: take flat")
    if not k < rows:
        raise SettingError("knn", f"expected fewer than the database has rows, {rows}; got {k}")


def empty_index(database: Database, kind: str) -> Any:
    """An index of that kind, trained on rows of the database, without any."""
    rows, width = len(database), database.width
    flat = faiss.IndexFlatIP(width)
    if kind == "flat":
        return flat
    clusters = max(1, min(int(4 * math.sqrt(rows)), rows // LEAST))
    if kind == "ivf":
        index = faiss.IndexIVFFlat(flat, width, clusters, faiss.METRIC_INNER_PRODUCT)
    else:
        pieces = max(n for n in range(1, width // 4 + 1) if width % n == 0)
        index = faiss.IndexIVFPQ(flat, width, clusters, pieces, 8, faiss.METRIC_INNER_PRODUCT)
    sample = spread(rows, max(PER_CLUSTER * clusters, LEAST * 256))
    index.train(unit(database.embeddings(sample).numpy()))
    return index


def measure(search: IndexSearch, probes: int, k: int) -> Trial:
    """The share of the k rows nearest to a row that the index finds, for rows all over the database."""
    rows = spread(len(search.database), QUERIES)
    queries = search.database.embeddings(rows)
    begin = time.perf_counter()
    found = search(queries, k + 1)
    seconds = time.perf_counter() - begin
    true = ExactSearch(search.database)(queries, k + 1)
    shares = [
        len(({*mine} - {own}) & ({*all_} - {own})) / len({*all_} - {own})
        for own, mine, all_ in zip(rows.tolist(), found.rows.tolist(), true.rows.tolist(), strict=True)
    ]
    return Trial(probes, sum(shares) / len(shares), 1000 * seconds / len(rows))


def open_index(folder: Path, database: Database) -> IndexSearch:
    """The search by an index in a folder.

    Raises:
        ValueError: faiss is missing, there is no index, it is damaged, or of another state of the database.
    """
    check_installed()
    if not (folder / CARD).is_file():
        raise ValueError(
            f"{folder}: no index; scripts/train_searcher.py makes one, and without one the search is exact"
        )
    card = parse(IndexCard, read_json(folder / CARD), str(folder / CARD))
    if card.database != database.fingerprint:
        raise ValueError(
            f"{folder}: not of {database.folder} as it is now; scripts/train_searcher.py makes the index again"
        )
    try:
        index = faiss.read_index(str(folder / INDEX))
    except RuntimeError as error:
        raise ValueError(f"{folder / INDEX}: a damaged index: {one_line(error)[:200]}") from error
    if card.kind != "flat":
        index.nprobe = card.probes
    return IndexSearch(database, index, candidates_of(card.kind))


def check_installed() -> None:
    if faiss is None:
        raise ValueError("an index needs the faiss library, which is not installed: pip install -e '.[retrieval]'")


def candidates_of(kind: str) -> int:
    return REORDERED if kind == "ivf-pq" else 1


def spread(rows: int, most: int) -> Tensor:
    """Numbers of at most so many rows, evenly over all."""
    return torch.linspace(0, rows - 1, min(rows, most), dtype=torch.float64).long()  # float32 ends at 16 million


def unit(embeddings: np.ndarray) -> np.ndarray:
    """(N, D) float32 of length 1."""
    return normalize(torch.from_numpy(embeddings)).numpy()
