"""The prompts of a protocol: read from its data, chosen by a seeded rule.

The rule needs no random generator, so it can be repeated in any language. Images are ordered by
SHA-256("SEED/IMAGE"), the captions of an image by SHA-256("SEED/IMAGE/CAPTION") or, for `first`, by id. Each image in
turn gives one caption, then each a second, until there are enough. So the order of the file does not matter, and the
first N of a selection are the selection of N.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.protocols.protocol import Protocol, Select
from ldm.io.errors import fault_of
from ldm.io.files import parse_json, parse_json_lines, read_text, split_lines


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    id:     tells it from all others of its data; with the protocol's seed it names the noise.
    image:  the image that it is a caption of: prompts of one image share this number.
    inputs: what the model is conditioned on, see `ldm.sampling.generate.Item`.
    """

    id: int
    image: int
    inputs: Mapping[str, Any]

    def line(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.inputs, "id": self.id}


def chosen_prompts(protocol: Protocol, data: str | Path | None = None) -> list[Prompt]:
    """The prompts of a protocol, in its order. `data`: the folder of its data; None = the protocol's. Raises
    SettingError: `data` is not what it should be, or has fewer prompts than `count`."""
    with fault_of("data"):
        prompts = read_prompts(protocol, protocol.folder(data))
    with fault_of("count"):
        return choose(prompts, protocol.select)


def read_prompts(protocol: Protocol, folder: Path) -> list[Prompt]:
    """All prompts of the protocol's data.

    Args:
        folder: the folder of its data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not what it should be.
    """
    data = protocol.data
    if data["kind"] == "classes":
        return [Prompt(number, number, {"class": number}) for number in range(data["classes"])]
    path = folder / data["file"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {protocol.name} reads {data['file']} in the folder of its data")
    text = read_text(path)
    try:
        if data["kind"] == "captions":
            prompts = list(coco_prompts(parse_json(text), data.get("where", {})))
        elif path.suffix == ".jsonl":
            prompts = list(json_prompts(text))
        else:  # empty lines are skipped; the id is the line's number, from 0
            lines = enumerate(map(str.strip, split_lines(text)))
            prompts = [Prompt(number, number, {"prompt": line}) for number, line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not prompts:
        raise ValueError(f"{path}: has no prompts that {protocol.name} could take")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError(f"{path}: has two prompts of one id")
    return prompts


def coco_prompts(content: Any, where: Mapping[str, Any]) -> Iterator[Prompt]:
    """The captions in COCO's annotations of images that fit `where`."""
    if not isinstance(content, Mapping):
        raise ValueError(
            f"expected COCO's captions, an object with images and annotations; got {type(content).__name__}"
        )
    images = {}
    for number, image in enumerate(entries(content, "images", ("id", *where))):
        images[integer(image, "id", f"images[{number}]")] = image
    for number, note in enumerate(entries(content, "annotations", ("id", "image_id", "caption"))):
        place = f"annotations[{number}]"
        image = integer(note, "image_id", place)
        if image not in images:
            raise ValueError(f"{place} is of image {image}, which is not among the images")
        caption = sentence(note["caption"], place)
        if fits(images[image], where):
            yield Prompt(integer(note, "id", place), image, {"prompt": caption, "image_id": image})


def fits(image: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether each field that `where` names has its value, or one of the values if it is a list."""
    return all(image[name] in (value if isinstance(value, list) else [value]) for name, value in where.items())


def json_prompts(text: str) -> Iterator[Prompt]:
    """JSON lines with `prompt` or `caption`, and an `id` (default: the line's number, from 0)."""
    for number, entry in parse_json_lines(text):
        place = f"line {number + 1}"
        if not isinstance(entry, Mapping) or not {"prompt", "caption"} & entry.keys():
            raise ValueError(f"{place} has no prompt or caption; got {json.dumps(entry, ensure_ascii=False)[:80]}")
        own = integer({"id": number, **entry}, "id", place)
        yield Prompt(own, own, {"prompt": sentence(entry.get("prompt", entry.get("caption")), place)})


def entries(content: Mapping[str, Any], name: str, needed: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    """A list in COCO's annotations, each of whose entries has these fields."""
    listed = content.get(name)
    if not isinstance(listed, list):
        raise ValueError(f"expected COCO's captions; it has no list of {name}, only {', '.join(content) or 'nothing'}")
    for number, entry in enumerate(listed):
        missing = [field for field in needed if not isinstance(entry, Mapping) or field not in entry]
        if missing:
            got = ", ".join(entry) if isinstance(entry, Mapping) else repr(entry)
            raise ValueError(f"{name}[{number}] has no {', '.join(missing)}; it has {got[:200]}")
    return listed


def integer(entry: Mapping[str, Any], name: str, place: str) -> int:
    value = entry[name]
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError(f"{place}: {name} must be a whole number in 0..2^32-1; got {value!r}")
    return value


def sentence(text: Any, place: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place}: expected a caption with words; got {text!r}")
    return " ".join(text.split())


def choose(prompts: Sequence[Prompt], select: Select) -> list[Prompt]:
    """The prompts that the rule above chooses, in its order.
    Raises ValueError: there are none, or fewer than asked for."""
    by_image: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_image.setdefault(prompt.image, []).append(prompt)

    def turn(prompt: Prompt) -> tuple[str, int]:
        drawn = select.captions == "drawn"
        return place_of(select.seed, prompt.image, prompt.id) if drawn else "", prompt.id

    for captions in by_image.values():
        captions.sort(key=turn)
    order = sorted(by_image, key=lambda image: (place_of(select.seed, image), image))
    rounds = [
        by_image[image][turn] for turn in range(select.per_image) for image in order if turn < len(by_image[image])
    ]
    count = len(rounds) if select.count is None else select.count
    if not rounds:
        raise ValueError("there are no prompts to choose from")
    if count > len(rounds):
        raise ValueError(
            f"{count} prompts are asked for, at most {select.per_image} of an image; there are "
            f"{len(rounds)} such (of {len(prompts)} prompts of {len(by_image)} images)"
        )
    return rounds[:count]


def place_of(*numbers: int) -> str:
    return hashlib.sha256("/".join(map(str, numbers)).encode()).hexdigest()
