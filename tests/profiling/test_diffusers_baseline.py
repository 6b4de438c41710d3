"""The diffusers library beside ours, as scripts/benchmark.py has it: the same run."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.propagation.plan import Plan
from ldm.profiling.diffusers_baseline import diffusers_peer, fastest
from ldm.profiling.workload import Workload, random_network

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PARAMS = dict(
    linear_start=0.00085,
    linear_end=0.012,
    channels=4,
    image_size=8,
    conditioning_key="crossattn",
    unet_config={
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": dict(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=2,
            channel_mult=[1, 2],
            attention_resolutions=[1, 2],
            num_heads=2,
            use_spatial_transformer=True,
            context_dim=16,
            legacy=False,
        ),
    },
)


def test_whole_runs_are_the_same_eager_and_compiled():
    network = random_network(PARAMS)
    workload = Workload.of(PARAMS, network, (8, 8), 1, 5, 4)
    peer = fastest(diffusers_peer(PARAMS, network), workload)
    ours = workload.run(Plan(4, (0, 1, 2, 3)))
    torch.testing.assert_close(peer.run(workload), ours, rtol=1e-4, atol=1e-4)
    # Traced only: the C++ compiler would take a minute.
    torch.testing.assert_close(peer.compiled(backend="eager").run(workload), ours, rtol=1e-4, atol=1e-4)
