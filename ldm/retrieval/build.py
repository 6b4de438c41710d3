"""Making a database of a folder of images: in parts, by several processes; a later run goes on with what is there."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.data.captions import captions_below
from ldm.io.arrays import save_arrays
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import FileError, atomic_write, file_sha256, write_file, write_json
from ldm.io.images import files_below, fit, open_image
from ldm.retrieval.database import CARD, THUMBNAIL, Card, Database, open_database, read_card
from ldm.retrieval.embedders import Embedder, load_embedder
from ldm.retrieval.part import EMBEDDING, LENGTH, Part, number_of

LICENCES = ("LICENSE*", "LICENCE*", "COPYING*")  # names of files that say under what terms images may be used


@dataclass(frozen=True)
class BuildSettings:
    """How a database is made.

    folder: of the images. out: of the database.
    embedder: see `load_embedder`.
    rows: images of a part, which is made as a whole.
    processes: that make parts side by side; they change nothing else.
    batch: images that are embedded together.
    thumbnails: side of the small copies that are kept, in pixels; 0 = none, the images' paths are enough.
    licence: of all images; None = the name of the nearest file LICENSE above each, if there is one.
    """

    folder: Path
    out: Path
    embedder: str
    rows: int = 1024
    processes: int = 1
    batch: int = 32
    thumbnails: int = 0
    licence: str | None = None


@dataclass(frozen=True)
class Entry:
    """What is known of an image: its path below the folder, its content, whatever is said of it."""

    image: str
    sha256: str
    caption: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Built:
    """A finished database.

    found: images in the folder; copies: of them with the content of another; before: rows of earlier runs.
    gone: rows whose image is no longer in the folder.
    left_out: images that can't be read, with the reason.
    """

    database: Database
    found: int
    copies: int
    before: int
    gone: int
    left_out: Sequence[str]


def build(settings: BuildSettings) -> Built:
    """Embed the images of a folder and its subfolders that the database does not have yet.

    Raises:
        SettingError: `folder` has no images; `out` is a database of another embedder or folder; `embedder`: there is
            none of that name, or its weights are missing.
    """
    with fault_of("folder"):
        paths = files_below(settings.folder)
        captions = captions_below(settings.folder, paths)
    with fault_of("embedder"):
        embedder = load_embedder(settings.embedder)
        card = Card(embedder=embedder.name, weights=embedder.identity, folder=str(settings.folder.resolve()))
    with fault_of("out"):
        before = parts_of(settings.out, card)
        known = {entry["sha256"] for part in before for entry in part.entries}
    entries: dict[str, Entry] = {}
    for path in tqdm(paths, "reading", unit="image", disable=None):
        name, sha256 = path.relative_to(settings.folder).as_posix(), file_sha256(path)
        caption = next(iter(captions.get(path, ())), "")
        entries.setdefault(sha256, Entry(name, sha256, caption, licence_of(path, settings)))
    new = [entry for sha256, entry in entries.items() if sha256 not in known]
    write_json(settings.out / CARD, card.model_dump())
    left_out = make_parts(settings, new, {number_of(part.path) for part in before})
    parts = [part.path.name for part in parts_of(settings.out, card)]
    if not parts:
        raise SettingError("folder", f"{settings.folder}: none of its {len(paths)} images can be read: {left_out[0]}")
    write_json(settings.out / CARD, card.model_copy(update={"parts": parts}).model_dump())
    copies, gone = len(paths) - len(entries), len(known - {*entries})
    return Built(open_database(settings.out), len(paths), copies, len(known), gone, left_out)


def parts_of(out: Path, card: Card) -> list[Part]:
    """The parts that an earlier run left.

    Raises:
        ValueError: they are of another embedder, or of another folder, or nobody says of what.
    """
    found = read_card(out)
    paths = sorted(out.glob("*.npz"), key=number_of)
    if found is None and paths:
        raise ValueError(f"{out}: has parts but no {CARD}; expected a new folder, or a database of this script")
    for name in ("embedder", "weights", "folder"):
        if found is not None and getattr(found, name) != getattr(card, name):
            raise ValueError(f"{out}: its {name} is {getattr(found, name)}; got {getattr(card, name)}")
    return [Part.open(path) for path in paths]


def licence_of(path: Path, settings: BuildSettings) -> str:
    return _licence_in(path.parent, settings.folder) if settings.licence is None else settings.licence


@cache
def _licence_in(folder: Path, root: Path) -> str:
    """The nearest file with terms in the folder or above it, by its path below the root; "" if there is none."""
    found = sorted(path for pattern in LICENCES for path in folder.glob(pattern) if path.is_file())
    if found:
        return found[0].relative_to(root).as_posix()
    return "" if folder == root else _licence_in(folder.parent, root)


def make_parts(settings: BuildSettings, entries: Sequence[Entry], taken: set[int]) -> list[str]:
    """Make the parts of these images, under numbers that are not taken; what is left out, with the reason."""
    numbers = (number for number in count(1) if number not in taken)
    jobs = [(next(numbers), entries[i : i + settings.rows]) for i in range(0, len(entries), settings.rows)]
    left_out = []
    with tqdm(total=len(entries), desc="embedding", unit="image", disable=None) as bar, _workers(settings) as each:
        for made, refused in each(partial(make_part, settings), jobs):
            bar.update(made + len(refused))
            left_out += refused
    return left_out


@contextmanager
def _workers(settings: BuildSettings) -> Iterator[Any]:
    """What calls a function for each job: `map`, or that of several processes."""
    if settings.processes == 1:
        yield map
        return
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.processes, fresh, one_thread) as pool:
        yield pool.map


def one_thread() -> None:
    torch.set_num_threads(1)


def make_part(settings: BuildSettings, job: tuple[int, Sequence[Entry]]) -> tuple[int, list[str]]:
    """Embed the images of one part and write it; how many rows it has, and what is left out."""
    number, entries = job
    embedder, small = load_embedder(settings.embedder), settings.thumbnails
    kept: list[Entry] = []
    left_out: list[str] = []
    arrays: dict[str, list[np.ndarray]] = {EMBEDDING: [], "patch_coords": [], THUMBNAIL: []}
    for i in range(0, len(entries), settings.batch):
        images: list[Image.Image] = []
        for entry in entries[i : i + settings.batch]:
            try:
                images.append(open_image(settings.folder / entry.image))
                kept.append(entry)
            except (OSError, FileError, ValueError) as error:
                left_out.append(str(error))
        if images:
            arrays[EMBEDDING].append(embedded(embedder, images))
            arrays["patch_coords"].append(np.array([(0, 0, *image.size) for image in images]))
            arrays[THUMBNAIL] += [np.stack([np.asarray(fit(image, small, small)) for image in images])] if small else []
    if kept:
        joined = {name: np.concatenate(values) for name, values in arrays.items() if values}
        write_part(settings.out, number, kept, joined)
    return len(kept), left_out


def embedded(embedder: Embedder, images: Sequence[Image.Image]) -> np.ndarray:
    """(B, D) float32."""
    return embedder.images(torch.stack([embedder.prepared(image) for image in images])).float().numpy()


def write_part(out: Path, number: int, entries: Sequence[Entry], arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays and what is known of the images; the part is there when its arrays are."""
    embeddings = arrays[EMBEDDING]
    path = out / f"{len(embeddings)}x{embeddings.shape[1]}-part_{number}.npz"
    lines = "".join(json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in entries)
    write_file(path.with_suffix(".jsonl"), lines)
    ids = np.array([int(entry.sha256[:15], 16) for entry in entries])
    with atomic_write(path) as temporary:
        save_arrays(temporary, {**arrays, "img_id": ids, LENGTH: np.linalg.norm(embeddings, axis=1)})
