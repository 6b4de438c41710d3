"""The UNet of latent diffusion, split into an encoder and a decoder; the same without data, to follow its shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial, wraps
from itertools import chain, pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.modules.attention import BasicTransformerBlock, Context, ProjectedContext
from ldm.modules.diffusionmodules.classifier import EncoderUNetModel
from ldm.modules.diffusionmodules.unet_layers import (
    CONVOLUTIONS,
    Attention,
    AttentionBlock,
    AttentionPool2d,
    ContextLayer,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
    embedding,
    input_blocks,
    output_blocks,
    residual,
    unet_levels,
)
from ldm.modules.diffusionmodules.util import (
    Features,
    PartWeights,
    Unfilled,
    normalization,
    timestep_embedding,
    zero_module,
)
from ldm.modules.token_merging import check_ratio
from ldm.util import instantiate_from_config

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "QKVAttention",
    "QKVAttentionLegacy",
    "ResBlock",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
]  # the published names of this module


def _label_embedding(num_classes: int | str, adm_in_channels: int | None, width: int) -> nn.Module:
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, width)
    if num_classes == "continuous":
        return nn.Linear(1, width)
    if num_classes == "sequential" and adm_in_channels is not None:
        return nn.Sequential(embedding(adm_in_channels, width))
    raise ValueError(
        f"num_classes must be a number of classes, 'continuous', 'sequential' together with "
        f"adm_in_channels, or None; got {num_classes!r} with adm_in_channels={adm_in_channels}"
    )


class UNetModel(nn.Module):
    """UNet with attention, conditioned on the timestep and, if built so, on context tokens and a label y.

    Args:
        image_size: nominal height and width of the input; any size that divides into the levels works.
        in_channels: channels of the input.
        model_channels: channels of the first level for each unit of channel_mult, a multiple of 32.
        out_channels: channels of the output.
        num_res_blocks: residual blocks per level of the encoder (the decoder has one more), or one number
            for each level.
        attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels that have attention.
        dropout: inside residual blocks.
        channel_mult: channels of each level as a multiple of model_channels.
        conv_resample: resample between levels with convolutions.
        dims: 1, 2 or 3 spatial dimensions; of 3 the first is never resampled.
        num_classes: number of class labels, 'continuous' (y is one number) or 'sequential' (y is a vector of
            adm_in_channels numbers); None = y is not taken.
        use_checkpoint: recompute the blocks' activations in the backward pass, to save memory in training.
        use_fp16: the publisher's hint that the weights tolerate float16. Kept for the caller who picks the
            precision (autocast, `unet.half()`); the network computes in the precision of its weights.
        num_heads: attention heads; -1 = given by num_head_channels.
        num_head_channels: channels of one head; -1 = given by num_heads.
        num_heads_upsample: heads of the decoder's plain attention, if legacy; -1 = num_heads.
        use_scale_shift_norm: the timestep scales and shifts the features of residual blocks.
        resblock_updown: resample between levels with residual blocks.
        use_new_attention_order: see AttentionBlock.
        use_spatial_transformer: spatial transformers, which take a context, instead of plain self-attention.
        transformer_depth: blocks in one spatial transformer, or in one of each level; the middle block's has as many as
            the last level's.
        context_dim: width of the context tokens, with spatial transformers.
        n_embed: predict the logits of that many codebook entries instead of out_channels.
        legacy: whether num_heads_upsample is heeded.
        disable_self_attentions: for each level, whether its transformers attend to the context only.
        num_attention_blocks: for each level, how many residual blocks are followed by attention; None = all.
        disable_middle_self_attn: as disable_self_attentions, for the middle block.
        use_linear_in_transformer: see SpatialTransformer.use_linear.
        adm_in_channels: width of y with num_classes 'sequential'.

    Raises:
        ValueError: arguments that do not fit together.

    Source: Ho et al. (arXiv 2006.11239), Dhariwal and Nichol (arXiv 2105.05233), Rombach et al. (arXiv
    2112.10752); the split into encoder and decoder: Faster Diffusion (arXiv 2312.09608).
    """

    small_map = 0  # the widest map whose convolutions are not packed, see `ldm.modules.packed`

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,
    ) -> None:
        super().__init__()
        if dims not in CONVOLUTIONS or (use_spatial_transformer and dims != 2):
            raise ValueError(f"dims must be 1, 2 or 3, and 2 with use_spatial_transformer; got {dims}")
        levels = unet_levels(
            model_channels,
            channel_mult,
            num_res_blocks,
            attention_resolutions,
            num_attention_blocks,
            disable_self_attentions,
            transformer_depth,
        )
        attention = Attention(
            num_heads,
            num_head_channels,
            num_heads_upsample,
            legacy,
            use_spatial_transformer,
            context_dim,
            use_linear_in_transformer,
            use_new_attention_order,
            use_checkpoint,
        )
        emb_channels = 4 * model_channels
        res = residual(emb_channels, dropout, dims, use_scale_shift_norm, use_checkpoint)
        if resblock_updown:
            down, up = partial(res, down=True), partial(res, up=True)
        else:
            down, up = (partial(kind, use_conv=conv_resample, dims=dims) for kind in (Downsample, Upsample))
        conv = partial(CONVOLUTIONS[dims], kernel_size=3, padding=1)

        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.dims = dims
        self.num_classes = num_classes
        self.adm_in_channels = adm_in_channels
        self.context_dim = context_dim
        self.use_fp16 = use_fp16
        self.downsampling = 2 ** (len(levels) - 1)
        self.finest = levels[0].res_blocks + 1  # blocks of the finest level, on each side
        self.keeps_attention = use_spatial_transformer and context_dim is not None
        self.merges_tokens = use_spatial_transformer and levels[0].attention_blocks > 0 and not levels[0].context_only

        self.time_embed = embedding(model_channels, emb_channels)
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, adm_in_channels, emb_channels)
        self.input_blocks, widths = input_blocks(levels, conv(in_channels, model_channels), res, attention, down)
        middle = widths[-1]
        self.middle_block = TimestepEmbedSequential(
            res(middle), attention(middle, disable_middle_self_attn, depth=levels[-1].depth), res(middle)
        )
        self.output_blocks = output_blocks(levels, widths, res, attention, up)
        last = levels[0].channels
        self.out = nn.Sequential(normalization(last), nn.SiLU(), zero_module(conv(last, out_channels)))
        self.id_predictor = (
            None if n_embed is None else nn.Sequential(normalization(last), CONVOLUTIONS[dims](last, n_embed, 1))
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, to which inputs are cast."""
        return self.time_embed[0].weight.dtype

    def project(self, context: Tensor) -> ProjectedContext:
        """Keys and values of a context (B, L, context_dim), which are the same at every step.

        Raises:
            ValueError: a shape that does not fit, or this network takes no context.
        """
        context = self._checked_context(context, len(context))
        projections = {}
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock | ContextLayer):
                projections |= block.projections(context)
        return ProjectedContext(projections, len(context))

    def encode(
        self, x: Tensor, timesteps: Tensor, context: Context | None = None, y: Tensor | None = None, tome: float = 0.0
    ) -> Features:
        """The part that encoder propagation skips: input blocks and middle block.

        Args:
            x: (B, C_in, H, W); H and W multiples of `downsampling`.
            timesteps: (B,), training timesteps 0..T-1, integer or fractional.
            context: (B, L, context_dim), with spatial transformers; or what `project` made of it.
            y: (B,) class index, or (B, 1), (B, adm_in_channels) by num_classes.
            tome: share of the finest level's tokens that are merged for self-attention, 0..0.75; see `Merging`.

        Raises:
            ValueError: a shape that does not fit, context or y missing or superfluous, or tokens to merge where
                there are none.
        """
        self._check_input(x)
        self.check_merging(tome)
        context = self._checked_context(context, len(x))
        emb = self.embed(timesteps, y, len(x))  # (B, D)
        skips = self._outer(x, emb, context, len(self.input_blocks), tome)
        h = self.middle_block(skips[-1], emb, context)  # (B, C_mid, h, w)
        return Features(hidden=h, skips=skips)

    def encode_outer(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Context | None = None,
        y: Tensor | None = None,
        blocks: int = 1,
        tome: float = 0.0,
    ) -> tuple[Tensor, ...]:
        """The outputs of the first `blocks` input blocks alone, each (B, C_i, H_i, W_i); arguments as for `encode`.

        Raises:
            ValueError: as `encode`, or blocks is not in 1..len(input_blocks).
        """
        if not 1 <= blocks <= len(self.input_blocks):
            raise ValueError(f"blocks must be 1..{len(self.input_blocks)}, the input blocks; got {blocks}")
        self._check_input(x)
        self.check_merging(tome)
        context = self._checked_context(context, len(x))
        return self._outer(x, self.embed(timesteps, y, len(x)), context, blocks, tome)

    def _outer(self, x: Tensor, emb: Tensor, context: Context | None, blocks: int, tome: float) -> tuple[Tensor, ...]:
        h, skips = x.to(self.dtype), []  # (B, C_in, H, W)
        for i, block in enumerate(self.input_blocks[:blocks]):
            h = block(h, emb, context, tome if i < self.finest else 0.0)  # (B, C_i, H_i, W_i)
            skips.append(h)
        return tuple(skips)

    def advance(
        self,
        features: Features,
        timesteps: Tensor,
        context: Context | None = None,
        y: Tensor | None = None,
        blocks: int = 0,
        tome: float = 0.0,
    ) -> Features:
        """Decode until `blocks` output blocks remain; arguments as for `decode`, but nothing shared is used.

        Raises:
            ValueError: as `decode`, or fewer blocks than that remain already.
        """
        h = self._advanced(replace(features, shared=()), timesteps, context, y, blocks, tome)
        return Features(h, features.skips[:blocks])

    def _advanced(
        self, features: Features, timesteps: Tensor, context: Context | None, y: Tensor | None, blocks: int, tome: float
    ) -> Tensor:
        """What goes into the last `blocks` output blocks, (B, C, H, W)."""
        self._check_skips(features, blocks)
        self.check_merging(tome)
        # The hidden features of shared ones are in what the first block shares.
        h, batch = (None, len(timesteps)) if features.shared else (features.hidden, len(features))
        context = self._checked_context(context, batch)
        emb = self.embed(timesteps, y, batch)  # (B, D): of this step
        for i in reversed(range(blocks, len(features.skips))):
            block, share = self.output_blocks[-1 - i], tome if i < self.finest else 0.0
            if features.shared:
                h = block(h, emb, context, share, features.shared[i])
            else:
                h = block(torch.cat([h, features.skips[i]], dim=1), emb, context, share)  # (B, C_i, H_i, W_i)
        return h

    def _skip_widths(self) -> list[int]:
        """Channels of the skip that each output block takes, without the first's."""
        return [
            block.in_layers[0].num_channels - before.out_layers[0].num_channels
            for (before, *_), (block, *_) in pairwise(self.output_blocks)
        ]

    def shared_from(self) -> dict[str, int]:
        """The convolutions of which `share` computes a part, by name, and the first input channel of that part."""
        cuts = {}
        for i, skip in enumerate(self._skip_widths(), start=1):
            block = self.output_blocks[i][0]
            if block.shares(skip):
                start = block.own_from(skip)
                cuts |= {f"output_blocks.{i}.0.{name}": start for name in ("in_layers.2", "skip_connection")}
        return cuts

    def part_weights(self) -> tuple[PartWeights, ...]:
        """Copies of weights for `share`, made once for a run: for each skip, the outermost first.

        A convolution copies a slice of its weight at every call: a tenth of a decoder's time for one image of emoji64
        on a CPU. Large weights are not copied here, to save memory; packed layers have copies of their own.
        """
        others = zip(self.output_blocks[1:], self._skip_widths(), strict=True)
        return (*reversed([block.part_weights(skip) for (block, *_), skip in others]), (None, None))

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        """The features with the part of every output block that depends on them alone, for decoders at many timesteps.

        That is the first block up to the timestep embedding, and of the others the first convolution and the residual
        of the skip's channels, as far as these are normalised in groups of their own. Decoding gives the same up to
        rounding. Where that is not possible for some block (`ResBlock.shares`), the features come back as they are.

        Args:
            features: of this network.
            weights: what `part_weights` made; None = nothing, which is as right, and slower on small maps.

        Raises:
            ValueError: features of another network.
        """
        self._check_skips(features, 0)
        if not features.skips:
            return features
        *skips, innermost = features.skips
        inputs = [*skips, torch.cat([features.hidden, innermost], dim=1)]
        blocks = [self.output_blocks[-1 - i][0] for i in range(len(inputs))]
        pairs = list(zip(blocks, inputs, strict=True))
        if not all(block.shares(x.shape[1]) for block, x in pairs):
            return features
        weights = weights[: len(pairs)] if weights else [(None, None)] * len(pairs)
        shared = tuple(block.share(x, own) for (block, x), own in zip(pairs, weights, strict=True))
        return replace(features, shared=shared)

    def decode(
        self,
        features: Features,
        timesteps: Tensor,
        context: Context | None = None,
        y: Tensor | None = None,
        tome: float = 0.0,
    ) -> Tensor:
        """The prediction (B, C_out, H, W) at `timesteps` from features of the same or an earlier step.

        Args:
            features: of this network, of batch B (`Features.cat` those of several steps for one batch); or made by
                `share`, of a batch that goes n times into B: those of n steps, step-major.
            timesteps, context, y, tome: as for `encode`, of this step, not of the key step.

        Raises:
            ValueError: as `encode`, or features of another network.
        """
        h = self._advanced(features, timesteps, context, y, 0, tome)
        return self.out(h) if self.id_predictor is None else self.id_predictor(h)

    def forward(self, x: Tensor, timesteps: Tensor, context: Context | None = None, y: Tensor | None = None) -> Tensor:
        """`encode` and `decode` at the same timesteps: (B, C_in, H, W) -> (B, C_out, H, W)."""
        return self.decode(self.encode(x, timesteps, context, y), timesteps, context, y)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embedding of timesteps alone, (B,) -> (B, D)."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))

    def embed(self, timesteps: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """Embedding (B, D) of timesteps and label, which every residual block takes."""
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps must have shape ({batch},), one for each sample; got {tuple(timesteps.shape)}")
        emb = self.embed_time(timesteps)
        if self.num_classes is None:
            if y is not None:
                raise ValueError("y must be None: this network has no num_classes")
            return emb
        width = {"continuous": (1,), "sequential": (self.adm_in_channels,)}.get(self.num_classes, ())
        if y is None or y.shape != (batch, *width):
            raise ValueError(
                f"y must have shape {(batch, *width)} for num_classes={self.num_classes!r}; "
                f"got {None if y is None else tuple(y.shape)}"
            )
        return emb + self.label_emb(y.to(self.dtype) if width else y)

    def check_merging(self, tome: float) -> None:
        """Raise ValueError unless that share of tokens can be merged in this network."""
        if not tome:
            return
        check_ratio(tome)
        if not self.merges_tokens:
            raise ValueError(
                "this network has no self-attention in spatial transformers at its finest level, so there "
                f"are no tokens to merge; accepted: 0; got {tome:g}"
            )

    def _check_skips(self, features: Features, blocks: int) -> None:
        if not 0 <= blocks <= len(features.skips) <= len(self.output_blocks):
            raise ValueError(
                f"features must have {max(blocks, 1)}..{len(self.output_blocks)} skips for this network; "
                f"got {len(features.skips)}"
            )

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 2 + self.dims or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x must have shape (B, {self.in_channels}, ...) with {self.dims} spatial "
                f"dimensions; got {tuple(x.shape)}"
            )
        # The last two sizes, or the only one, are what the levels halve.
        if any(size % self.downsampling for size in x.shape[2:][-2:]):
            raise ValueError(
                f"x must have height and width that are multiples of {self.downsampling}; got {tuple(x.shape)}"
            )

    def _checked_context(self, context: Context | None, batch: int) -> Context | None:
        if self.context_dim is None:
            if context is not None:
                raise ValueError("context must be None: this network has no spatial transformers")
            return None
        if isinstance(context, ProjectedContext):
            if len(context) != batch:
                raise ValueError(f"context must be for {batch} samples; got one projected for {len(context)}")
            return context
        if context is None or context.ndim != 3 or context.shape[::2] != (batch, self.context_dim):
            raise ValueError(
                f"context must have shape ({batch}, L, {self.context_dim}); "
                f"got {None if context is None else tuple(context.shape)}"
            )
        return context.to(self.dtype)


