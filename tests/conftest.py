"""Every test runs on one thread and from the same seed, and none depends on how fast the machine is."""

from __future__ import annotations

import gc
import os

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of PyTorch, which is imported later, and of the processes that tests start
gc.set_threshold(50_000)  # the default, 700, spends a tenth of the suite on looking through what is imported
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    gc.freeze()  # what the tests imported stays: it is not looked through at all


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch  # not above: the process that hands out the tests needs none, and its import takes seconds

    torch.manual_seed(0)
