"""How decoders use several devices, or a compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import config as inductor

from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning, Denoiser, Past, Prediction, Wrapper
from ldm.modules.diffusionmodules.util import Features, PartWeights

# The decoders of one image on several devices.


def first_process(value: float) -> float:
    """The value of the first process, in all of them.

    Devices round differently; processes that decided differently what runs next would wait for each other for ever.
    """
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


class DistributedDecode(Wrapper):
    """A denoiser that shares the nodes of each decoder batch among processes, one device each.

    Every process runs the same loop from the same latents with the same plan. Each encodes for itself, so features
    stay where they are; each decodes its part of a batch of n nodes, ceil(n / processes) at most, and all get all
    predictions. A batch of one node, as shallow and refreshed nodes are, is computed by every process: correct, and
    no faster.

    Raises:
        ValueError: (in decode) the denoiser uses guidance offsets again: only the process with the key node has one.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        n = len(ts)
        if n == 1:
            return self.inner.decode(features, ts, last)
        share = -(-n // self.size)
        # Who comes after the last node decodes that one once more: there is a part for everyone.
        part = slice(min(self.rank * share, n - 1), min((self.rank + 1) * share, n))
        predictions = self.inner.decode(features[part], ts[part])
        if any(prediction.offsets for prediction in predictions):
            raise ValueError("reuse of the guidance offset does not go with decoders spread over processes")
        mine = torch.stack([prediction.out for prediction in predictions])  # (<= share, B, C, H, W)
        mine = torch.cat([mine, mine[-1:].expand(share - len(mine), *mine.shape[1:])])  # (share, B, C, H, W)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [Prediction(out) for part in parts for out in part][:n]


# A network whose encoder and decoder are compiled by PyTorch.


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
    (`refresh`, `share`, `advance`) are not compiled.

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

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        return self.inner.refresh(features, x, t, cond, blocks, tome)

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
