"""The real pictures that a protocol names: what its Fréchet distances are taken from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.protocols.prompts import entries, fits, integer
from evaluation.protocols.protocol import Protocol
from evaluation.runs.errors import PictureError, reading
from evaluation.runs.images import Array, Folder, Pictures
from ldm.io.files import read_json


def real_pictures(protocol: Protocol, data: Path) -> Path | Pictures:
    """The file of published statistics, the folder of all pictures, or those pictures that the protocol asks for.

    Args:
        data: the folder of the protocol's data.

    Raises:
        PictureError: the protocol names none, or its data are not what they should be.
    """
    if "reference" in protocol.metrics:
        return data / protocol.metrics["reference"]
    if "pictures" not in protocol.data:
        raise PictureError(f"protocol {protocol.name} names no real pictures")
    path, where = data / protocol.data["pictures"], protocol.data.get("where", {})
    captions = data / protocol.data["file"]
    if path.suffix == ".npy":
        pictures, images = Array(path), images_by_id(captions, *where)
        if len(images) != len(pictures.names):
            raise PictureError(f"{path}: has {len(pictures.names)} pictures, {captions.name} has {len(images)}")
        return pictures.chosen([row for row, number in enumerate(sorted(images)) if fits(images[number], where)])
    if not where:
        return path
    folder, images = Folder(path), images_by_id(captions, "file_name", *where)
    wanted = {image["file_name"] for image in images.values() if fits(image, where)}
    if missing := wanted - {*folder.names}:
        raise PictureError(
            f"{path}: {len(missing)} pictures that {captions.name} names are not there, such as {min(missing)}"
        )
    return folder.chosen([place for place, name in enumerate(folder.names) if name in wanted])


def images_by_id(captions: Path, *fields: str) -> dict[int, Mapping[str, Any]]:
    """The images of a captions file, which have these fields, by id.

    Raises:
        PictureError: not such a file.
    """
    with reading(captions, "not captions with images"):
        content = read_json(captions)
        return {
            integer(image, "id", f"images[{place}]"): image
            for place, image in enumerate(entries(content, "images", ("id", *fields)))
        }
