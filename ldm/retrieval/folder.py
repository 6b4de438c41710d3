"""Images of a folder with their neighbours in its own database, to train retrieval-augmented diffusion on.

data.params.train.target: ldm.retrieval.folder.NeighbourFolder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ldm.data.folder import ImageFolder
from ldm.io.files import file_sha256
from ldm.retrieval.database import Database, open_database
from ldm.retrieval.search import ExactSearch

QUERIES = 1024  # that are searched in one pass through the database


class NeighbourFolder(ImageFolder):
    """As `ImageFolder`, with `nn_embeddings`: those of an image's k nearest others, (k, D), of length 1, nearest first.

    Neighbours are found among all images of the database when the dataset is made; an image is never its own.

    Args:
        database: folder of the database that scripts/build_database.py made of the same images.
        k: neighbours of each image.

    Raises:
        ValueError: no such database, an image that is not in it, or too few images.
    """

    def __init__(self, root: str, size: int, database: str, k: int = 4, **rest: Any):
        super().__init__(root, size, **rest)
        self.database = open_database(database)
        self.neighbours = nearest_rows(self.database, rows_of(self.database, self.root, self.paths), k)

    def __getitem__(self, i: int) -> dict[str, Any]:
        embeddings = normalize(self.database.embeddings(self.neighbours[i]), dim=-1)
        return super().__getitem__(i) | {"nn_embeddings": embeddings}


def rows_of(database: Database, root: Path, paths: Sequence[Path]) -> Tensor:
    """The rows of images, (N,); a copy of another file has that one's.

    Raises:
        ValueError: an image has none.
    """
    starts = zip(database.starts.tolist(), database.parts, strict=False)
    entries = {row: entry for start, part in starts for row, entry in enumerate(part.entries, start)}
    by_content = {entry.get("sha256"): row for row, entry in entries.items()}
    # Another folder may have other images of these names.
    same = database.card is not None and database.card.folder == str(root.resolve())
    by_name = {entry.get("image"): row for row, entry in entries.items() if same}
    rows = [by_name.get(path.relative_to(root).as_posix()) for path in paths]
    rows = [by_content.get(file_sha256(path)) if row is None else row for row, path in zip(rows, paths, strict=True)]
    if None in rows:
        raise ValueError(
            f"database: {database.folder} does not have {paths[rows.index(None)]} and {rows.count(None) - 1} more of "
            f"{len(paths)} images; scripts/build_database.py {root} --out {database.folder} adds them"
        )
    return torch.tensor(rows)


def nearest_rows(database: Database, rows: Tensor, k: int) -> Tensor:
    """The k rows nearest to each of some rows, other than itself, (N, k).

    Raises:
        ValueError: there are too few rows.
    """
    if not 1 <= k < len(database):
        raise ValueError(f"k: expected 1..{len(database) - 1}, fewer than the database has rows; got {k}")
    search, found = ExactSearch(database), []
    for own in rows.split(QUERIES):
        near = search(database.embeddings(own), k + 1).rows  # (q, k + 1)
        others = near != own[:, None]
        others[others.all(1), -1] = False  # an image that did not find itself, among many with its embedding
        found.append(near[others].view(len(own), k))
    return torch.cat(found)
