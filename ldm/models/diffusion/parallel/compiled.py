"""A network whose encoder and decoder are compiled by PyTorch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.denoiser import ConditionedNetwork
from ldm.modules.diffusionmodules.features import Features, PartWeights

COMPILERS = ("g++", "clang++")
Backend = str | Callable[..., Any]


def compiled(function: Callable[..., Any], backend: Backend = "inductor") -> Callable[..., Any]:
    """What `torch.compile` makes of a function or network for inference, in one graph, the weights as constants.

    It is compiled at the first call, and anew for every other shape: PyTorch does so eight times and then goes on
    without. Weights must not change afterwards. Call it without gradients.

    Args:
        function: what computes.
        backend: of `torch.compile`; all but "inductor" are for finding faults.

    Raises:
        ValueError: there is no C++ compiler.
    """
    if backend == "inductor":
        check_compiler()
    traced = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        # As an option of torch.compile freezing doesn't reach the tracing: weights would be inputs of the graph, not be
        # laid out for the processor (twice the time), and packed ones be refused.
        with inductor.patch(freezing=True):
            return traced(*args, **kwargs)

    return call


class Compiled(nn.Module):
    """A `ConditionedNetwork` that computes what another one does, with compiled `encode` and `decode`.

    Decoders are best run one by one: batches of another size are compiled anew. Parts of the encoder or decoder
    (`encode_outer`, `share`, `advance`) are not compiled.

    Args:
        network: in evaluation mode; its layers may be packed, which is faster.
        backend: see `compiled`.

    Raises:
        ValueError: there is no C++ compiler.
    """

    def __init__(self, network: ConditionedNetwork, backend: Backend = "inductor") -> None:
        super().__init__()
        self.inner = network
        self._encode = compiled(self._encode_tensors, backend)
        self._decode = compiled(network.decode, backend)

    def project(self, cond: Conditioning) -> Conditioning:
        return self.inner.project(cond)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.inner.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return Features.of(self._encode(x, t, cond, tome))

    def encode_outer(
        self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Sequence[Tensor]:
        return self.inner.encode_outer(x, t, cond, blocks, tome)

    def part_weights(self) -> tuple[PartWeights, ...]:
        return ()  # slices are constants of the graph; weights that it is given would not be

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        return self.inner.share(features, weights)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.inner.advance(features, t, cond, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self._decode(features, t, cond, tome)

    def _encode_tensors(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> tuple[Tensor, ...]:
        return self.inner.encode(x, t, cond, tome).tensors


def check_compiler() -> None:
    """Raise ValueError unless there is a C++ compiler, which PyTorch compiles with."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else [*COMPILERS]
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"compiling needs a C++ compiler, and there is none of {', '.join(names)}; install one, or "
            f"name it in the environment variable CXX"
        )
