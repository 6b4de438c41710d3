"""Every test runs on one thread and from the same seed, and none depends on how fast the machine is."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
