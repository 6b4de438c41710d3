"""What a run costs in multiply-accumulates (MACs) and in memory, found without computing anything, and in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning
from ldm.models.diffusion.propagation.plan import METHODS, AnyPlan, Compute, Forecast, Plan
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.deepfloyd import DeepFloydUNet
from ldm.modules.diffusionmodules.openaimodel import meta_unet, on_meta, once_for_a_config, without_data
from ldm.modules.diffusionmodules.util import Features, PartWeights

T = TypeVar("T")

TEXT_TOKENS = 77  # of CLIP, and of our text encoders unless a config says otherwise


@dataclass(frozen=True)
class Macs:
    """MACs of one prediction of a batch: convolutions, linear layers, and both products of attention.

    Every prediction counts with its whole decoder, as in the paper, though `shared` of it is computed once for the
    nodes that hold the features of a key timestep (`UNetModel.share`).

    encode: what a non-key node saves: input blocks, middle block and time embedding.
    decode: what a key node and a decoder node pay: output blocks, output layer and time embedding.
    outer:  [n]: the first n input blocks alone, with the time embedding; [0] = 0.
    last:   [n]: the last n output blocks, with the output layer and the time embedding.
    once:   what is computed once for all steps of a run: keys and values of the context.
    shared: of `decode`, what depends on the key timestep's features alone.
    control: of `encode`, what control networks compute.
    gated:  all but cross-attention; of half of an even batch, which is the prediction that is left without guidance.
        None = there is no cross-attention.
    """

    encode: int
    decode: int
    outer: tuple[int, ...] = (0,)
    last: tuple[int, ...] = ()
    once: int = 0
    shared: int = 0
    control: int = 0
    gated: int | None = None

    @property
    def whole(self) -> int:
        """One prediction with nothing saved, without what a run computes once."""
        return self.encode + self.decode

    def plain(self, nodes: int) -> int:
        """A run of so many nodes with nothing saved."""
        return self.once + nodes * self.whole

    def node(self, compute: Compute, plan: AnyPlan) -> int:
        """One prediction at a node of a plan."""
        if compute is Compute.SKIPPED:
            return 0
        if compute is Compute.GATED:
            return self.gated
        if compute is Compute.SHALLOW:
            return self.outer[plan.branch] + self.last[plan.branch]
        if compute is Compute.FULL:
            return self.whole
        return self.decode + self.outer[plan.refresh] + (self.control if plan.control else 0)

    def part(self, n: int) -> Macs:
        """The n-th part of the encoder's, for one that runs at every n-th prediction."""
        return replace(self, encode=self.encode // n, outer=tuple(macs // n for macs in self.outer))

    def with_control(self, control: Macs) -> Macs:
        """The MACs of the network together with one that controls it."""
        return replace(
            self,
            encode=self.encode + control.encode,
            outer=tuple(a + b for a, b in zip(self.outer, control.outer, strict=True)),
            once=self.once + control.once,
            control=self.control + control.encode,
            gated=None if self.gated is None else self.gated + control.gated,
        )

    def run(self, plan: AnyPlan, computes: Sequence[Compute] | None = None, images: Sequence[int] | None = None) -> int:
        """All predictions of a run.

        Args:
            computes: of every node, for a plan that decides on the way; None = the plan's.
            images: how often the batch is predicted at each node, for guidance; None = once.
        """
        computes = plan.computes() if computes is None else computes
        images = images or [1] * len(computes)
        return self.once * max(images) + sum(
            self.node(compute, plan) * n for compute, n in zip(computes, images, strict=True)
        )

    def critical_path(
        self, plan: AnyPlan, computes: Sequence[Compute] | None = None, images: Sequence[int] | None = None
    ) -> int:
        """What has to be computed one after the other when all decoders that share features run at the same time.

        Nodes after a key node wait for it alone, so they add nothing; shallow and refreshed nodes wait for the latent
        before them. Arguments as for `run`.
        """
        computes = plan.computes() if computes is None else computes
        images = images or [1] * len(computes)
        return self.once * max(images) + sum(
            self.node(compute, plan) * n
            for compute, n in zip(computes, images, strict=True)
            if compute is not Compute.DECODER or plan.waits
        )


def _one_product(queries: Sequence[int], keys: Sequence[int], *rest: Any, **more: Any) -> int:
    """Half of each of the two matrix products of attention, which cost the same: together, one."""
    return prod(queries) * keys[-1]


def _norm(x: Sequence[int], *rest: Any, **more: Any) -> int:
    return 2 * 5 * prod(x)


def _upsampling(*rest: Any, out_shape: Sequence[int], **more: Any) -> int:
    return 2 * prod(out_shape)


def _linear(x: Sequence[int], weight: Sequence[int], *rest: Any, **more: Any) -> int:
    return 2 * prod(x) * weight[0]


def _convolution(x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Sequence[int], **more: Any) -> int:
    return 2 * prod(weight[1:]) * prod(out_shape)


# What operations cost, in FLOPs, where PyTorch's counter knows nothing or a convention differs from it.
PACKED = {torch.ops.mkldnn._linear_pointwise: _linear, torch.ops.mkldnn._convolution_pointwise: _convolution}
CONVENTIONS: dict[str, dict[Any, Callable[..., int]]] = {
    "exact": PACKED,
    # Nearest upsampling is an indexing on the meta device; a UNet has no other.
    "paper": PACKED
    | {
        torch.ops.aten.bmm: _one_product,
        torch.ops.aten.native_group_norm: _norm,
        torch.ops.aten.native_layer_norm: _norm,
        torch.ops.aten._unsafe_index: _upsampling,
    },
}


def count_macs(call: Callable[[], Any], convention: str = "exact") -> int:
    """MACs of everything that call() does on tensors (1 MAC = 2 FLOPs).

    Args:
        convention: 'exact' counts convolutions, linear layers and both products of attention. 'paper' is how the
            numbers of Faster Diffusion (arXiv 2312.09608, appendix A.5) come out: one product of attention only, 5
            for each element that is normalised, 1 for each that nearest upsampling puts out.
    """
    with _counting(convention) as counted:
        call()
    return counted()


@contextmanager
def _counting(convention: str) -> Iterator[Callable[[], int]]:
    """Gives what tells the MACs since it began."""
    # Fused attention, counted as a whole on some devices only, is taken apart into its two products.
    with (
        FlopCounterMode(display=False, custom_mapping=CONVENTIONS[convention]) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield lambda: counter.get_total_flops() // 2


def context_tokens(params: Mapping[str, Any]) -> int | None:
    """Tokens of the context that a model's UNet attends to; None for a UNet without cross-attention.

    A class is one token, and so is an embedding of a text; of a text there are as many as its encoder reads, whatever
    the prompt; of neighbours as many as the model was trained with.

    Args:
        params: of the `model` part of a config.
    """
    network = params["unet_config"]["params"]
    if "encoder_dim" in network:  # DeepFloyd-IF, whose texts T5 reads
        return TEXT_TOKENS
    if network.get("context_dim") is None:
        return None
    if "k_nn" in params:  # retrieval-augmented, as published for training
        return params["k_nn"]
    conditioner = params.get("cond_stage_config")
    if not isinstance(conditioner, Mapping):  # a marker such as __is_first_stage__
        return TEXT_TOKENS
    if conditioner["target"].rpartition(".")[2] in ("ClassEmbedder", "Identity"):
        return 1
    reads = conditioner.get("params") or {}
    return reads.get("max_length", reads.get("max_seq_len", TEXT_TOKENS))


@once_for_a_config
def unet_macs(
    unet: nn.Module | Mapping[str, Any],
    size: Sequence[int],
    batch: int = 1,
    context_length: int | None = None,
    tome: float = 0.0,
    convention: str = "exact",
) -> Macs:
    """MACs of one encode and one decode of a UNet.

    Args:
        unet: a `UNetModel`, which is left as it is, or its config (`target`, `params`).
        size: height and width of the latent, multiples of the UNet's `downsampling`.
        batch: latents per prediction; guidance doubles it.
        context_length: tokens of the context, for a UNet with cross-attention.
        tome: share of tokens merged for self-attention; the product that finds similar ones is counted too.
        convention: see `count_macs`. The paper's counts keys and values of the context at every step, as the networks
            do that it was measured with; and so what DeepFloyd-IF makes of a text and a noise level.
    """
    with without_data():
        unet, x, inputs = meta_unet(unet, size, batch, context_length, tome)
        count, once = partial(count_macs, convention=convention), 0
        layers = attending(unet, inputs["context"]) if unet.keeps_attention else []
        if convention == "exact" and context_length is not None:
            context = inputs["context"]
            once = count(lambda: inputs.update(context=unet.project(context)))
        time = count(lambda: unet.embed(inputs["timesteps"], inputs["y"], batch))
        features, (*outer, encode), attended = _by_block(
            lambda: unet.encode(x, **inputs), unet.input_blocks, convention, layers
        )
        _, (*before, decode), again = _by_block(
            lambda: unet.decode(features, **inputs), unet.output_blocks, convention, layers
        )
        if convention == "paper" and isinstance(unet, DeepFloydUNet):
            decode += count(lambda: condition(unet, batch, context_length))
        last = (time + decode - done for done in reversed([time, *before]))
        shared = count(lambda: unet.share(features))
        gated = alone(encode + decode - attended - again, batch) if layers else None
        return Macs(encode, decode, (0, *outer), tuple(last), once, shared, gated=gated)


def condition(unet: DeepFloydUNet, batch: int, tokens: int) -> Any:
    """What a stage of DeepFloyd-IF makes of states of texts without content, and of a noise level if it has one."""
    level = None if unet.aug_proj is None else torch.zeros(batch)
    return unet.condition(torch.zeros(batch, tokens, unet.encoder_dim), level)


def control_macs(
    control: ControlNet,
    size: Sequence[int],
    batch: int = 1,
    context_length: int | None = None,
    convention: str = "exact",
) -> Macs:
    """MACs of a control network, which has no decoder; arguments as for `unet_macs`.

    Its control image is read once for a run; by the paper's convention at every step, as the networks do that it was
    measured with.
    """
    with without_data():
        # Of weights without gradients PyTorch makes a linear layer of a batch a product like those of attention.
        control, count = on_meta(control).requires_grad_(), partial(count_macs, convention=convention)
        hint = _hint(control, batch, size)
        x, t, context = torch.zeros(batch, control.in_channels, *size), torch.zeros(batch), None
        once, read, layers = count(lambda: control.read(hint)), control.read(hint), []
        if context_length is not None:
            context = torch.zeros(batch, context_length, control.context_dim)
            layers = attending(control, context)
        again = once if convention == "paper" else 0
        if convention == "exact" and context is not None:
            once += count(lambda: control.project(context))
            context = control.project(context)
        _, (*outer, whole), attended = _by_block(
            lambda: control.encode(x, read, t, context), control.zero_convs, convention, layers
        )
        gated = alone(whole - attended, batch) if layers else None
        return Macs(whole + again, 0, (0, *(n + again for n in outer)), once=once - again, gated=gated)


def alone(macs: int, batch: int) -> int:
    """The MACs that are left of a batch without guidance: half of them, if the batch is even."""
    return macs if batch % 2 else macs // 2


def attending(network: nn.Module, context: Tensor) -> list[nn.Module]:
    """The layers that attend to the context, which are what a gated prediction leaves out."""
    return [*network.project(context).keys_values]


def _hint(control: ControlNet, batch: int, size: Sequence[int]) -> Tensor:
    """A control image for each of a batch of latents of this height and width."""
    return torch.zeros(batch, control.hint_channels, *(control.reduction * n for n in size))


def _by_block(
    call: Callable[[], T], blocks: Iterable[nn.Module], convention: str, layers: Iterable[nn.Module] = ()
) -> tuple[T, list[int], int]:
    """What call() returns; its MACs until the end of each of these blocks in turn, and until its own end; and those of
    these layers together."""
    spent, inside = [], []
    with _counting(convention) as counted:
        hooks = [block.register_forward_hook(lambda *_: spent.append(counted())) for block in blocks]
        for layer in layers:
            hooks.append(layer.register_forward_pre_hook(lambda *_: inside.append(-counted())))
            hooks.append(layer.register_forward_hook(lambda *_: inside.append(counted())))
        result = call()
        spent.append(counted())
    for hook in hooks:
        hook.remove()
    return result, spent, sum(inside)


# How much memory predictions and images need, and how much there is.


SHARE = 0.8  # of the free memory that is planned for; an estimate knows nothing of workspaces and fragments
MEMINFO = Path("/proc/meminfo")


class _Peak(TorchDispatchMode):
    """Watches the storages that are made inside; `most` is the most bytes of them alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if not any(storage is other for other in given):  # not a view, nor changed in place
                self._alive[storage] = None
        self.most = max(self.most, sum(storage.nbytes() for storage in self._alive))
        return out


class _FusedAttention(TorchFunctionMode):
    """Without a device, attention is taken apart into products that no device holds in full."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that call() holds at one time in tensors it makes, with fused attention."""
    with torch.no_grad(), _FusedAttention(), _Peak() as peak:
        call()
    return peak.most


def sampling_bytes(
    unet: nn.Module,
    first_stage: nn.Module,
    size: Sequence[int],
    images: int,
    predictions: int,
    context_length: int | None = None,
    tome: float = 0.0,
    tile: int | None = None,
    controls: Sequence[ControlNet] = (),
) -> int:
    """What sampling some images needs at least: for one prediction, or for decoding the latents, whichever is more.

    Args:
        unet, first_stage, controls: are left as they are.
        size: channels, height and width of the latents.
        images: at a time.
        predictions: of one node, twice as many as images with guidance.
        context_length, tome: as for `unet_macs`.
        tile: see `decode_tiled`; None = images are decoded whole.
        controls: control networks that run beside the encoder, each with a control image.
    """
    with without_data():
        unet, x, inputs = meta_unet(unet, size[1:], predictions, context_length, tome)
        latents, first_stage = torch.zeros(images, *size), on_meta(first_stage)
        hints = [(control, _hint(control, images, size[1:])) for control in map(on_meta, controls)]

        def encode(reads: Iterable[tuple[ControlNet, Tensor]]) -> Features:
            features, both = unet.encode(x, **inputs), (predictions // images, 1, 1, 1)
            for control, read in reads:
                features = features.plus(control.encode(x, read.repeat(both), inputs["timesteps"], inputs["context"]))
            return features

        def predict() -> Tensor:
            reads = [(control, control.read(hint)) for control, hint in hints]  # kept for all steps
            return unet.decode(encode(reads), **inputs)

        predicting = peak_bytes(predict)
        return max(predicting, peak_bytes(lambda: first_stage.decode(latents, tile=tile)))


@once_for_a_config
def decoder_bytes(
    unet: nn.Module | Mapping[str, Any],
    size: Sequence[int],
    batch: int = 1,
    context_length: int | None = None,
    tome: float = 0.0,
) -> int:
    """What one decoder node of a batch of nodes needs, in the precision of the weights: features and activations.

    Args as for `unet_macs`; a network is left as it is. Autocast to half the precision needs less.
    """
    with without_data():
        unet, x, inputs = meta_unet(unet, size, 2 * batch, context_length, tome)
        one, other = unet.encode(x, **inputs).chunk(2)
        calls = [lambda: unet.decode(Features.cat([one, other]), **inputs)]
        if unet.share(one).shared:
            # Features in common are computed once for all nodes: of two nodes, each has half of that.
            calls.append(lambda: unet.decode(unet.share(one), **inputs))
        return max(map(peak_bytes, calls)) // 2


@dataclass(frozen=True)
class Kept:
    """Bytes of what a run keeps from step to step, of one prediction and in the precision of the weights.

    features: the encoder's.
    inner:    [b]: where the decoder stands before its last b blocks.
    output:   of the prediction itself.
    shared:   what decoders that take the same features have in common.
    attention: of the layers of cross-attention.
    """

    features: int
    inner: tuple[int, ...]
    output: int
    shared: int
    attention: int = 0

    def added(self, plan: Plan, images: int = 1) -> int:
        """What a plan keeps for one image beyond what a plain run keeps.

        images: predictions of a key node for one image, 2 with guidance; of predictions only their sum is kept.
        """
        forecast = Forecast.parse(plan.propagate)
        values, more = min(METHODS[forecast.name].keep, len(plan.keys)), 0
        if Compute.DECODER in plan.levels:
            more += images * (values - 1) * self.features
            more += images * self.shared if forecast.name == "hold" and not (plan.waits or plan.branch) else 0
        if Compute.SHALLOW in plan.levels:
            more += images * values * self.inner[plan.branch]
        if Compute.GATED in plan.levels:
            more += images * values * self.attention
        return more + (values * self.output if Compute.SKIPPED in plan.levels else 0)


@once_for_a_config
def kept_bytes(
    unet: nn.Module | Mapping[str, Any], size: Sequence[int], context_length: int | None = None, tome: float = 0.0
) -> Kept:
    """What runs of a network can keep. Args as for `unet_macs`; a network is left as it is."""
    with without_data():
        unet, x, inputs = meta_unet(unet, size, 1, context_length, tome)
        attention: dict[nn.Module, Tensor] = {}
        if unet.keeps_attention:
            inputs["context"] = replace(unet.project(inputs["context"]), record=attention)
        features = unet.encode(x, **inputs)
        inner = [features]
        for blocks in reversed(range(len(features.skips))):
            inner.append(unet.advance(inner[-1], **inputs, blocks=blocks))
        shared = [(part.rest, part.conv, part.residual) for part in unet.share(features).shared]
        own = {id(tensor.untyped_storage()) for tensor in features.tensors}  # `rest` is a view
        return Kept(
            _bytes(features.tensors),
            tuple(_bytes([at.hidden]) for at in reversed(inner)),
            _bytes([unet.decode(features, **inputs)]),
            _bytes([t for part in shared for t in part if id(t.untyped_storage()) not in own]),
            _bytes(attention.values()),
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def shared_bytes(unet: nn.Module) -> int:
    """What a run needs for all its decoder nodes together: the copies of weights that they share, which are small."""
    return _bytes(weight for part in unet.part_weights() for weight in part if weight is not None)


def free_bytes(device: torch.device) -> int | None:
    """What new tensors may take; None = not known here."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def decoders_that_fit(free: int | None, each: int, shared: int) -> int | None:
    """How many decoder nodes of `each` bytes, and `shared` for all, go into one batch; None = not known."""
    return None if free is None else max(0, int(SHARE * free) - shared) // each


# Seconds: what the first call of a network costs for each shape, and a run that pays for it.


def timed(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What call() returns, and its seconds, with those of what it leaves running on a GPU."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = clock()
    result = call()
    return result, clock() - began


class WarmUp:
    """A `ConditionedNetwork` that computes each shape it meets twice, then no more; it predicts zeros.

    A run of it pays for the first calls of all shapes of the run, in little more time than these take.

    Args:
        network: what computes.
        first_calls: seconds that the first call of a shape took beyond the second, by name and shape. What is already
            there was called before in this process, and is kept.
        device: of the network.
    """

    def __init__(self, network: ConditionedNetwork, first_calls: dict[Hashable, float], device: torch.device) -> None:
        self.network, self.first_calls, self.device = network, first_calls, device
        self.seconds = 0.0  # spent in the network
        self.results: dict[Hashable, Any] = {}  # by name and shape

    def project(self, cond: Conditioning) -> Conditioning:
        return self.network.project(cond)

    def embed_time(self, t: Tensor) -> Tensor:
        return self.network.embed_time(t)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.network.parameters()

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float) -> Features:
        return self._once(("encode", len(x)), lambda: self.network.encode(x, t, cond, tome))

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float
    ) -> Features:
        return self._once(
            ("refresh", len(x), len(features.skips), blocks),
            lambda: self.network.refresh(features, x, t, cond, blocks, tome),
        )

    def part_weights(self) -> Sequence[PartWeights]:
        return self._once(("part_weights",), self.network.part_weights)

    def share(self, features: Features, weights: Sequence[PartWeights] | None) -> Features:
        return self._once(("share", len(features)), lambda: self.network.share(features, weights))

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float) -> Features:
        return self._once(
            ("advance", len(features), blocks), lambda: self.network.advance(features, t, cond, blocks, tome)
        )

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float) -> Tensor:
        # Zeros keep the latents finite, whatever the solver.
        return self._once(
            ("decode", len(t), len(features.skips), bool(features.shared)),
            lambda: torch.zeros_like(self.network.decode(features, t, cond, tome)),
        )

    def _once(self, key: Hashable, call: Callable[[], T]) -> T:
        if key not in self.results:
            _, first = timed(call, self.device)
            self.results[key], again = timed(call, self.device)
            self.first_calls.setdefault(key, max(0.0, first - again))
            self.seconds += first + again
        return self.results[key]
