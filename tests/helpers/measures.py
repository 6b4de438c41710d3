"""Sets of drawn images, and how the measures' commands are called on them."""

from __future__ import annotations

import json
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from evaluation import fid
from evaluation.metrics.frechet import Gaussian, Moments

N = 22


def draw(seed: int, side: int = 32) -> Image.Image:
    """A few coloured shapes."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = random.integers(0, side, 3).tolist()
        shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
        shape([x, y, x + size, y + size], tuple(random.integers(0, 256, 3).tolist()))
    return image


def settings(i: int, keys: list[int] | None) -> dict:
    return {
        "prompt": f"shapes {i}",
        "prompt_index": i,
        "sample": 0,
        "seed": [7, i, 0],
        "start": [7, i, 0],
        "weights": "abc",
        "steps": 9,
        "keys": keys,
        "noise_weight": 0.0,
    }


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


def fid_of(call, out: Path, *arguments: str) -> dict:
    assert call(fid, *arguments, "--out", str(out)) == 0
    return load_json(out)


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes here, as a full disk would."""
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)


def assert_one_line(err: str, why: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1 and re.search(r"^[a-z_]+\.py: error: .*" + why, lines[0]), err


def golden_features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """real (90, 12), fake (70, 12), logits (70, 9), as the golden numbers were made from."""
    r = np.random.RandomState(5)
    real = r.standard_normal((90, 12)) @ r.standard_normal((12, 12))
    fake = r.standard_normal((70, 12)) @ r.standard_normal((12, 12)) * 0.8 + 0.5
    return real, fake, 3 * r.standard_normal((70, 9))


def gaussian(features: np.ndarray) -> Gaussian:
    return Moments.from_features(features).gaussian()
