"""A run over many images that can be stopped, resumed and spread over machines.

What is to be made is a list of items; an image's file is named from its item and from everything it depends
on. So a second run finds what is there, another run does not touch it, and the order of the work, the batches
and the number of machines change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.io.files import FileError, add_line, appending, clean, parse_json, read_bytes
from ldm.io.images import find_png, parameters, save_png

Settings = Mapping[str, Any]
Make = Callable[[Sequence["Item"]], tuple[Sequence[Image.Image], Settings]]
WORDS = 40  # characters of a file's name that say what the image is of


@dataclass(frozen=True)
class Item:
    """One image to make.

    prompt_index, sample: which inputs, and which image of them; both from 0.
    inputs: what the image is of, as JSON values, the first of which tells a person: {"prompt": text}, {"class": 207}.
    seed:  names the image's own noise, see `ldm.models.diffusion.schedule.ImageNoise`.
    start: names the noise that it begins from; `seed` unless images share their beginning.
    """

    prompt_index: int
    sample: int
    inputs: Settings
    seed: tuple[int, ...]
    start: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        """The item as JSON values."""
        return {
            **self.inputs,
            "prompt_index": self.prompt_index,
            "sample": self.sample,
            "seed": list(self.seed),
            "start": list(self.start),
        }

    @property
    def caption(self) -> str:
        """What tells a person: a text as it is, anything else after its name, as in "class 207"."""
        name, value = next(iter(self.inputs.items()), ("", ""))
        return value if isinstance(value, str) else f"{name} {value}"


@dataclass(frozen=True)
class Sample:
    """One finished image.

    image: None if it was found by a store that does not read what it finds.
    path:  its file; None if it was not to be saved.
    fresh: made now, not found.
    run:   how it was made: seconds, device, ...
    replaced: a file was in its place that is not the image that was made: damaged, changed, or without a proof.
    """

    item: Item
    image: Image.Image | None
    path: Path | None
    fresh: bool
    run: Settings
    replaced: bool = False


def make_items(
    inputs: Sequence[Settings], samples: int, seed: int, share_start: int | None = None, by_position: bool = False
) -> list[Item]:
    """`samples` images of each of the inputs, with seeds that do not depend on what else is in the list.

    A seed is (seed, hash of the inputs, how often that came before in the list, sample's index).

    Args:
        inputs: see `Item`.
        share_start: begin sample k of all inputs from the same noise as sample k modulo this number.
        by_position: seeds are (seed, index of the inputs, index of the sample).
    """
    items, before = [], Counter()
    for p, one in enumerate(inputs):
        content = inputs_seed(one)
        named = (p,) if by_position else (*content, before[content])
        before[content] += 1
        for s in range(samples):
            own = (seed, *named, s)
            items.append(Item(p, s, one, own, own if share_start is None else (seed, s % share_start)))
    return items


def inputs_seed(inputs: Settings) -> tuple[int, ...]:
    """64 bits of the hash of an image's inputs, as two integers 0..2^32-1; nothing if there are none.

    Only the first of the values counts: a prompt, a class, boxes; of a file the content, not the name.
    """
    if not inputs:
        return ()
    name, value = next(iter(inputs.items()))
    text = json.dumps(inputs.get(f"{name}_sha256", value))
    number = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(number[:4], "big"), int.from_bytes(number[4:8], "big")


def prompt_items(
    prompts: Sequence[str], samples: int, seed: int, share_start: int | None = None, by_position: bool = False
) -> list[Item]:
    """`samples` images of each prompt; see `make_items`."""
    return make_items([{"prompt": prompt} for prompt in prompts], samples, seed, share_start, by_position)


def first_words(text: str) -> str:
    """The beginning of a text as part of a file's name: letters and digits of any script, all else one hyphen.

    At most WORDS characters, whole words where there is more than one. Empty for a text without letters and digits.
    """
    # Letters, the marks on them, and numbers; composed, as every file system keeps them.
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in unicodedata.normalize("NFC", text.lower()))
    words = "-".join(word for word in "".join(kept).split() if any(map(str.isalnum, word)))
    return words if len(words) <= WORDS else words[: WORDS + 1].rpartition("-")[0] or words[:WORDS]


def digest(settings: Settings) -> str:
    """Eight hexadecimal digits that stand for the settings in a file's name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Store(Protocol):
    """Where finished images are kept."""

    def find(self, item: Item) -> Sample | None:
        """The item's image, if an earlier run left it."""

    def save(self, item: Item, image: Image.Image, run: Settings) -> Sample:
        """Keep an image; it is there whole or not at all."""


def generate(
    items: Sequence[Item],
    make: Make,
    settings: Settings,
    outdir: str | Path | None,
    batch: int = 1,
    rank: int = 0,
    world_size: int = 1,
    again: bool = False,
) -> Iterator[Sample]:
    """Yield this rank's images: first those already there, then the missing ones as they are made.

    Args:
        items, make, batch, rank, world_size: see `fill`.
        settings: what the images depend on beside their item: model, sampler, ... (JSON values).
        outdir: gets samples/WORDS-SEED-INPUTS-SAMPLE-DIGEST.png (see `first_words`) and one line per image in
            manifest.jsonl; None = images are not saved.
        again: make those that are already there as well.

    Raises:
        ValueError: see `fill`.
    """
    store = _Unsaved() if outdir is None else _Folder(Path(outdir), settings, items if again else ())
    return fill(store, items, make, batch, rank, world_size)


def fill(
    store: Store, items: Sequence[Item], make: Make, batch: int = 1, rank: int = 0, world_size: int = 1
) -> Iterator[Sample]:
    """Yield this rank's images: first those that the store has, then the missing ones as they are made.

    Batches are cut from the whole list before anything else is known. One of which an image is missing is made again
    as a whole, and only the missing are saved: the last digits of what a network computes depend on what else is in
    the batch, and so neither a stopped run nor the number of machines changes them.

    Args:
        items: the images of the whole run, the same list on every rank.
        make: makes the images of a batch of items; also returns how (JSON values, for each of them).
        batch: most items per call of `make`.
        rank, world_size: this is machine `rank` of 0..world_size-1 and makes every world_size-th batch.

    Raises:
        ValueError: batch < 1, or rank and world_size do not fit.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 image; got {batch}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..world_size-1; got rank {rank}, world_size {world_size}")
    unfinished = []
    for first in range(rank * batch, len(items), world_size * batch):
        chunk = items[first : first + batch]
        found = [store.find(item) for item in chunk]
        yield from (made for made in found if made is not None)
        if missing := [item for item, made in zip(chunk, found, strict=True) if made is None]:
            unfinished.append((chunk, missing))
    for chunk, missing in unfinished:
        images, run = make(chunk)
        for item, image in zip(chunk, images, strict=True):
            if item in missing:
                yield store.save(item, image, run)


class _Unsaved:
    """Keeps nothing."""

    def find(self, item: Item) -> None:
        return None

    def save(self, item: Item, image: Image.Image, run: Settings) -> Sample:
        return Sample(item, image, None, True, run)


class _Folder:
    """The images of one or more runs with their manifest.

    again: items whose images are to be made again. Until that is done they have no line in the manifest, as after a
        stop between an image and its line.
    """

    def __init__(self, outdir: Path, settings: Settings, again: Sequence[Item] = ()):
        self.outdir, self.settings = outdir, dict(settings)
        self.again = {self._place(item)[0].relative_to(outdir).as_posix() for item in again}
        self.manifest = Manifest(outdir / "manifest.jsonl")
        self.manifest.remove(self.again)
        self.refused: set[Path] = set()
        for folder in (outdir, outdir / "samples"):
            clean(folder)

    def find(self, item: Item) -> Sample | None:
        path, settings = self._place(item)
        if path.relative_to(self.outdir).as_posix() in self.again:
            return None
        found = find_png(path, settings)
        if found is None:
            self.refused |= {path} if path.exists() else set()
            return None
        image, run = found
        self._list(path, settings, run)  # a run stopped between the image and its line
        return Sample(item, image, path, False, run)

    def save(self, item: Item, image: Image.Image, run: Settings) -> Sample:
        path, settings = self._place(item)
        run = save_png(path, image, settings, run, parameters(settings))
        self._list(path, settings, run)
        return Sample(item, image, path, True, run, path in self.refused)

    def _place(self, item: Item) -> tuple[Path, dict[str, Any]]:
        settings = item.settings() | self.settings
        place = f"{item.seed[0]}-{item.prompt_index:05d}-{item.sample:03d}-{digest(settings)}"
        name = "-".join(filter(None, (first_words(item.caption), place)))
        return self.outdir / "samples" / f"{name}.png", settings

    def _list(self, path: Path, settings: Settings, run: Settings) -> None:
        self.manifest.add(path.relative_to(self.outdir).as_posix(), {**settings, **run})


class Manifest:
    """A file of JSON lines, one for each image, however many processes add to it.

    Raises:
        OSError: it can't be read.
    """

    def __init__(self, path: Path):
        self.path, self.seen = path, 0  # bytes of it that `add` has seen
        self.files = {entry["file"] for entry in read_manifest(path)}

    def add(self, file: str, entry: Settings) -> None:
        """Add the image's line, unless there is one."""
        if file in self.files:
            return
        with appending(self.path) as stream:
            # Shorter than it was: another process has removed lines.
            stream.seek(self.seen if self.seen <= stream.seek(0, os.SEEK_END) else 0)
            self.files |= {entry["file"] for entry in _entries(stream.read())}
            if file not in self.files:
                add_line(stream, json.dumps({"file": file, **entry}).encode())
                self.files.add(file)
            self.seen = stream.seek(0, os.SEEK_END)

    def remove(self, files: Set[str]) -> None:
        """Remove the lines of images. What a kill loses of the others is added when those images are found."""
        if not files & self.files:
            return
        with appending(self.path) as stream:
            stream.seek(0)
            kept = [entry for entry in _entries(stream.read()) if entry["file"] not in files]
            stream.truncate(0)
            stream.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self.files, self.seen = {entry["file"] for entry in kept}, 0


def append_line(path: Path, entry: Settings) -> None:
    """Add a line to a file of JSON lines."""
    with appending(path) as stream:
        add_line(stream, json.dumps(entry).encode())


def read_manifest(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a manifest, which name a file each; what a crash left of a line is skipped. No file, no entries.

    Raises:
        OSError: it can't be read.
    """
    return _entries(read_bytes(path)) if Path(path).exists() else []


def _entries(content: bytes) -> list[dict[str, Any]]:
    entries = []
    for line in content.split(b"\n"):
        with suppress(FileError, UnicodeDecodeError):
            entries.append(parse_json(line.decode()))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file"), str)]
