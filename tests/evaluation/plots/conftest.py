"""A small experiment for the figures."""

from __future__ import annotations

import pytest
import torch

from evaluation.plots.experiment import Experiment
from ldm.cli.setup import read_setup
from tests.helpers.tiny_models import WORDS, write_model


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two images of a tiny model."""
    files = write_model(tmp_path_factory.mktemp("model"))
    return Experiment(read_setup(*files, torch.device("cpu")), WORDS, 2, 42, None)
