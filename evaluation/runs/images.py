"""The images that are measured: a folder of files or an array in a file, one image in memory at a time; how they were
made, and the prompts that they were made from; the real images of a protocol."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.protocols.protocol import Protocol, coco_images, fits, load_protocol
from ldm.io.arrays import Header, open_array
from ldm.io.errors import fault_of, one_line, some
from ldm.io.files import FileError, file_sha256, parse_json, parse_json_lines, read_json, read_lines, read_text
from ldm.io.images import MOST_PIXELS, SUFFIXES, from_pil, open_image, opened

ARRAY = "arr_0"  # the images' name in the files of the ADM suite
RUN_CARD = "run.json"
BESIDE = (".json", ".jsonl", ".npz", ".npy")  # what may stand beside images: how they were made, or their array
PLAN = ("keys", "noise_weight", "noise_below", "noise_order")
SHOWN = 3  # of many bad images, how many a message names
LONGEST = 400  # characters of another library's message

T = TypeVar("T")


class ImageError(ValueError):
    """Images or statistics that can't be measured."""


@contextmanager
def reading(path: str | Path, problem: str, kind: type[ValueError] = ImageError) -> Iterator[None]:
    """Whatever is raised inside becomes an error of this kind that names the file: a damaged file can fail in any
    way."""
    try:
        yield
    except kind:
        raise
    except Exception as error:
        raise kind(f"{path}: {problem}: {one_line(error)[:LONGEST]}") from error


class Images(ABC):
    """N images in a fixed order."""

    path: Path  # where they are
    names: Sequence[str]  # of each image
    files: Sequence[Path] = ()  # of each image; none for an array
    left_out: Sequence[str] = ()  # other files in a folder, neither images by their endings nor telling of images

    @abstractmethod
    def __iter__(self) -> Iterator[Tensor]:
        """Each image (3, H, W) in [-1, 1]. Raises ImageError: one can't be read."""

    @abstractmethod
    def check(self, one_size: bool) -> None:
        """Check, without decoding all, that the images can be measured: errors come before hours of work. Raises
        ImageError: damaged images; or with `one_size`, as a model's have, several sizes."""

    @abstractmethod
    def sha256(self) -> str:
        """SHA-256 of the content of all images, whatever they are called."""

    @abstractmethod
    def subset(self, order: Sequence[int]) -> Images:
        """Some of the images, in this order."""

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the images were made, as far as it is known: plan, seeds, weights, ... as JSON values.
        Raises ImageError: a damaged run card."""
        for card in (self.path / RUN_CARD, self.path.parent / RUN_CARD):
            if card.is_file():
                with reading(card, "not a run card"):
                    return {"plan": None, "seeds": None, "weights": None, **read_json(card), "stated_by": RUN_CARD}
        return common_settings([settings_of(file) for file in self.files])


# A folder of images, an npz file (arr_0) or npy file of images uint8 (N, H, W, 3), or opened images.
Source = str | Path | Images


class ImageFolder(Images):
    """All images in a folder and its subfolders, by name. Raises ImageError: no such folder, or no images in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ImageError(f"{path}: no such folder; expected one with images, or an npz file")
        files = ((file, file.relative_to(self.path)) for file in sorted(self.path.rglob("*")) if not file.is_dir())
        # What begins with a dot is an image that is being written, or a folder of some tool's copies.
        names = {str(name): file for file, name in files if not any(part.startswith(".") for part in name.parts)}
        found = {name: file for name, file in names.items() if file.suffix.lower() in SUFFIXES}
        if not found:
            raise ImageError(f"{path}: an empty folder: no {', '.join(SUFFIXES)} files in it")
        self.names, self.files = [*found], [*found.values()]
        self.left_out = [name for name in names if Path(name).suffix.lower() not in (*SUFFIXES, *BESIDE)]

    def __iter__(self) -> Iterator[Tensor]:
        for file in self.files:
            try:
                yield from_pil(open_image(file))
            except (ValueError, OSError) as error:
                raise ImageError(one_line(error)) from error

    def check(self, one_size: bool) -> None:
        sizes: dict[tuple[int, int], str] = {}
        damaged = []
        for file, name in zip(self.files, self.names, strict=True):
            try:
                with reading(file, "can't be read"):
                    sizes.setdefault(whole_image(file), name)
            except ImageError:
                damaged.append(name)
        if damaged:
            more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
            what = f"{len(damaged)} of {len(self.files)} files are no images, or damaged"
            raise ImageError(f"{self.path}: {what}: {', '.join(damaged[:SHOWN])}{more}")
        if one_size and len(sizes) > 1:
            found = ", ".join(f"{w} x {h} ({name})" for (w, h), name in list(sizes.items())[:SHOWN])
            raise ImageError(f"{self.path}: images of {len(sizes)} sizes, expected one: {found}")

    def sha256(self) -> str:
        return file_sha256(*self.files)

    def keys(self) -> list[str]:
        """What tells each image from the others in every run: its noise and conditioning, if they are in the file, else
        its name."""
        settings = [settings_of(file) for file in self.files]
        if any(s is None or not {"seed", "start"} <= s.keys() for s in settings):
            return list(self.names)
        return [json.dumps([s["seed"], s["start"], next(iter(s.values()))]) for s in settings]

    def subset(self, order: Sequence[int]) -> ImageFolder:
        part = copy(self)
        part.__dict__.pop("provenance", None)
        part.files, part.names = ([of[i] for i in order] for of in (self.files, self.names))
        return part


