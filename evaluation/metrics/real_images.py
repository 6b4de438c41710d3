"""The reference images of a protocol: the real images, or their statistics, that samples are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.protocols.prompts import entries, fits, integer
from evaluation.protocols.protocol import Protocol, load_protocol
from evaluation.runs.images import ImageArray, ImageError, ImageFolder, Images, reading
from ldm.io.errors import fault_of
from ldm.io.files import read_json


def protocol_reference(name: str, data: str | Path | None = None) -> Path | Images:
    """The reference of the protocol of that name; see `reference_images`.

    Args:
        data: the folder of the protocol's data; None = the protocol's own.

    Raises SettingError: `reference`: no such protocol, or its real images are not what they should be.
    """
    with fault_of("reference"):
        protocol = load_protocol(name)
        return reference_images(protocol, protocol.folder(data))


def reference_images(protocol: Protocol, data: Path) -> Path | Images:
    """The file of published statistics, the folder of all images, or those images that the protocol asks for.

    Args:
        data: the folder of the protocol's data.

    Raises ImageError: the protocol names none, or its data are not what they should be.
    """
    if "reference" in protocol.metrics:
        return data / protocol.metrics["reference"]
    if "pictures" not in protocol.data:
        raise ImageError(f"protocol {protocol.name} names no real images")
    path, where = data / protocol.data["pictures"], protocol.data.get("where", {})
    captions = data / protocol.data["file"]
    if path.suffix == ".npy":
        images, entries = ImageArray(path), images_by_id(captions, *where)
        if len(entries) != len(images.names):
            raise ImageError(f"{path}: has {len(images.names)} images, {captions.name} has {len(entries)}")
        return images.subset([row for row, number in enumerate(sorted(entries)) if fits(entries[number], where)])
    if not where:
        return path
    images, entries = ImageFolder(path), images_by_id(captions, "file_name", *where)
    wanted = {entry["file_name"] for entry in entries.values() if fits(entry, where)}
    if missing := wanted - {*images.names}:
        raise ImageError(
            f"{path}: {len(missing)} images that {captions.name} names are not there, such as {min(missing)}"
        )
    return images.subset([place for place, name in enumerate(images.names) if name in wanted])


def images_by_id(captions: Path, *fields: str) -> dict[int, Mapping[str, Any]]:
    """The images of a captions file, which have these fields, by id. Raises ImageError: not such a file."""
    with reading(captions, "not captions with images"):
        content = read_json(captions)
        return {
            integer(image, "id", f"images[{place}]"): image
            for place, image in enumerate(entries(content, "images", ("id", *fields)))
        }
