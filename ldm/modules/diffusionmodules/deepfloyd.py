"""The UNets of DeepFloyd-IF: pixels under the states of T5, split into encoder and decoder as every `UNetModel`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import Context, ProjectedContext, to_map, to_tokens
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.unet_layers import (
    ContextLayer,
    ResBlock,
    TimestepEmbedSequential,
    TokenConvolution,
    input_blocks,
    output_blocks,
    unet_levels,
)
from ldm.modules.diffusionmodules.util import normalization, timestep_embedding, zero_module

SKIP_SCALE = 0.7071  # as published, of the sum of a residual block in the second stage


def _embedding(given: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(given, width), nn.GELU(), nn.Linear(width, width))


class _ResBlock(ResBlock):
    """A residual block with GELU.

    Args:
        activated: the embedding comes with its activation.
        scale: of the sum.
        rest: see `ResBlock`.
    """

    def __init__(self, channels: int, activated: bool, scale: float, **rest: int | float | bool) -> None:
        super().__init__(channels, **rest)
        self.in_layers[1] = nn.GELU()
        self.out_layers[1] = nn.GELU()
        self.emb_layers[0] = nn.Identity() if activated else nn.GELU()
        self.scale = scale

    def _forward(self, *given: Tensor) -> Tensor:
        total = super()._forward(*given)
        return total if self.scale == 1.0 else self.scale * total


class TextAttention(ContextLayer):
    """Attention of a map's positions to the text's tokens and, unless context_only, to one another, with a residual.

    Args:
        channels: of the map, a multiple of 32 and of head_channels.
        head_channels: of one head.
        context_dim: width of the tokens, a multiple of 32.
        context_only: attend to the text alone.
    """

    def __init__(self, channels: int, head_channels: int, context_dim: int, context_only: bool) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"num_head_channels must divide the {channels} channels of a level; got {head_channels}")
        self.heads = channels // head_channels
        self.norm = normalization(channels)
        self.norm_encoder = normalization(context_dim)
        self.qkv = TokenConvolution(channels, channels if context_only else 3 * channels)
        self.encoder_kv = TokenConvolution(context_dim, 2 * channels)
        self.proj_out = zero_module(TokenConvolution(channels, channels))

    def projections(self, context: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        k, v = self._split(self.encoder_kv(self.norm_encoder(context.mT).mT), 2)
        return {self: (k, v)}

    def forward(self, x: Tensor, context: Context, tome: float = 0.0) -> Tensor:
        """(B, C, H, W), (B, L, context_dim) or projected -> (B, C, H, W)."""
        k, v = context.of(self) if isinstance(context, ProjectedContext) else self.projections(context)[self]
        projected = self.qkv(to_tokens(self.norm(x)))  # (B, N, C or 3 C)
        q, *own = self._split(projected, projected.shape[2] // x.shape[1])
        if own:
            k, v = (torch.cat(pair, dim=2) for pair in zip((k, v), own, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return x + to_map(self.proj_out(attended.transpose(1, 2).flatten(2)), x)

    def _split(self, tokens: Tensor, parts: int) -> list[Tensor]:
        """(B, L, parts * C), whose channels belong head by head to each part in turn -> parts of (B, heads, L, d)."""
        return [part.transpose(1, 2) for part in tokens.unflatten(2, (self.heads, parts, -1)).unbind(3)]


class AttentionPooling(nn.Module):
    """The mean of tokens as a token that attends to itself and to all of them, (B, L, D) -> (B, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, D)
        tokens = torch.cat([mean, x], dim=1)
        q, k, v = (
            layer(given).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, given in ((self.q_proj, mean), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class DeepFloydUNet(UNetModel):
    """A stage's UNet, under the names of the original code.

    Args:
        image_size: nominal height and width of the input.
        in_channels: of the input; with a low-resolution image, those of both.
        model_channels: of the first level for each unit of channel_mult, a multiple of 32.
        out_channels: of the output: the noise, and a variance for each of its channels.
        num_res_blocks: per level of the encoder, one number or one for each level.
        attention_resolutions: heights of the maps that have attention, such as "32,16,8" for an image_size of 64.
        encoder_dim: width of the states of the text encoder.
        encoder_channels: width of the tokens that attention gets.
        att_pool_heads: heads of the pooling of the states.
        num_head_channels: channels of one head of attention.
        channel_mult: channels of each level as a multiple of model_channels.
        noise_level: the low-resolution image has a noise level, which joins the embedding.
        efficient_activation: the embedding is activated once, not by every block.
        scale_skip_connection: the sum of every residual block is scaled by 0.7071.
        disable_self_attentions: attention is to the text alone.

    Raises:
        ValueError: arguments that do not fit together.

    Source: DeepFloyd-IF; Imagen (arXiv 2205.11487).
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: str,
        encoder_dim: int,
        encoder_channels: int,
        att_pool_heads: int = 64,
        num_head_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        noise_level: bool = False,
        efficient_activation: bool = False,
        scale_skip_connection: bool = False,
        disable_self_attentions: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # of the parts of UNetModel, those below are others
        heights = {int(height) for height in attention_resolutions.split(",")}
        levels = unet_levels(
            model_channels, channel_mult, num_res_blocks, {image_size // height for height in heights}, None, None
        )
        width = model_channels * max(channel_mult)
        scale = SKIP_SCALE if scale_skip_connection else 1.0
        res = partial(
            _ResBlock,
            emb_channels=width,
            dropout=0.0,
            use_scale_shift_norm=True,
            activated=efficient_activation,
            scale=scale,
        )

        def attention(channels: int, *others: object, **named: object) -> TextAttention:
            return TextAttention(channels, num_head_channels, encoder_channels, disable_self_attentions)

        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.dims = model_channels, 2
        self.num_classes, self.adm_in_channels, self.context_dim = "sequential", width, encoder_channels
        self.encoder_dim = encoder_dim
        self.downsampling, self.finest = 2 ** (len(levels) - 1), levels[0].res_blocks + 1
        self.merges_tokens = self.keeps_attention = False

        self.time_embed = _embedding(model_channels, width)
        self.encoder_pooling = nn.Sequential(
            nn.LayerNorm(encoder_dim),
            AttentionPooling(encoder_dim, att_pool_heads),
            nn.Linear(encoder_dim, width),
            nn.LayerNorm(width),
        )
        self.encoder_proj = nn.Linear(encoder_dim, encoder_channels)
        self.aug_proj = _embedding(model_channels, width) if noise_level else None
        self.embedding_act = nn.GELU() if efficient_activation else nn.Identity()
        self.input_blocks, widths = input_blocks(
            levels, conv(in_channels, model_channels), res, attention, partial(res, down=True)
        )
        middle = widths[-1]
        self.middle_block = TimestepEmbedSequential(res(middle), attention(middle), res(middle))
        self.output_blocks = output_blocks(levels, widths, res, attention, partial(res, up=True))
        last = levels[0].channels
        self.out = nn.Sequential(normalization(last), nn.GELU(), zero_module(conv(last, out_channels)))
        self.id_predictor = None

    def condition(self, states: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `encode` and `decode` take of a text, the same at every step: their context and their y.

        Args:
            states: of the text encoder, (B, L, encoder_dim); padding counts as text.
            noise_level: of the low-resolution image, a timestep for each, (B,); None for a stage without.

        Raises:
            ValueError: states of another width, or a noise level missing or superfluous.
        """
        if states.ndim != 3 or states.shape[2] != self.encoder_dim:
            raise ValueError(f"states must have shape (B, L, {self.encoder_dim}); got {tuple(states.shape)}")
        if (noise_level is None) != (self.aug_proj is None):
            raise ValueError(f"noise_level: this stage takes {'none' if self.aug_proj is None else 'one'}")
        states = states.to(self.dtype)
        y = self.encoder_pooling(states)  # (B, D)
        if noise_level is not None:
            y = y + self.aug_proj(timestep_embedding(noise_level, self.model_channels).to(self.dtype))
        return self.encoder_proj(states), y

    def embed(self, timesteps: Tensor, y: Tensor | None, batch: int) -> Tensor:
        """Embedding (B, D) of timesteps and y, (B, D), which every residual block takes."""
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps must have shape ({batch},), one for each sample; got {tuple(timesteps.shape)}")
        if y is None or y.shape != (batch, self.adm_in_channels):
            got = None if y is None else tuple(y.shape)
            raise ValueError(f"y must have shape {(batch, self.adm_in_channels)}, see `condition`; got {got}")
        return self.embedding_act(self.embed_time(timesteps) + y.to(self.dtype))