def whole_image(file: Path) -> tuple[int, int]:
    """Width and height of an image file, of which all has been read."""
    with opened(file) as image:
        size = image.size
        if image.format == "PNG":
            image.verify()  # by its checksums
        else:
            image.draft("L", (1, 1))  # an eighth of a JPEG's size: all of it is read, little is computed
            image.load()
    return size


class ImageArray(Images):
    """Images in an array uint8 (N, H, W, 3): `arr_0` of an npz file, read piece by piece, or an npy file. Raises
    ImageError: no such file, or no such array in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as (_, header):
            self.shape = header.shape
        self.rows: Sequence[int] = range(self.shape[0])

    @property
    def names(self) -> list[str]:
        return [str(row) for row in self.rows]

    def subset(self, order: Sequence[int]) -> ImageArray:
        if not order:
            raise ImageError(f"{self.path}: none of its {self.shape[0]} images is asked for")
        part = copy(self)
        part.rows = [self.rows[place] for place in order]
        return part

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], Header]]:
        with reading(self.path, "can't be read"), open_array(self.path, ARRAY) as (stream, header):
            shape = header.shape
            if len(shape) != 4 or shape[3] != 3 or header.dtype != np.uint8 or header.fortran or not all(shape):
                raise ImageError(f"{self.path}: expected images uint8 (N, H, W, 3), N > 0; got {header.dtype} {shape}")
            if shape[1] * shape[2] > MOST_PIXELS:
                raise ImageError(f"{self.path}: images of more than {MOST_PIXELS} pixels: {shape}")
            yield stream, header

    def __iter__(self) -> Iterator[Tensor]:
        for levels in self._levels():
            yield torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def _levels(self) -> Iterator[np.ndarray]:
        n, *shape = self.shape
        size = math.prod(shape)
        with self._open() as (stream, header):
            for row in self.rows:
                stream.seek(header.start + row * size)
                levels = stream.read(size)
                if len(levels) < size:
                    raise ImageError(f"{self.path}: cut off: image {row} of {n} is not all there")
                yield np.frombuffer(levels, np.uint8).reshape(shape)

    def check(self, one_size: bool) -> None:
        for _ in self:
            pass

    def sha256(self) -> str:
        if self.rows == range(self.shape[0]):
            return file_sha256(self.path)
        digest = hashlib.sha256()
        for levels in self._levels():
            digest.update(levels)
        return digest.hexdigest()


def open_images(path: str | Path) -> Images:
    """A folder, or an npz or npy file. Raises ImageError: see `ImageFolder` and `ImageArray`."""
    return ImageArray(path) if Path(path).suffix in (".npz", ".npy") else ImageFolder(path)


def open_samples(samples: Source) -> Images:
    """Images that can be measured: a path is opened and checked, so that errors come before the work; images are
    returned as they are. Raises ImageError: see `open_images` and `Images`."""
    if isinstance(samples, str | Path):
        samples = open_images(samples)
        samples.check(one_size=True)
    _ = samples.provenance  # is needed anyway, and here a damaged run card is found
    return samples


def open_with_prompts(samples: Source, prompts: str | Path | Sequence[str] | None) -> tuple[Images, list[str]]:
    """Images that can be measured, and the prompt of each. Raises SettingError: `samples`: see `open_samples`;
    `prompts`: see `prompts_of`."""
    with fault_of("samples"):
        images = open_samples(samples)
    with fault_of("prompts"):
        return images, prompts_of(images, prompts)


def batched(items: Iterable[T], total: int, size: int, label: str, unit: str = "image") -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter. With a progress bar."""
    left = iter(tqdm(items, total=total, desc=label, unit=unit, disable=None))
    while part := list(islice(left, size)):
        yield part


