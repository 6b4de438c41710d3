"""A dataset of a few patterns, in the format of scripts/prepare_emoji.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SIDE = 16
STYLES = ("noto", "twemoji", "fluent 3d", "fluent flat", "openmoji")


def write_data(folder: Path, side: int = SIDE) -> Path:
    """Four concepts, each a pattern of its own, in five colours; one style of the last is held out."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2, (4, 4, 4, 1)).repeat(side // 4, 1).repeat(side // 4, 2)
    colours = random.integers(0, 120, (5, 1, 1, 3))
    pictures = [np.where(pattern, colour, 255) for pattern in patterns for colour in colours]
    np.save(folder / "pictures.npy", np.stack(pictures).astype(np.uint8))
    images = [
        {
            "id": 5 * c + s,
            "concept": f"c{c}",
            "name": f"thing {c}",
            "style": style,
            "tier": 1,
            "category": "even" if c % 2 == 0 else "odd",
            "subgroup": f"group-{c % 2}",
            "split": "heldout_pair" if (c, s) == (3, 4) else "train",
        }
        for c in range(4)
        for s, style in enumerate(STYLES)
    ]
    notes = [
        {"id": 2 * i["id"] + n, "image_id": i["id"], "caption": caption}
        for i in images
        for n, caption in enumerate((f"a {i['name']}, {i['style']} style", "a keyword"))
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder
