"""The UNet of latent diffusion, split into an encoder and a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.context import Context, ProjectedContext
from ldm.modules.diffusionmodules.features import Features, PartWeights, SharedPart
from ldm.modules.diffusionmodules.util import (
    checkpoint,
    convolve_part,
    has_parts,
    normalization,
    timestep_embedding,
    weight_part,
    zero_module,
)
from ldm.modules.token_merging import check_ratio

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class Upsample(nn.Module):
    """Double the size (of 3-D data: height and width only) by nearest neighbour; convolve if use_conv."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        self.scale = (1.0, 2.0, 2.0) if dims == 3 else (2.0,) * dims
        self.conv = CONVOLUTIONS[dims](channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest")  # (B, C, 2H, 2W)
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halve the size (of 3-D data: height and width only) by a strided convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None) -> None:
        super().__init__()
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = CONVOLUTIONS[dims](channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = AVERAGE_POOLS[dims](stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (B, C, H/2, W/2)


class TimestepBlock(nn.Module, ABC):
    """A layer that takes the timestep: forward(x, emb). A published name."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, ...), (B, D) -> (B, C', ...)."""


class ResBlock(TimestepBlock):
    """Residual block of two convolutions; the timestep embedding enters between them.

    Args:
        channels: of the input, a multiple of 32.
        emb_channels: width of the timestep embedding.
        dropout: before the second convolution.
        out_channels: of the output; None = channels.
        use_scale_shift_norm: the embedding scales and shifts the normalised features instead of being added.
        dims: 1, 2 or 3 spatial dimensions.
        use_checkpoint: recompute the activations in the backward pass.
        up, down: also double or halve the resolution.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        conv = CONVOLUTIONS[dims]
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.in_layers = nn.Sequential(normalization(channels), nn.SiLU(), conv(channels, out_channels, 3, padding=1))
        if up:
            self.resample = Upsample(channels, use_conv=False, dims=dims)
        elif down:
            self.resample = Downsample(channels, use_conv=False, dims=dims)
        else:
            self.resample = nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(conv(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else conv(channels, out_channels, 1)

    def forward(self, x: Tensor | None, emb: Tensor, shared: SharedPart | None = None) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C_out, H', W').

        With `shared`, made of the input's last channels by `share` for a batch of B, there are n nodes, step-major: x
        is the channels before these, (n*B, C_x, H, W), or None if `shared` is of all channels; emb is (n*B, D).
        """
        return checkpoint(self._forward, x, emb, shared, enabled=self.use_checkpoint)

    def own_from(self, channels: int) -> int:
        """The first of the input's last `channels` whose normalisation group has no channel before them."""
        norm = self.in_layers[0]
        size = norm.num_channels // norm.num_groups
        return -(-(norm.num_channels - channels) // size) * size

    def shares(self, channels: int) -> bool:
        """Whether `share` is possible for the input's last `channels`: they hold a whole group, or are all."""
        width = self.in_layers[0].num_channels
        apart = all(has_parts(layer) or isinstance(layer, nn.Identity) for layer in self._entry_layers())
        return channels == width or (self.own_from(channels) < width and apart)

    def _entry_layers(self) -> tuple[nn.Module, nn.Module]:
        return self.in_layers[2], self.skip_connection

    def part_weights(self, channels: int) -> PartWeights:
        """Copies of the weights that `forward` uses for the input's other channels when `channels` are shared."""
        convolution, residual = (weight_part(layer, self.own_from(channels)) for layer in self._entry_layers())
        return convolution, residual

    def share(self, x: Tensor, weights: PartWeights = (None, None)) -> SharedPart:
        """What `forward` computes of the last channels of its input, whatever the others are.

        Normalisation works group by group and a convolution is linear in its input channels. The channels that share a
        group with others, less than a group, are left for `forward`.

        Args:
            x: the channels, (B, C_x, H, W).
            weights: see `part_weights`.
        """
        start = self.own_from(x.shape[1])
        left = start - (self.in_layers[0].num_channels - x.shape[1])
        return SharedPart(x[:, :left], *self._entry(x[:, left:], start), weights)

    def _forward(self, x: Tensor | None, emb: Tensor, shared: SharedPart | None) -> Tensor:
        norm_out, act_out, dropout, conv_out = self.out_layers
        # both (B, C_out, H', W')
        h, residual = self._entry(x) if shared is None else self._shared_entry(x, shared, len(emb) // len(shared))
        shift = self.emb_layers(emb)  # (B, C_out or 2 C_out)
        shift = shift.view(*shift.shape, *[1] * (h.ndim - 2))  # (B, ..., 1, 1)
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = norm_out(h) * (1 + scale) + shift
        else:
            h = norm_out(h + shift)
        return residual + conv_out(dropout(act_out(h)))

    def _entry(self, x: Tensor, start: int = 0, weights: PartWeights = (None, None)) -> tuple[Tensor, Tensor]:
        """First convolution and residual of the input, or their parts that come from its channels from `start` on."""
        norm, act, conv = self.in_layers
        if x.shape[1] == norm.num_channels:
            return conv(self.resample(act(norm(x)))), self.skip_connection(self.resample(x))
        h = convolve_part(conv, self.resample(act(norm.part(x, start))), start, weights[0])
        x = self.resample(x)
        if not isinstance(self.skip_connection, nn.Identity):
            return h, convolve_part(self.skip_connection, x, start, weights[1])
        after = norm.num_channels - start - x.shape[1]
        return h, F.pad(x, (*[0, 0] * (x.ndim - 2), start, after))  # zeros for the other channels

    def _shared_entry(self, x: Tensor | None, shared: SharedPart, nodes: int) -> tuple[Tensor, Tensor]:
        def tile(same: Tensor) -> Tensor:
            return same.repeat(nodes, *[1] * (same.ndim - 1))

        if x is None:
            return tile(shared.conv), tile(shared.residual)
        if shared.rest.shape[1]:
            x = torch.cat([x, tile(shared.rest)], dim=1)
        h, residual = self._entry(x, 0, shared.weights)
        for part, same in ((h, shared.conv), (residual, shared.residual)):
            part.unflatten(0, (nodes, -1)).add_(same)
        return h, residual


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map of any dimension, with a residual.

    Args:
        channels: of the map, a multiple of 32 and of num_heads.
        num_heads: number of heads.
        use_checkpoint: recompute the activations in the backward pass.
        use_new_attention_order: the projection is [q | k | v] with each of them split into heads, and not
            split into heads with each of them [q | k | v].
    """

    def __init__(
        self, channels: int, num_heads: int = 1, use_checkpoint: bool = False, use_new_attention_order: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)."""
        return checkpoint(self._forward, x, enabled=self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))  # (B, 3C, L)
        return x + self.proj_out(_attend(qkv, self.num_heads, self.use_new_attention_order)).view_as(x)


def _attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """Self-attention from its projections, (B, 3C, L) -> (B, C, L); for the order see `AttentionBlock`."""
    qkv = qkv.mT.contiguous()  # (B, L, 3C)
    if new_order:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # (B, L, heads, d)
    else:
        q, k, v = qkv.unflatten(-1, (heads, 3, -1)).unbind(3)  # (B, L, heads, d)
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attended.transpose(1, 2).flatten(2).mT  # (B, C, L)


class QKVAttention(nn.Module):
    """Self-attention from its projections in the order [q | k | v], each split into heads. A published name."""

    new_order = True

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(B, 3C, L) -> (B, C, L)."""
        return _attend(qkv, self.n_heads, self.new_order)


class QKVAttentionLegacy(QKVAttention):
    """The same in the order of heads, each of them [q | k | v]."""

    new_order = False


class AttentionPool2d(nn.Module):
    """A map's mean as a token that attends to itself and to all positions, (B, C, H, W) -> (B, C_out).

    Args:
        spacial_dim: height and width of the map, as published.
        embed_dim: its channels.
        num_heads_channels: channels of one head.
        output_dim: None = embed_dim.

    Source: CLIP (arXiv 2103.00020), section 2.4.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, spacial_dim**2 + 1) / embed_dim**0.5)
        self.qkv_proj = nn.Conv1d(embed_dim, 3 * embed_dim, 1)
        self.c_proj = nn.Conv1d(embed_dim, output_dim or embed_dim, 1)
        self.attention = QKVAttention(embed_dim // num_heads_channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)  # (B, C, L)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2) + self.positional_embedding
        return self.c_proj(self.attention(self.qkv_proj(tokens)))[..., 0]


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row, each given what it takes of the timestep embedding, the context and token merging.

    `shared` is for the first layer, a `ResBlock`.
    """

    def forward(
        self,
        x: Tensor | None,
        emb: Tensor,
        context: Context | None = None,
        tome: float = 0.0,
        shared: SharedPart | None = None,
    ) -> Tensor:
        for layer in self:
            if shared is not None:
                x, shared = layer(x, emb, shared), None
            elif isinstance(layer, TimestepBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, tome)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet.

    channels:         of its features.
    res_blocks:       residual blocks in the encoder; the decoder has one more.
    attention_blocks: how many of them, in encoder and decoder each, are followed by attention.
    context_only:     its transformers attend to the context only.
    """

    channels: int
    res_blocks: int
    attention_blocks: int
    context_only: bool


def _levels(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    num_attention_blocks: Sequence[int] | None,
    disable_self_attentions: Sequence[bool] | None,
) -> list[Level]:
    """The levels, finest first, that UNetModel's arguments describe."""
    count = len(channel_mult)
    res_blocks = [num_res_blocks] * count if isinstance(num_res_blocks, int) else list(num_res_blocks)
    # No limit given means every residual block, also the additional one of the decoder.
    attention = [n + 1 for n in res_blocks] if num_attention_blocks is None else list(num_attention_blocks)
    context_only = [False] * count if disable_self_attentions is None else list(disable_self_attentions)
    for name, values in (
        ("num_res_blocks", res_blocks),
        ("num_attention_blocks", attention),
        ("disable_self_attentions", context_only),
    ):
        if len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} levels of channel_mult; got {values}")
    if num_attention_blocks is not None and any(a > r for a, r in zip(attention, res_blocks, strict=True)):
        raise ValueError(f"num_attention_blocks must not exceed num_res_blocks {res_blocks}; got {attention}")
    attention = [n if 2**i in attention_resolutions else 0 for i, n in enumerate(attention)]
    channels = [model_channels * mult for mult in channel_mult]
    return list(map(Level, channels, res_blocks, attention, context_only))


@dataclass(frozen=True)
class Attention:
    """How one UNet builds its attention layers; the fields are arguments of UNetModel."""

    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    legacy: bool
    use_spatial_transformer: bool
    transformer_depth: int
    context_dim: int | None
    use_linear: bool
    use_new_attention_order: bool
    use_checkpoint: bool

    def __post_init__(self) -> None:
        if self.num_heads == -1 and self.num_head_channels == -1:
            raise ValueError("num_heads or num_head_channels must be given; got -1 for both")
        if self.use_spatial_transformer and self.context_dim is None:
            raise ValueError(
                "context_dim, the width of the context tokens, must be given "
                "with use_spatial_transformer=True; got None"
            )
        if self.context_dim is not None and not self.use_spatial_transformer:
            raise ValueError(
                f"context_dim must be None without use_spatial_transformer, as plain attention "
                f"takes no context; got {self.context_dim}"
            )

    def __call__(self, channels: int, context_only: bool = False, decoder: bool = False) -> nn.Module:
        heads = self._heads(channels, decoder)
        if self.use_spatial_transformer:
            return SpatialTransformer(
                channels,
                heads,
                channels // heads,
                depth=self.transformer_depth,
                context_dim=self.context_dim,
                disable_self_attn=context_only,
                use_linear=self.use_linear,
                use_checkpoint=self.use_checkpoint,
            )
        return AttentionBlock(channels, heads, self.use_checkpoint, self.use_new_attention_order)

    def _heads(self, channels: int, decoder: bool) -> int:
        """Number of heads of a layer, by the published arithmetic."""
        name, parts = "num_heads", self.num_heads
        if self.num_head_channels != -1:
            name, parts = "num_head_channels", self.num_head_channels
        elif self.legacy and decoder and not self.use_spatial_transformer and self.num_heads_upsample != -1:
            name, parts = "num_heads_upsample", self.num_heads_upsample
        if parts < 1 or channels % parts:
            raise ValueError(f"{name} must divide the {channels} channels of an attention layer; got {parts}")
        return channels // parts if name == "num_head_channels" else parts


def _label_embedding(num_classes: int | str, adm_in_channels: int | None, width: int) -> nn.Module:
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, width)
    if num_classes == "continuous":
        return nn.Linear(1, width)
    if num_classes == "sequential" and adm_in_channels is not None:
        layers = nn.Linear(adm_in_channels, width), nn.SiLU(), nn.Linear(width, width)
        return nn.Sequential(nn.Sequential(*layers))
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
        transformer_depth: blocks in one spatial transformer.
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
        transformer_depth: int = 1,
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
        levels = _levels(
            model_channels,
            channel_mult,
            num_res_blocks,
            attention_resolutions,
            num_attention_blocks,
            disable_self_attentions,
        )
        attention = Attention(
            num_heads,
            num_head_channels,
            num_heads_upsample,
            legacy,
            use_spatial_transformer,
            transformer_depth,
            context_dim,
            use_linear_in_transformer,
            use_new_attention_order,
            use_checkpoint,
        )
        emb_channels = 4 * model_channels
        res = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            dims=dims,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )
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
        self.merges_tokens = use_spatial_transformer and levels[0].attention_blocks > 0 and not levels[0].context_only

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, adm_in_channels, emb_channels)
        self.input_blocks, widths = _encoder(levels, conv(in_channels, model_channels), res, attention, down)
        middle = widths[-1]
        self.middle_block = TimestepEmbedSequential(
            res(middle), attention(middle, disable_middle_self_attn), res(middle)
        )
        self.output_blocks = _decoder(levels, widths, res, attention, up)
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
            if isinstance(block, BasicTransformerBlock):
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
        on a CPU. Packed layers have copies of their own.
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
        check_ratio(tome)
        if tome and not self.merges_tokens:
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