def left_out_warnings(images: Images) -> list[str]:
    """A warning, if there are files beside the images of a folder."""
    left, total = images.left_out, len(images.left_out) + len(images.names)
    what = f"{len(left)} of {total} files are left out, since their names do not end in {', '.join(SUFFIXES)}"
    return [f"{images.path}: {what}{some(left, SHOWN)}"] if left else []


# How images were made


def image_warnings(images: Images) -> list[str]:
    """Warnings, if there are other files beside the images, or if the run that made the images was to make more."""
    expected = images.provenance.get("images", images.provenance.get("pictures"))  # as cards of older runs say
    if type(expected) is not int or expected == len(images.names):
        return left_out_warnings(images)
    what = f"{len(images.names)} images of a run of {expected}"
    return [*left_out_warnings(images), f"{images.path}: {what}: it is not finished, or not all of it is here"]


def settings_of(file: Path) -> dict[str, Any] | None:
    """The settings in a PNG of ours, without decoding it; None if there are none."""
    try:
        with opened(file) as image:
            settings = parse_json(image.info["settings"])
    except (FileError, OSError):
        return None
    return settings if isinstance(settings, dict) else None


def common_settings(settings: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """What all images have in common; of seeds, which every image has its own, the number they come from."""
    if not settings or None in settings:
        return {"plan": None, "seeds": None, "weights": None, "stated_by": None}
    same = {key: value for key, value in settings[0].items() if key not in ("prompt_index", "sample", "seed", "start")}
    same = {key: value for key, value in same.items() if all(other.get(key, ...) == value for other in settings)}
    plan = {key: same.pop(key) for key in PLAN if key in same} or None
    seeds = sorted({s["seed"][0] for s in settings if s.get("seed")}) or None
    weights = same.pop("weights", None)
    return {"plan": plan, "seeds": seeds, "weights": weights, **same, "stated_by": "settings in the images"}


# The prompts that images were made from

FILE_KEYS, TEXT_KEYS = ("file", "file_name", "image"), ("prompt", "caption", "text")


def prompts_of(images: Images, prompts: str | Path | Sequence[str] | None) -> list[str]:
    """The prompt of each image, in their order.

    Args:
        prompts: a prompt per image, in their order; or a file: text with a prompt per line in the order of the images;
            JSON lines with a file and a prompt each (such as manifest.jsonl); a JSON object file -> prompt. Its file
            names are paths in the images' folder, or names that fit one image only. None = what is stored in the
            images.

    Raises ImageError: no such file, images without a prompt, a file named twice, a name that fits several images, or
    another number of prompts than of images.
    """
    if prompts is None:
        stored = [(settings_of(file) or {}).get("prompt") for file in images.files]
        if not stored or None in stored:
            raise ImageError(f"{images.path}: images that don't state their prompt; name a file with the prompts")
        return stored
    where, expected = "", "as many"
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        with reading(path, "not prompts"):
            if path.suffix == ".json":
                return matched(from_json(read_json(path, unrepeated)), images, path)
            if path.suffix == ".jsonl":
                return matched(from_json([entry for _, entry in parse_json_lines(read_text(path))]), images, path)
            prompts = [line.strip() for line in read_lines(path) if line.strip()]
        where, expected = f"{path}: has ", "one line for each"
    if len(prompts) != len(images.names):
        n = len(images.names)
        raise ImageError(f"{where}{len(prompts)} prompts for {n} images in {images.path}; expected {expected}")
    return list(prompts)


def matched(named: Mapping[str, str], images: Images, path: Path) -> list[str]:
    """The prompt of each image from those of files, by path or else by name, since a folder may have been moved."""
    others: dict[str, list[str]] = {}
    for file in named.keys() - {*images.names}:
        others.setdefault(Path(file).name, []).append(file)
    alike = Counter(Path(name).name for name in images.names if name not in named)
    found = {name: [name] if name in named else others.get(Path(name).name, []) for name in images.names}
    if missing := [name for name, files in found.items() if not files]:
        raise ImageError(f"{path}: no prompt for {len(missing)} of {len(images.names)} images, such as {missing[0]}")
    for name, files in found.items():
        if name not in named and (len(files) > 1 or alike[Path(name).name] > 1):
            which = f"{', '.join(sorted(files)[:2])}: by name fits several, such as {name}"
            raise ImageError(f"{path}: {which}; expected paths in the folder of the images")
    return [named[files[0]] for files in found.values()]


def from_json(content: Any) -> dict[str, str]:
    """Files -> prompts, from a JSON object or a list of entries."""
    pairs = ([first(entry, keys) for keys in (FILE_KEYS, TEXT_KEYS)] for entry in content)
    pairs = content.items() if isinstance(content, dict) else pairs
    named = unrepeated((Path(file).as_posix(), text) for file, text in pairs)
    if not all(isinstance(text, str) for text in named.values()):
        raise ValueError("expected a text for every file")
    return named


def unrepeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping, in which no name may stand twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice; expected each once")
        found[name] = value
    return found


def first(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The entry's value under the first of these keys that it has."""
    found = next((entry[key] for key in keys if key in entry), None)
    if found is None:
        raise ValueError(f"an entry without {' or '.join(keys)}: it has {', '.join(entry)}")
    return found


# The real images of a protocol


def protocol_reference(name: str, data: str | Path | None = None) -> Path | Images:
    """The reference of the protocol of that name, see `reference_images`. `data`: the folder of its data; None = its
    own. Raises SettingError: `reference`: no such protocol, or its real images are not what they should be."""
    with fault_of("reference"):
        protocol = load_protocol(name)
        return reference_images(protocol, protocol.folder(data))


def reference_images(protocol: Protocol, data: Path) -> Path | Images:
    """The file of published statistics, the folder of all images, or those images that the protocol asks for, in the
    folder of its data. Raises ImageError: the protocol names none, or its data are not what they should be."""
    if "reference" in protocol.metrics:
        return data / protocol.metrics["reference"]
    pictures = protocol.data.get("pictures")
    if pictures and not (pictures.endswith(".npy") or protocol.data.get("where")):
        return data / pictures
    return captioned_images(protocol, data)


def captioned_images(protocol: Protocol, data: Path, numbers: Sequence[int] | None = None) -> ImageArray | ImageFolder:
    """The images with these numbers, in this order; None = all that the protocol asks for, in the order of their files.
    Raises ImageError: see `reference_images`."""
    if "pictures" not in protocol.data:
        raise ImageError(f"protocol {protocol.name} names no real images")
    images, captions = open_images(data / protocol.data["pictures"]), data / protocol.data["file"]
    stacked, where = isinstance(images, ImageArray), protocol.data.get("where", {})
    entries = images_by_id(captions, *([] if stacked else ["file_name"]), *where)
    if stacked and len(entries) != len(images.names):
        raise ImageError(f"{images.path}: has {len(images.names)} images, {captions.name} has {len(entries)}")
    files = images.names if stacked else [entries[number]["file_name"] for number in sorted(entries)]
    names, places = dict(zip(sorted(entries), files, strict=True)), {name: i for i, name in enumerate(images.names)}
    wanted = [number for number, entry in entries.items() if fits(entry, where)] if numbers is None else numbers
    if missing := {names[number] for number in wanted} - places.keys():
        what = f"{len(missing)} images that {captions.name} names are not there"
        raise ImageError(f"{images.path}: {what}, such as {min(missing)}")
    order = [places[names[number]] for number in wanted]
    return images.subset(sorted({*order}) if numbers is None else order)


def images_by_id(captions: Path, *fields: str) -> dict[int, Mapping[str, Any]]:
    """The images of a captions file, which have these fields, by id. Raises ImageError: not such a file."""
    with reading(captions, "not captions with images"):
        return coco_images(read_json(captions), *fields)
