"""The layers of the UNet (residual blocks, attention, changes of resolution), and the blocks that are built of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import Context, SpatialTransformer
from ldm.modules.diffusionmodules.util import (
    PartWeights,
    SharedPart,
    checkpoint,
    convolve_part,
    has_parts,
    normalization,
    weight_part,
    zero_module,
)

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


class TokenConvolution(nn.Conv1d):
    """A linear layer over tokens, (B, L, C) -> (B, L, C'), whose weight has the shape of a convolution of width 1."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight[..., 0], self.bias)


class TimestepBlock(nn.Module, ABC):
    """A layer that takes the timestep: forward(x, emb). A published name."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, ...), (B, D) -> (B, C', ...)."""


class ContextLayer(nn.Module, ABC):
    """A layer that takes a context: forward(x, context, tome)."""

    @abstractmethod
    def forward(self, x: Tensor, context: Context, tome: float = 0.0) -> Tensor:
        """(B, C, H, W), the context, the share of tokens to merge -> (B, C, H, W)."""

    @abstractmethod
    def projections(self, context: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Keys and values of a context (B, L, D), see `ProjectedContext`."""


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
            elif isinstance(layer, SpatialTransformer | ContextLayer):
                x = layer(x, context, tome)
            else:
                x = layer(x)
        return x


# How a UNet is built: its resolutions, its attention layers, the blocks of its encoder and decoder.


@dataclass(frozen=True)
class Level:
    """One resolution of the UNet.

    channels:         of its features.
    res_blocks:       residual blocks in the encoder; the decoder has one more.
    attention_blocks: how many of them, in encoder and decoder each, are followed by attention.
    context_only:     its transformers attend to the context only.
    depth:            blocks in each of its transformers.
    """

    channels: int
    res_blocks: int
    attention_blocks: int
    context_only: bool
    depth: int = 1


def unet_levels(
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int | Sequence[int],
    attention_resolutions: Sequence[int],
    num_attention_blocks: Sequence[int] | None,
    disable_self_attentions: Sequence[bool] | None,
    transformer_depth: int | Sequence[int] = 1,
) -> list[Level]:
    """The levels, finest first, that UNetModel's arguments describe."""
    count = len(channel_mult)
    res_blocks = [num_res_blocks] * count if isinstance(num_res_blocks, int) else list(num_res_blocks)
    # No limit given means every residual block, also the additional one of the decoder.
    attention = [n + 1 for n in res_blocks] if num_attention_blocks is None else list(num_attention_blocks)
    context_only = [False] * count if disable_self_attentions is None else list(disable_self_attentions)
    depths = [transformer_depth] * count if isinstance(transformer_depth, int) else list(transformer_depth)
    for name, values in (
        ("num_res_blocks", res_blocks),
        ("num_attention_blocks", attention),
        ("disable_self_attentions", context_only),
        ("transformer_depth", depths),
    ):
        if len(values) != count:
            raise ValueError(f"{name} must have one entry for each of the {count} levels of channel_mult; got {values}")
    if num_attention_blocks is not None and any(a > r for a, r in zip(attention, res_blocks, strict=True)):
        raise ValueError(f"num_attention_blocks must not exceed num_res_blocks {res_blocks}; got {attention}")
    attention = [n if 2**i in attention_resolutions else 0 for i, n in enumerate(attention)]
    channels = [model_channels * mult for mult in channel_mult]
    return list(map(Level, channels, res_blocks, attention, context_only, depths))


def embedding(given: int, width: int) -> nn.Sequential:
    """The two layers by which numbers (B, given), of a timestep for example, become an embedding (B, width)."""
    return nn.Sequential(nn.Linear(given, width), nn.SiLU(), nn.Linear(width, width))


def residual(
    emb_channels: int, dropout: float, dims: int, use_scale_shift_norm: bool, use_checkpoint: bool
) -> Callable[..., ResBlock]:
    """What makes the residual blocks of one UNet; the arguments are UNetModel's, and the width of its embedding."""
    return partial(
        ResBlock,
        emb_channels=emb_channels,
        dropout=dropout,
        dims=dims,
        use_scale_shift_norm=use_scale_shift_norm,
        use_checkpoint=use_checkpoint,
    )


@dataclass(frozen=True)
class Attention:
    """How one UNet builds its attention layers; the fields are arguments of UNetModel."""

    num_heads: int
    num_head_channels: int
    num_heads_upsample: int
    legacy: bool
    use_spatial_transformer: bool
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

    def __call__(self, channels: int, context_only: bool = False, decoder: bool = False, depth: int = 1) -> nn.Module:
        heads = self._heads(channels, decoder)
        if self.use_spatial_transformer:
            return SpatialTransformer(
                channels,
                heads,
                channels // heads,
                depth=depth,
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


def input_blocks(
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
                layers.append(attention(level.channels, level.context_only, depth=level.depth))
            blocks.append(TimestepEmbedSequential(*layers))
            widths.append(level.channels)
        if level is not levels[-1]:
            blocks.append(TimestepEmbedSequential(down(widths[-1])))
            widths.append(widths[-1])
    return nn.ModuleList(blocks), widths


def output_blocks(
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
                layers.append(attention(channels, level.context_only, decoder=True, depth=level.depth))
            if i == level.res_blocks and level is not levels[0]:
                layers.append(up(channels))
            blocks.append(TimestepEmbedSequential(*layers))
    return nn.ModuleList(blocks)
