"""What the commands on databases do and print."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from ldm.cli.parser import check_outdir
from ldm.io.errors import SettingError, fault_of, some
from ldm.retrieval.benchmark import benchmark
from ldm.retrieval.build import BuildSettings, build
from ldm.retrieval.database import PUBLISHED, Database, open_database
from ldm.retrieval.index import check_index, train_index

SEARCHERS = Path("data/rdm/searchers")
SHOWN = 3  # of images that are left out, how many are named


def build_database(settings: BuildSettings) -> None:
    """Make a database, or go on with one; print what is in it."""
    check_outdir(settings.out, "--out")
    began = time.perf_counter()
    done = build(settings)
    if done.left_out:
        print(f"warning: {len(done.left_out)} images are left out, which can't be read{some(done.left_out, SHOWN)}")
    if done.gone:
        print(f"{done.gone} rows are of images that are no longer in the folder, or were changed; they stay")
    rows, seconds = len(done.database), time.perf_counter() - began
    print(
        f"{settings.out}: {rows} rows of width {done.database.width} in {len(done.database.parts)} parts, "
        f"{done.before} of an earlier run; {done.found} images in the folder, {done.copies} of them copies; "
        f"{seconds:.1f} s"
    )


def default_out(folder: Path) -> Path:
    """Where the database of a folder of images is found by the folder's name."""
    return PUBLISHED / folder.resolve().name


def find_database(name: str | Path) -> Database:
    """See `open_database`; a SettingError if there is none."""
    with fault_of("database"):
        return open_database(name)


def train_searcher(name: str, target: str | None, kind: str, recall: float, knn: int) -> None:
    """Make the index of a database; print what it finds."""
    database = find_database(name)
    out = SEARCHERS / database.folder.name if target is None else Path(target)
    check_outdir(out, "--target_path")
    check_index(len(database), kind, knn)
    print(f"{database.folder}: {len(database)} rows of width {database.width}")
    with fault_of("database"):  # a part that is damaged inside
        for number, trial in enumerate(train_index(database, kind, out, recall, knn)):
            if number == 0:
                print(f"  probes  recall@{knn}  ms a query")
            print(f"{trial.probes:8}{trial.recall:11.4f}{trial.milliseconds:12.3f}", flush=True)
    print(f"{out}: {kind}, recall@{knn} {trial.recall:.4f} against the exact search")


def benchmark_search(folder: str, rows: int, width: int, knn: int, kind: str | None) -> None:
    """Print how fast searches are on random embeddings, which lie in the folder for that time."""
    if not Path(folder).is_dir():
        raise SettingError("dir", f"{folder}: no such directory")
    if kind is not None:
        check_index(rows, kind, knn)
    elif knn > rows:
        raise SettingError("knn", f"expected 1..{rows}, the rows of the database; got {knn}")
    with fault_of("dir", (OSError,)), tempfile.TemporaryDirectory(dir=folder) as place:
        for line in benchmark(Path(place), rows, width, knn, kind):
            print(line, flush=True)
