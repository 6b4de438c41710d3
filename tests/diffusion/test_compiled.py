"""A compiled network: the same predictions."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from ldm.models.diffusion.parallel import Compiled, check_compiler
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.packed import pack
from ldm.profiling.workload import Workload, random_network
from scripts import benchmark
from tests.helpers.tiny_unet import network_params

PARAMS = network_params()


@pytest.mark.parametrize("packed", [False, True])
def test_whole_runs_are_the_same_and_each_part_is_one_graph(packed):
    """Traced, without the C++ compiler, which would take a minute; a break in a graph would be an error.

    Weights are constants of the graphs, or PyTorch could not lay them out for the processor, and would refuse packed
    ones.
    """
    network, inputs = random_network(PARAMS), []
    if packed:
        pack(network.diffusion_model, (8, 8), 5)

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        inputs.append([node.name for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    workload = Workload.of(PARAMS, network, (8, 8), 1, 5, 4)
    compiled = replace(workload, network=Compiled(network, backend))
    for plan in (Plan(4, (0, 1, 2, 3)), Plan(4, (0, 2))):
        torch.testing.assert_close(compiled.run(plan), workload.run(plan), rtol=1e-5, atol=1e-5)
    # The encoder, the decoder of a key node, and that of nodes that share its features.
    assert len(inputs) == 3
    assert not any("weight" in name or "bias" in name for names in inputs for name in names)


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
