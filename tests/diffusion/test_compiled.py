"""A compiled network: the same predictions."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from ldm.models.diffusion.parallel.compiled import Compiled, check_compiler
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.packed import pack
from ldm.profiling.workload import Workload, random_network
from scripts import benchmark

PARAMS = dict(
    linear_start=0.00085,
    linear_end=0.012,
    channels=4,
    conditioning_key="crossattn",
    unet_config={
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": dict(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=1,
            channel_mult=[1, 2],
            attention_resolutions=[2],
            num_heads=2,
            use_spatial_transformer=True,
            context_dim=16,
            legacy=False,
        ),
    },
)


def test_whole_runs_are_the_same_and_each_part_is_one_graph():
    """Traced, without the C++ compiler, which would take a minute; a break in a graph would be an error."""
    network = random_network(PARAMS)
    workload = Workload.of(PARAMS, network, (8, 8), 1, 5, 4)
    torch._dynamo.utils.counters.clear()
    compiled = replace(workload, network=Compiled(network, backend="eager"))
    for plan in (Plan(4, (0, 1, 2, 3)), Plan(4, (0, 2))):
        torch.testing.assert_close(compiled.run(plan), workload.run(plan), rtol=1e-5, atol=1e-5)
    # The encoder, the decoder of a key node, and that of nodes that share its features.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_constants_of_the_graphs(packed):
    """Else PyTorch could not lay them out for the processor, and would refuse packed ones."""
    network, inputs = random_network(PARAMS), []
    if packed:
        pack(network.diffusion_model, (8, 8), 5)

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        inputs.append([node.name for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    workload = Workload.of(PARAMS, network, (8, 8), 1, 5, 2)
    replace(workload, network=Compiled(network, backend)).run(Plan(2, (0,)))
    assert len(inputs) == 3 and not any("weight" in name or "bias" in name for names in inputs for name in names)


def test_without_a_compiler_the_error_says_so(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is none of g\+\+, clang\+\+"):
        Compiled(random_network(PARAMS))
    assert benchmark.main(["--compile", "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "--compile: compiling needs a C++ compiler" in error and error.count("\n") == 1
    monkeypatch.setenv("CXX", sys.executable)
    check_compiler()