# A UNet without data, whose shapes can be followed and counted without computing anything

Given = ParamSpec("Given")
Found = TypeVar("Found")


class _Shapes(TorchDispatchMode):
    """What norms and sums put out without data; PyTorch takes each apart into a dozen operations in Python."""

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_group_norm.default:
            x, _, _, batch, _, _, groups, _ = args
            return x.new_empty(x.shape), x.new_empty(batch, groups), x.new_empty(batch, groups)
        if func is torch.ops.aten.native_layer_norm.default:
            x, shape = args[:2]
            kept = (*x.shape[: -len(shape)], *(1 for _ in shape))
            return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept)
        if func is torch.ops.aten.add.Tensor and _alike(*args):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _alike(one: Any, other: Any) -> bool:
    """Whether both are tensors of the same kind and layout."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype


@contextmanager
def without_data() -> Iterator[None]:
    """Tensors that are made inside have a shape and no data."""
    with torch.device("meta"), torch.no_grad(), _Shapes():
        yield


def once_for_a_config(
    find: Callable[Concatenate[nn.Module | Mapping[str, Any], Sequence[int], Given], Found],
) -> Callable[Concatenate[nn.Module | Mapping[str, Any], Sequence[int], Given], Found]:
    """A function of a UNet without data, or of its config, and of the size of its latents.

    For a config it is computed once in a process, however often the network is built; a network is looked at anew.
    """

    @lru_cache
    def find_once(config: str, size: tuple[int, ...], *rest: Any, **named: Any) -> Found:
        return find(OmegaConf.create(config), size, *rest, **named)

    @wraps(find)
    def found(
        unet: nn.Module | Mapping[str, Any], size: Sequence[int], *rest: Given.args, **named: Given.kwargs
    ) -> Found:
        if isinstance(unet, nn.Module):
            return find(unet, size, *rest, **named)
        return find_once(OmegaConf.to_yaml(OmegaConf.create(unet), sort_keys=True), (*size,), *rest, **named)

    return found


def meta_unet(
    unet: nn.Module | Mapping[str, Any], size: Sequence[int], batch: int, context_length: int | None, tome: float
) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The UNet without data, an x for it, and the other arguments of its `encode`; to be called on the meta device."""
    with Unfilled():
        unet = instantiate_from_config(unet) if isinstance(unet, Mapping) else on_meta(unet)
    inputs = {"timesteps": torch.zeros(batch), "context": None, "y": None, "tome": tome}
    if context_length is not None:
        inputs["context"] = torch.zeros(batch, context_length, unet.context_dim)
    if unet.num_classes is not None:
        inputs["y"] = _label(unet, batch)
    return unet, torch.zeros(batch, unet.in_channels, *size), inputs


def _label(unet: nn.Module, batch: int) -> Tensor:
    if isinstance(unet.num_classes, int):
        return torch.zeros(batch, dtype=torch.long)
    return torch.zeros(batch, unet.adm_in_channels or 1)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of the module without its data."""
    tensors = chain(module.parameters(), module.buffers())
    memo = {}
    for tensor in tensors:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)
