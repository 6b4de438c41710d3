"""The folder of one run: its settings, its images, and the proof that they are all there.

    run.json          the run card: protocol, method, weights, versions
    prompts.jsonl     the prompts, in order
    samples/          ID-REPEAT.png
    journal/          a file for each process: a line for each image, with its SHA-256, written before the image
    manifest.jsonl    a line for each image, in order, with its SHA-256; written when all images are there

Any number of processes write into it without talking to each other: each makes its own share, and the one that finds
all images there writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict

from evaluation.protocols.protocol import Amount, Prompt, Side
from ldm.io.files import (
    Schema,
    Seed,
    Text,
    atomic_write,
    clean,
    file_sha256,
    flat,
    json_sha256,
    parse,
    parse_json_lines,
    read_bytes,
    read_json,
    write_file,
    write_json,
)
from ldm.io.images import opened, png_bytes, read_png
from ldm.sampling.generate import Item, Sample, append_line, read_manifest

CARD, PROMPTS, SAMPLES, JOURNAL, MANIFEST = "run.json", "prompts.jsonl", "samples", "journal", "manifest.jsonl"
NPZ = "samples.npz"
MAY_DIFFER = ("name", "metrics", "versions")  # in run cards of one run
SHOWN = 5  # of what differs or is wrong, how much a message names

Card = Mapping[str, Any]


class FolderError(ValueError):
    """A folder that is not what it should be."""


class Asked(Schema):
    """What is needed of a run card's protocol; there is more."""

    model_config = ConfigDict(extra="ignore")

    prompts_sha256: Text
    seed: Seed
    repeats: Amount
    size: Side


class CardFields(Schema):
    """What is needed of a run card, for the run to be continued; there is more."""

    model_config = ConfigDict(extra="ignore")

    protocol: Asked
    protocol_sha256: Text
    plan: Text
    method: dict[str, Any]
    weights: Text
    batch: Amount


def make_items(lines: Sequence[Mapping[str, Any]], seed: int, repeats: int) -> list[Item]:
    """The images of a run. Noise comes from (seed, prompt's id, repeat), wherever the prompt stands in the list."""
    return [
        Item(index, repeat, line, (seed, line["id"], repeat), (seed, line["id"], repeat))
        for index, line in enumerate(lines)
        for repeat in range(repeats)
    ]


def file_name(item: Item) -> str:
    return f"{SAMPLES}/{item.inputs['id']:08d}-{item.sample:03d}.png"


