"""The diffusers library beside ours, as scripts/benchmark.py has it: the same run."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.propagation.plan import Plan
from ldm.profiling.diffusers_baseline import diffusers_peer, fastest
from ldm.profiling.workload import Workload, random_network
from tests.helpers.tiny_unet import network_params

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PARAMS = network_params(num_res_blocks=2, attention_resolutions=[1, 2])


def test_whole_runs_are_the_same_eager_and_compiled():
    network = random_network(PARAMS)
    workload = Workload.of(PARAMS, network, (8, 8), 1, 5, 4)
    peer = fastest(diffusers_peer(PARAMS, network), workload)
    ours = workload.run(Plan(4, (0, 1, 2, 3)))
    torch.testing.assert_close(peer.run(workload), ours, rtol=1e-4, atol=1e-4)
    # Traced only: the C++ compiler would take a minute.
    torch.testing.assert_close(peer.compiled(backend="eager").run(workload), ours, rtol=1e-4, atol=1e-4)
