"""The real pictures that a protocol names: what its Fréchet distances are taken from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.errors import PictureError, reading
from evaluation.pictures import Array, Pictures
from evaluation.protocol import Protocol
from evaluation.selection import entries, fits


def real_pictures(protocol: Protocol, data: Path) -> Path | Pictures:
    """The file of published statistics, the folder of the pictures, or of an array those that the protocol asks for.

    Args:
        data: the folder of the protocol's data.

    Raises:
        PictureError: the protocol names none, or its data are not what they should be.
    """
    if "reference" in protocol.metrics:
        return data / protocol.metrics["reference"]
    if "pictures" not in protocol.data:
        raise PictureError(f"protocol {protocol.name} names no real pictures")
    path = data / protocol.data["pictures"]
    if path.suffix != ".npy":
        return path
    pictures, where = Array(path), protocol.data.get("where", {})
    images = images_by_id(data / protocol.data["file"], *where)
    if len(images) != len(pictures.names):
        raise PictureError(f"{path}: has {len(pictures.names)} pictures, {protocol.data['file']} has {len(images)}")
    return pictures.chosen([row for row, number in enumerate(sorted(images)) if fits(images[number], where)])


def images_by_id(captions: Path, *fields: str) -> dict[int, Mapping[str, Any]]:
    """The images of a captions file, which have these fields, by id.

    Raises:
        PictureError: not such a file.
    """
    with reading(captions, "not captions with images"):
        content = json.loads(captions.read_text(encoding="utf-8"))
        return {image["id"]: image for image in entries(content, "images", ("id", *fields))}