def _encoder(
    levels: Sequence[Level],
    conv_in: nn.Module,
    res: Callable[..., nn.Module],
    attention: Attention,
    down: Callable[[int], nn.Module],
) -> tuple[nn.ModuleList, list[int]]:
    """Input blocks, and the channels that each of them puts out."""
    blocks, widths = [TimestepEmbedSequential(conv_in)], [conv_in.out_channels]
    for level in levels:
        for i in range(level.res_blocks):
            layers = [res(widths[-1], out_channels=level.channels)]
            if i < level.attention_blocks:
                layers.append(attention(level.channels, level.context_only))
            blocks.append(TimestepEmbedSequential(*layers))
            widths.append(level.channels)
        if level is not levels[-1]:
            blocks.append(TimestepEmbedSequential(down(widths[-1])))
            widths.append(widths[-1])
    return nn.ModuleList(blocks), widths


def _decoder(
    levels: Sequence[Level],
    widths: Sequence[int],
    res: Callable[..., nn.Module],
    attention: Attention,
    up: Callable[[int], nn.Module],
) -> nn.ModuleList:
    """Output blocks; each takes the skip of one input block, last to first."""
    blocks, channels, skips = [], widths[-1], iter(reversed(widths))
    for level in reversed(levels):
        for i in range(level.res_blocks + 1):
            layers = [res(channels + next(skips), out_channels=level.channels)]
            channels = level.channels
            if i < level.attention_blocks:
                layers.append(attention(channels, level.context_only, decoder=True))
            if i == level.res_blocks and level is not levels[0]:
                layers.append(up(channels))
            blocks.append(TimestepEmbedSequential(*layers))
    return nn.ModuleList(blocks)


