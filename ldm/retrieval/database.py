"""A database of embeddings: a folder of parts, as published for retrieval-augmented diffusion.

Each part is an npz file with the arrays `embedding` (N, D), not normalised, `img_id` (N,) and `patch_coords` (N, 4).
Databases of scripts/build_database.py also say what embedded them, and of each row what its image is.
Source: arXiv 2204.11824.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.io.files import PROJECT_ROOT, Schema, Text, json_sha256, parse, read_json
from ldm.io.images import fit, open_image
from ldm.retrieval.part import SUFFIXES, Part, number_of, parts_in

CARD = "database.json"
THUMBNAIL = "thumbnail"
PUBLISHED = Path("data/rdm/retrieval_databases")  # from the working directory, or from the project
MAKE = "scripts/build_database.py makes one of a folder of images"


class Card(Schema):
    """What a database says of itself.

    embedder: name of what embedded it; weights: of their content, which identifies it.
    folder: where its images are; entries name them from there on.
    parts: names of its files; none before it is finished.
    """

    embedder: Text
    weights: Text
    folder: Text
    parts: list[str] = []


@dataclass(frozen=True)
class Neighbour:
    """What is known of a row.

    row, similarity: its number in the database, and its cosine to the query.
    image: its path in the folder of images, "" if unknown; caption, licence likewise.
    """

    row: int
    similarity: float
    image: str = ""
    caption: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Database:
    """Embeddings of images, (rows, width), in parts whose rows are numbered one after another.

    card: None in a published database.
    """

    folder: Path
    parts: Sequence[Part]
    card: Card | None = None

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each part, and the number of all rows."""
        return np.cumsum([0, *(part.rows for part in self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        return self.parts[0].width

    @property
    def bytes(self) -> int:
        """Bytes of all embeddings."""
        return sum(part.rows * part.width * part.dtype.itemsize for part in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """Names and checksums of the parts: another database has another."""
        return json_sha256([part.content for part in self.parts])[:16]

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All embeddings in order, (some, width) float32 at a time, and their lengths."""
        return (chunk for part in self.parts for chunk in part.chunks())

    def embeddings(self, rows: Tensor) -> Tensor:
        """Those of some rows (...) -> (..., width) float32, as they are stored."""
        found = torch.empty(rows.numel(), self.width)
        for part, places, inside in self._by_part(rows):
            found[places] = torch.from_numpy(part.embeddings(inside))
        return found.unflatten(0, rows.shape)

    def field(self, name: str, rows: Tensor) -> np.ndarray:
        """Another array of the parts, such as img_id: its values of some rows (...) -> (..., *).

        Raises:
            ValueError: a part does not have it.
        """
        found = {}
        for part, places, inside in self._by_part(rows):
            found |= zip(places.tolist(), part.field(name, inside), strict=True)
        values = np.stack([found[place] for place in range(rows.numel())])
        return values.reshape(*rows.shape, *values.shape[1:])

    def neighbours(self, rows: Tensor, similarities: Tensor) -> list[Neighbour]:
        """What is known of the k rows of one query; both (k,)."""
        entries: dict[int, dict[str, Any]] = {}
        for part, places, inside in self._by_part(rows):
            if part.entries:
                entries |= {int(place): part.entries[row] for place, row in zip(places, inside, strict=True)}
        return [
            Neighbour(
                row,
                round(similarity, 4),
                *(str(entries.get(place, {}).get(name) or "") for name in ("image", "caption", "licence")),
            )
            for place, (row, similarity) in enumerate(zip(rows.tolist(), similarities.tolist(), strict=True))
        ]

    def image(self, neighbour: Neighbour, side: int) -> Image.Image | None:
        """A square of a row's image: its thumbnail, or its file; None if there is neither."""
        ((part, _, inside),) = self._by_part(torch.tensor([neighbour.row]))
        if part.has(THUMBNAIL):
            return fit(Image.fromarray(part.field(THUMBNAIL, inside)[0]), side, side)
        path = Path(self.card.folder if self.card else "") / neighbour.image
        return fit(open_image(path), side, side) if neighbour.image and path.is_file() else None

    def _by_part(self, rows: Tensor) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
        """For each part with some of the rows: their places among the rows, and their numbers in the part."""
        flat = rows.flatten().numpy()
        at = np.searchsorted(self.starts, flat, side="right") - 1
        for number in np.unique(at).tolist():
            places = np.flatnonzero(at == number)
            yield self.parts[number], places, flat[places] - self.starts[number]


def open_database(name: str | Path) -> Database:
    """A database by its folder, from the working directory or from the project, or by the name of a published one.

    Raises:
        ValueError: there is none, it is not finished, or a part is missing or damaged.
    """
    places = (Path(name), PUBLISHED / name, PROJECT_ROOT / PUBLISHED / name, PROJECT_ROOT / name)
    folders = [place for place in places if place.is_dir()]
    # The images that a database was made of may lie in a folder of the same name.
    folder = next((place for place in folders if has_parts(place)), folders[0] if folders else None)
    if folder is None:
        raise ValueError(f"{name}: no such folder, nor {PUBLISHED / name}; {MAKE}")
    card = read_card(folder)
    if card is not None and not card.parts:
        raise ValueError(f"{folder}: not finished; the same command of scripts/build_database.py goes on with it")
    parts = parts_in(folder)
    if card is None:
        check_numbers(folder, [number_of(part.path) for part in parts])
    elif missing := {*card.parts} - {part.path.name for part in parts}:
        raise ValueError(f"{folder}: {min(missing)} is missing, which {CARD} lists")
    return Database(folder, parts, card)


def has_parts(folder: Path) -> bool:
    """Whether the folder is a database, finished or not."""
    return (folder / CARD).is_file() or any(path.suffix in SUFFIXES for path in folder.iterdir())


def check_numbers(folder: Path, numbers: Sequence[int]) -> None:
    """Raise ValueError if one is missing among the rising numbers of the parts of a folder; -1: a part has none."""
    if -1 not in numbers and (missing := {*range(numbers[0], numbers[-1])} - {*numbers}):
        raise ValueError(f"{folder}: part {min(missing)} is missing; there are parts {numbers[0]} to {numbers[-1]}")


def read_card(folder: Path) -> Card | None:
    """What a database says of itself; None if it says nothing."""
    path = folder / CARD
    return parse(Card, read_json(path), str(path)) if path.is_file() else None
