"""What a model's images are recognised as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.metrics.retrieval import Settings, load_engine, reconstruct
from ldm.data.emoji import EmojiDataset
from ldm.io.images import from_pil
from tests.helpers.tiny_data import SIDE, write_data
from tests.helpers.tiny_models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_reconstruction_is_the_first_stage_without_noise(model, data):
    engine = load_engine(Settings(config=str(model[0]), ckpt=str(model[1])), SIDE)
    originals = EmojiDataset(data).batch(np.array([0, 7, 18]))
    copies = reconstruct(engine, originals, 2)
    with torch.no_grad():
        first_stage = engine.model.first_stage_model
        expected = first_stage.decode(first_stage.encode(originals).mode()).clamp(-1, 1)
    torch.testing.assert_close(torch.stack([from_pil(copy) for copy in copies]), expected, atol=1 / 127, rtol=0)
