"""CLIP's vocabulary as far as the golden prompts need it: their merges at their true ranks, filler elsewhere."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import chain, product
from pathlib import Path

from ldm.modules.encoders.clip_tokenizer import MERGES, VOCABULARY
from tests.helpers.paths import GOLDENS

CASES = json.loads((GOLDENS / "tokenizer_clip.json").read_text(encoding="utf-8"))


@cache
def content() -> bytes:
    """The file as OpenAI's CLIP has it."""
    return gzip.compress("\n".join([*lines(), "a line of the published file past the end"]).encode(), 1)


def lines() -> list[str]:
    """A comment and the merges; the filler is of control characters, which no prompt has."""
    controls = [chr(256 + i) for i in range(33)]
    pairs = ["".join(pair) for pair in product(controls, repeat=2)]
    filler = map(" ".join, chain(product(controls, repeat=2), product(pairs, repeat=2)))
    return ["#version", *(CASES["merges"].get(str(rank)) or next(filler) for rank in range(MERGES))]


def write_vocabulary(folder: Path) -> Path:
    """The file as OpenAI's CLIP has it, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / VOCABULARY
    path.write_bytes(content())
    return path
