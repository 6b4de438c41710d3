"""How a UNet is built: its resolutions, its attention layers, the blocks of its encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.unet_layers import AttentionBlock, ResBlock, TimestepEmbedSequential


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


def unet_levels(
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
                layers.append(attention(level.channels, level.context_only))
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
                layers.append(attention(channels, level.context_only, decoder=True))
            if i == level.res_blocks and level is not levels[0]:
                layers.append(up(channels))
            blocks.append(TimestepEmbedSequential(*layers))
    return nn.ModuleList(blocks)
