"""Retrieval in a run: what embeds its queries, the neighbours that are found for them, and sheets that show these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.cli.databases import find_database
from ldm.cli.pipeline import MethodRun
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import Setup
from ldm.cli.tasks import file_reference
from ldm.io.errors import SettingError, fault_of
from ldm.io.images import BACKGROUND, find_png, grid, open_image, read_png, save_png
from ldm.retrieval.database import Database, Neighbour
from ldm.retrieval.embedders import VIT_L_14, Embedder, load_embedder
from ldm.retrieval.index import open_index
from ldm.retrieval.search import ExactSearch, Searcher
from ldm.sampling.engine import Task
from ldm.sampling.generate import Item
from ldm.sampling.neighbours import Neighbours, context_of

KNN, SCALE, DATABASE = 10, 5.0, "artbench-surrealism"  # as published
CELL = 192  # pixels of an image on a sheet
MISSING = (224, 224, 224)  # where a neighbour's image is not here


@dataclass(frozen=True)
class RetrievalSettings:
    """What the network is conditioned on.

    use_neighbors: embeddings found in the database, beside that of the query.
    omit_query: without that of the query.
    knn: how many; None = what the model's config recommends, or 10.
    database: folder or name, see `open_database`; None = what the model's config recommends, or the published default.
    searcher: folder of its index; None = the exact search.
    clip_type: the embedder, see `load_embedder`; None = the model config's, or CLIP's ViT-L/14.
    """

    use_neighbors: bool = False
    omit_query: bool = False
    knn: int | None = None
    database: str | None = None
    searcher: str | None = None
    clip_type: str | None = None


@dataclass(frozen=True)
class Retrieved:
    """The items with their neighbours, the task, and where the neighbours were found; None without any."""

    items: list[Item]
    task: Task
    database: Database | None


def with_scale(sampling: SamplingSettings, setup: Setup) -> SamplingSettings:
    """The settings with a guidance scale: the given one, the model config's, or the published one."""
    return replace(sampling, scale=SCALE) if sampling.scale is None and "sampling" not in setup.config else sampling


def query_images(paths: Sequence[str]) -> list[dict[str, str]]:
    """How images refer to the images that neighbours are found for.

    Raises:
        SettingError: one can't be read.
    """
    with fault_of("query_image"):
        for path in paths:
            open_image(path)
        return [file_reference(path, "query_image") for path in paths]


def retrieve(setup: Setup, items: Sequence[Item], images: Sequence[str], settings: RetrievalSettings) -> Retrieved:
    """The task of items whose queries are their prompts or, where there are any, images.

    Raises:
        SettingError: no such embedder, database or index, or they do not fit each other.
    """
    check(settings, images)
    recommended = setup.config.get("sampling", {})
    with fault_of("clip_type"):
        embedder = load_embedder(settings.clip_type or recommended.get("embedder", VIT_L_14))
    found = settings.use_neighbors or bool(images)
    database = find_database(settings.database or recommended.get("database", DATABASE)) if found else None
    if database is not None:
        check_embedder(database, embedder)
    of_prompt = {item.prompt_index: item.inputs for item in items}
    prompts = [] if images else [inputs["prompt"] for inputs in of_prompt.values()]
    with fault_of("clip_type"):
        queries = embedded(embedder, images, prompts)
        cut = embedder.cut(prompts)
    facts: dict[str, Any] = {"embedder": f"{embedder.name} {embedder.identity}"}
    own = None if images or settings.omit_query else queries
    if database is None:
        return Retrieved([*items], Task(Neighbours(context_of(own, None), facts, cut)), None)
    k = settings.knn or recommended.get("knn", KNN)
    facts |= {"database": database.fingerprint, "knn": k, "omit_query": own is None}
    with fault_of("database"):  # a part that is damaged inside
        near = searcher_of(database, settings.searcher)(queries, k)
        task = Task(Neighbours(context_of(own, database.embeddings(near.rows)), facts, cut))
        known = [database.neighbours(*row) for row in zip(*near, strict=True)]
    return Retrieved([with_neighbours(item, known[item.prompt_index]) for item in items], task, database)


def check(settings: RetrievalSettings, images: Sequence[str]) -> None:
    """Raise SettingError for settings of neighbours without any."""
    if settings.use_neighbors or images:
        return
    given = {"omit_query": settings.omit_query, "knn": settings.knn, "searcher": settings.searcher}
    for name, value in given.items():
        if value:
            raise SettingError(
                name, "there are neighbours only with {use_neighbors} or images to search with", "use_neighbors"
            )


def check_embedder(database: Database, embedder: Embedder) -> None:
    """Raise SettingError unless the database's embeddings are comparable with the embedder's."""
    card = database.card
    if card is not None and (card.embedder, card.weights) != (embedder.name, embedder.identity):
        raise SettingError(
            "database",
            f"{database.folder}: made by the embedder {card.embedder} ({card.weights}); the queries are embedded by "
            f"{embedder.name} ({embedder.identity})",
        )


def searcher_of(database: Database, folder: str | None) -> Searcher:
    if folder is None:
        return ExactSearch(database)
    with fault_of("searcher"):
        return open_index(Path(folder), database)


def embedded(embedder: Embedder, images: Sequence[str], texts: Sequence[str]) -> Tensor:
    """The queries, (N, D): images if there are any, else texts; one by one, so that none changes another's digits."""
    if images:
        return torch.cat([embedder.images(embedder.prepared(open_image(path))[None]) for path in images])
    return torch.cat([embedder.texts([text]) for text in texts])


def with_neighbours(item: Item, neighbours: Sequence[Neighbour]) -> Item:
    """The item, whose record says what it was made of."""
    return replace(item, inputs={**item.inputs, "neighbors": [asdict(neighbour) for neighbour in neighbours]})


# Sheets


def save_sheets(runs: Sequence[MethodRun], database: Database, outdir: str | Path) -> None:
    """For each image that was saved, a sheet neighbors/NAME.png of it and its neighbours; those that are there stay."""
    files = [file for run in runs for file in run.files.values()]
    with fault_of("outdir", (OSError,)), fault_of("database", (ValueError,)):
        made = [save_sheet(file, database, Path(outdir) / "neighbors" / file.name) for file in files]
    print(f"{len(made)} sheets with neighbours in {Path(outdir) / 'neighbors'}, {sum(made)} of them made now")


def save_sheet(file: Path, database: Database, path: Path) -> bool:
    """Whether it was not there."""
    image, settings, _ = read_png(file)
    about = {"sheet": "neighbors", "file": file.name, "of": settings}
    if find_png(path, about) is not None:
        return False
    neighbours = [Neighbour(**known) for known in settings["neighbors"]]
    cells = [database.image(neighbour, CELL) or Image.new("RGB", (CELL, CELL), MISSING) for neighbour in neighbours]
    captions = [str(settings.get("prompt", settings.get("query_image", ""))), *map(words, neighbours)]
    shown = ImageOps.pad(image, (CELL, CELL), Image.Resampling.LANCZOS, BACKGROUND)
    save_png(path, grid([shown, *cells], 1 + len(cells), captions), about)
    return True


def words(neighbour: Neighbour) -> str:
    """A neighbour in words."""
    name = neighbour.caption or neighbour.image or f"row {neighbour.row}"
    return f"{neighbour.similarity:.2f} {name}" + (f" ({neighbour.licence})" if neighbour.licence else "")