class EncoderUNetModel(nn.Module):
    """The encoder half of the UNet with one output vector: a classifier of noisy images, under its published names.

    Args:
        pool: how a map becomes a vector: "adaptive" (mean), "attention", or "spatial" and "spatial_v2" (the means of
            all blocks' outputs, then two layers).
        The rest: see `UNetModel`.

    Raises:
        ValueError: arguments that do not fit together, or an unknown pool.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",
    ) -> None:
        super().__init__()
        levels = _levels(model_channels, channel_mult, num_res_blocks, attention_resolutions, None, None)
        attention = Attention(
            num_heads,
            num_head_channels,
            num_heads_upsample,
            True,
            False,
            1,
            None,
            False,
            use_new_attention_order,
            use_checkpoint,
        )
        emb_channels = 4 * model_channels
        res = partial(
            ResBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            dims=dims,
            use_scale_shift_norm=use_scale_shift_norm,
            use_checkpoint=use_checkpoint,
        )
        down = partial(res, down=True) if resblock_updown else partial(Downsample, use_conv=conv_resample, dims=dims)
        self.model_channels, self.pool, self.use_fp16 = model_channels, pool, use_fp16
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        conv_in = CONVOLUTIONS[dims](in_channels, model_channels, 3, padding=1)
        self.input_blocks, widths = _encoder(levels, conv_in, res, attention, down)
        middle = widths[-1]
        self.middle_block = TimestepEmbedSequential(res(middle), attention(middle), res(middle))
        if pool == "adaptive":
            self.out = nn.Sequential(
                normalization(middle),
                nn.SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zero_module(CONVOLUTIONS[dims](middle, out_channels, 1)),
                nn.Flatten(),
            )
        elif pool == "attention":
            side = image_size // 2 ** (len(levels) - 1)
            self.out = nn.Sequential(
                normalization(middle), nn.SiLU(), AttentionPool2d(side, middle, num_head_channels, out_channels)
            )
        elif pool in ("spatial", "spatial_v2"):
            between = [nn.ReLU()] if pool == "spatial" else [normalization(2048), nn.SiLU()]
            self.out = nn.Sequential(nn.Linear(sum(widths) + middle, 2048), *between, nn.Linear(2048, out_channels))
        else:
            raise ValueError(f"pool must be one of adaptive, attention, spatial, spatial_v2; got {pool!r}")

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """(B, C_in, H, W), (B,) -> (B, C_out)."""
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        h, means = x.to(dtype), []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)  # (B, C_i, H_i, W_i)
            means.append(h.flatten(2).mean(2))
        return self.out(torch.cat(means, dim=1) if self.pool.startswith("spatial") else h)
