"""How fast a search is, and how much memory it takes, on a database of random embeddings in clusters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ldm.io.arrays import save_arrays
from ldm.profiling.timing import resident
from ldm.retrieval.database import Database, open_database
from ldm.retrieval.index import QUERIES, open_index, spread, train_index
from ldm.retrieval.part import EMBEDDING, LENGTH
from ldm.retrieval.search import ExactSearch

PART_ROWS = 50_000
WIDTH_OF_CLUSTER = 0.7  # of the noise around a centre, whose length is 1
TIMES = 5


def write_random(folder: Path, rows: int, width: int) -> Database:
    """Embeddings around as many centres as the square root of their number."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((max(1, int(rows**0.5)), width), dtype=np.float32) / width**0.5
    for number, first in enumerate(range(0, rows, PART_ROWS), start=1):
        count = min(PART_ROWS, rows - first)
        noise = random.standard_normal((count, width), dtype=np.float32) * (WIDTH_OF_CLUSTER / width**0.5)
        embeddings = centres[random.integers(len(centres), size=count)] + noise
        lengths = np.linalg.norm(embeddings, axis=1)
        save_arrays(folder / f"{rows}x{width}-part_{number}.npz", {EMBEDDING: embeddings, LENGTH: lengths})
    return open_database(folder)


def benchmark(folder: Path, rows: int, width: int, k: int, kind: str | None) -> Iterator[str]:
    """Yield lines of results: reading the embeddings, the exact search, and an index of that kind."""
    database = write_random(folder, rows, width)
    queries = database.embeddings(spread(rows, QUERIES)) + 0.1 * torch.randn(min(rows, QUERIES), width) / width**0.5
    size = database.bytes
    yield f"{rows} rows of width {width}, {size / 1e9:.2f} GB; {torch.get_num_threads()} threads"
    before, exact = resident("VmRSS"), ExactSearch(database)
    reading = median(lambda: [torch.from_numpy(chunk).sum() for chunk, _ in database.chunks()])
    yield f"reading once: {1000 * reading:.0f} ms, {size / reading / 1e9:.1f} GB/s"
    one = median(lambda: exact(queries[:1], k))
    yield f"exact, one query: {1000 * one:.0f} ms, {one / reading:.2f} x reading"
    many = median(lambda: exact(queries, k), times=1)
    yield f"exact, {len(queries)} queries: {1000 * many / len(queries):.1f} ms a query"
    yield f"memory: {(resident('VmRSS') - before) / size:.2f} x the file"
    if kind is not None:
        for trial in train_index(database, kind, folder / "searcher", 0.95, k):
            yield f"{kind}, {trial.probes} probes: recall@{k} {trial.recall:.4f}"
        index = open_index(folder / "searcher", database)
        fast = median(lambda: index(queries[:1], k))
        yield f"{kind}, one query: {1000 * fast:.2f} ms, {one / fast:.0f} x the speed of the exact search"


def median(work: Callable[[], object], times: int = TIMES) -> float:
    """Seconds; once before, so that the file is in memory."""
    work()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
