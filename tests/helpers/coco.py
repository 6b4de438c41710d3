"""A small folder in the shape of COCO's, and a protocol for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

WORDS = ("red", "green", "dog", "owl", "heart", "tree", "face")
LONG = 3  # every LONG-th caption is longer than the tiny model's text encoder reads


def captions(images: int) -> dict[str, Any]:
    """Two captions of each image; ids in no order."""
    entries = [{"id": 900 - 7 * k, "file_name": f"{k:012d}.jpg", "height": 20, "width": 24} for k in range(images)]
    notes = [
        {
            "id": 5000 - 11 * (2 * k + turn),
            "image_id": image["id"],
            "caption": f" a {WORDS[k % 7]} {WORDS[turn]} {k}\n" + " red" * 9 * ((2 * k + turn) % LONG == 0),
        }
        for k, image in enumerate(entries)
        for turn in range(2)
    ]
    return {"info": {}, "images": entries, "annotations": notes}


def write_coco(folder: Path, images: int = 24) -> Path:
    """Annotations and images in `folder`."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    content = captions(images)
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    for k, image in enumerate(content["images"]):
        Image.new("RGB", (24, 20), (10 * k, 0, 0)).save(folder / "val2017" / image["file_name"])
    return folder


def write_protocol(path: Path, **changes: Any) -> Path:
    """A protocol of 16 x 16 images on that folder; `changes` with dots as __."""
    content: dict[str, Any] = {
        "data": {"kind": "captions", "file": "annotations/captions_val2017.json", "pictures": "val2017"},
        "select": {"count": 40, "per_image": 2},
        "size": 16,
        "guidance": 3.0,
        "sampling": {"sampler": "ddim", "steps": 4},
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    path.write_text(yaml.safe_dump(content))
    return path