def json_lines(entries: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


def prompt_lines(prompts: Sequence[Prompt]) -> bytes:
    """The content of prompts.jsonl."""
    return json_lines([prompt.line() for prompt in prompts])


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(prompt_lines(prompts)).hexdigest()


def differences(there: Card, given: Card) -> list[str]:
    """The fields in which two run cards are of different runs, with both values."""
    a, b = (
        {key: json.dumps(value, ensure_ascii=False) for key, value in flat(decisive(card)).items()}
        for card in (there, given)
    )
    both = ((key, a.get(key, "nothing"), b.get(key, "nothing")) for key in dict.fromkeys([*a, *b]))
    return [f"{key} ({one} there, {other} given)" for key, one, other in both if one != other]


def some(names: Sequence[str]) -> str:
    return "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class RunFolder:
    """The folder of a run, for one of its processes; a `Store` for `ldm.sampling.generate.fill`.
    Raises FolderError: no run card, or not one of ours; other prompts than the card's."""

    def __init__(self, path: Path, process: str = "0-of-1") -> None:
        self.path = path
        self.journal = path / JOURNAL / f"{process}.jsonl"
        self.card = read_card(path)
        try:
            content = read_bytes(path / PROMPTS)
        except OSError as error:
            raise FolderError(f"{path / PROMPTS}: {error.strerror}") from error
        if self.card["protocol"]["prompts_sha256"] != hashlib.sha256(content).hexdigest():
            raise FolderError(f"{path / PROMPTS}: not the prompts of {CARD}; the file was changed")
        lines = [line for _, line in parse_json_lines(content.decode())]
        self._refused: set[str] = set()
        self.items = make_items(lines, self.card["protocol"]["seed"], self.card["protocol"]["repeats"])
        self.names = [file_name(item) for item in self.items]
        self.settings = {
            "protocol": self.card["protocol_sha256"],
            "run": json_sha256(decisive(self.card)),
            "weights": self.card["weights"],
            "plan": self.card["plan"],
            **self.card["method"],
        }

    @staticmethod
    def open(path: Path, card: Card, prompts: Sequence[Prompt], process: str = "0-of-1") -> RunFolder:
        """Begin a run, or go on with it. Raises FolderError: another run is there; the message names the fields that
        differ. Or images without a run card."""
        if not (path / CARD).is_file():
            if (path / SAMPLES).exists():
                raise FolderError(
                    f"{path} has {SAMPLES}/ but no {CARD}: images that are not from an evaluation; "
                    f"choose another folder"
                )
            write_file(path / PROMPTS, prompt_lines(prompts))
            write_json(path / CARD, card, keep=True)
        there = read_card(path)
        if differ := differences(there, card):
            raise FolderError(f"{path} holds another run; different: {some(differ)}; choose another folder")
        (path / JOURNAL).mkdir(exist_ok=True)
        found = RunFolder(path, process)
        found._clean()
        return found

    # Store

    def find(self, item: Item) -> Sample | None:
        name = file_name(item)
        path = self.path / name
        if self._proven(name) is None:
            self._refused |= {name} if path.exists() else set()
            return None
        return Sample(item, None, path, False, {})

    def save(self, item: Item, image: Image.Image, run: Mapping[str, Any]) -> Sample:
        name = file_name(item)
        path = self.path / name
        # How long it took is not in the file: the same image must be the same bytes.
        content = png_bytes(image, item.settings() | self.settings)
        self._list(name, hashlib.sha256(content).hexdigest(), run)
        write_file(path, content)
        return Sample(item, image, path, True, run, name in self._refused)

    def _proven(self, name: str) -> str | None:
        """The hash of an image, if a process listed it when it made the image; else None."""
        if name not in self._listed or not (self.path / name).is_file():
            return None
        sha256 = file_sha256(self.path / name)
        return sha256 if sha256 in self._listed[name] else None

    @cached_property
    def _listed(self) -> dict[str, set[str]]:
        """For each file the hashes that processes have listed so far."""
        listed: dict[str, set[str]] = {}
        for journal in sorted((self.path / JOURNAL).glob("*.jsonl")):
            for entry in read_manifest(journal):
                listed.setdefault(entry["file"], set()).add(str(entry.get("sha256")))
        return listed

    def _list(self, name: str, sha256: str, run: Mapping[str, Any]) -> None:
        append_line(self.journal, {"file": name, "sha256": sha256, **run})
        self._listed.setdefault(name, set()).add(sha256)

    # The whole run

    def finish(self) -> bool:
        """Write the manifest if every image is there; returns whether it is."""
        self.__dict__.pop("_listed", None)  # the other processes' lines of the meantime
        hashes = [self._proven(name) for name in self.names] if {*self.names} <= self._listed.keys() else [None]
        if None in hashes:
            return False
        images = zip(self.names, hashes, self.items, strict=True)
        content = json_lines([{"file": name, "sha256": sha256, **item.settings()} for name, sha256, item in images])
        if not (self.path / MANIFEST).is_file() or (self.path / MANIFEST).read_bytes() != content:
            write_file(self.path / MANIFEST, content)
        self._clean()
        return True

    def _clean(self) -> None:
        """Delete what killed processes left."""
        for folder in (self.path, self.path / SAMPLES):
            clean(folder)

    def unfinished(self) -> str:
        """How far a run is that is not finished, in words."""
        proven = {name for name in self.names if self._proven(name)}
        others = [name for name in self.names if name not in proven and (self.path / name).exists()]
        text = f"{len(proven)} of {len(self.items)} images there"
        if not others:
            return text
        return f"{text}; not as they were made: {some(others)}; the part that made them makes them again"

    def faults(self) -> list[str]:
        """What is wrong with the folder, everything read again: nothing if each image is there, whole and once."""
        if not (self.path / MANIFEST).is_file():
            missing = sum(not (self.path / name).is_file() for name in self.names)
            return [f"unfinished: no {MANIFEST}, {missing} of {len(self.items)} images missing"]
        lines = read_manifest(self.path / MANIFEST)
        listed = {line.get("file"): line.get("sha256") for line in lines}
        same = [line.get("file") for line in lines] == self.names
        faults = [] if same else [f"{MANIFEST}: not a line for each image"]
        for item, name in zip(self.items, self.names, strict=True):
            faults += self._faults_of(item, name, listed.get(name))
        strays = {
            f"{SAMPLES}/{path.name}"
            for path in (self.path / SAMPLES).iterdir()
            if not (path.is_dir() and path.name.startswith("."))
        } - {*self.names}
        if (self.path / NPZ).exists() and not self._npz_is_whole():
            faults.append(f"{NPZ}: not all images of this run; delete it, --npz writes it anew")
        return faults + [f"{stray}: no image of this run" for stray in sorted(strays)]

    def _faults_of(self, item: Item, name: str, sha256: str | None) -> list[str]:
        path = self.path / name
        if not path.is_file():
            return [f"{name}: missing"]
        if file_sha256(path) != sha256:
            return [f"{name}: not the file that {MANIFEST} lists"]
        found = read_png(path)
        if found is None or found[1] != item.settings() | self.settings:
            return [f"{name}: not a whole image of this run"]
        return []

    def write_npz(self) -> Path:
        """All images as `arr_0`, (N, H, W, 3) uint8, in the order of the manifest; one in memory at a time."""
        path = self.path / NPZ
        if self._npz_is_whole():
            return path
        side = self.card["protocol"]["size"]
        with atomic_write(path) as temporary:
            with (
                zipfile.ZipFile(temporary, "w") as archive,
                archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream,
            ):
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.items), side, side, 3)}
                np.lib.format.write_array_header_1_0(stream, header)
                for name in self.names:
                    with opened(self.path / name) as image:
                        stream.write(np.asarray(image).tobytes())
            self._list(self._npz_of(), file_sha256(temporary), {})
        return path

    def _npz_of(self) -> str:
        """The name of this array in the journals."""
        return f"{NPZ} of {file_sha256(self.path / MANIFEST)}"

    def _npz_is_whole(self) -> bool:
        path = self.path / NPZ
        return path.is_file() and file_sha256(path) in self._listed.get(self._npz_of(), ())


def decisive(card: Card) -> dict[str, Any]:
    """What the images depend on."""
    return {name: value for name, value in card.items() if name not in MAY_DIFFER}


def read_card(folder: Path) -> dict[str, Any]:
    """The run card of a folder. Raises FolderError: there is none, or it was changed."""
    path = folder / CARD
    try:
        card = read_json(path)
        parse(CardFields, card)
        if json_sha256(card["protocol"]) != card["protocol_sha256"]:
            raise FolderError(f"{path}: its protocol is not the one that its hash names; the file was changed")
        return card
    except OSError as error:
        raise FolderError(f"{path}: {error.strerror}; expected the folder of a run") from error
    except FolderError:
        raise
    except ValueError as error:
        raise FolderError(f"{path}: not a run card: {' '.join(str(error).split())}") from error
