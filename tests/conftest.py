"""Every test runs on one thread and from the same seed, and none depends on how fast the machine is."""

from __future__ import annotations

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
