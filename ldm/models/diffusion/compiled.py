"""A network whose encoder and decoder are compiled by PyTorch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning
from ldm.modules.diffusionmodules.features import Features

COMPILERS = ("g++", "clang++")


class Compiled(nn.Module):
    """A `ConditionedNetwork` that computes what another one does, with compiled `encode` and `decode`.

    Each is compiled at its first call, and anew for every other shape: PyTorch does so eight times and then goes on
    without. So decoders are best run one by one. Weights are taken as constants, so that they can be laid out for the
    processor; they must not change. Parts of the encoder or decoder (`encode_outer`, `advance`) are not compiled.

    Args:
        network: in evaluation mode, its layers not packed.
        backend: of `torch.compile`; all but "inductor" are for finding faults.

    Raises:
        ValueError: there is no C++ compiler.
    """

    def __init__(self, network: ConditionedNetwork, backend: str = "inductor") -> None:
        super().__init__()
        if backend == "inductor":
            check_compiler()
        self.inner = network
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend,
                           options={"freezing": True} if backend == "inductor" else None)
        self._encode, self._decode = compiled(self._encode_tensors), compiled(self._decode_tensors)

    def project(self, cond: Conditioning) -> Conditioning:
        return cond     # the compiled functions take tensors; keys and values are computed at every step

    def embed_time(self, t: Tensor) -> Tensor:
        return self.inner.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return Features.of(self._encode(x, t, cond, tome))

    def encode_outer(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int,
                     tome: float = 0.0) -> Sequence[Tensor]:
        return self.inner.encode_outer(x, t, cond, blocks, tome)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.inner.advance(features, t, cond, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self._decode(features.tensors, t, cond, tome)

    def _encode_tensors(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> tuple[Tensor, ...]:
        return self.inner.encode(x, t, cond, tome).tensors

    def _decode_tensors(self, tensors: Sequence[Tensor], t: Tensor, cond: Conditioning, tome: float) -> Tensor:
        return self.inner.decode(Features.of(tensors), t, cond, tome)


def check_compiler() -> None:
    """Raise ValueError unless there is a C++ compiler, which PyTorch compiles with."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else [*COMPILERS]
    if not any(map(shutil.which, names)):
        raise ValueError(f"compiling needs a C++ compiler, and there is none of {', '.join(names)}; install one, or "
                         f"name it in the environment variable CXX")
