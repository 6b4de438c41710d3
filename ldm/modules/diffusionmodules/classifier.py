"""The encoder half of the UNet as a classifier of noisy images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.unet_layers import (
    CONVOLUTIONS,
    Attention,
    AttentionPool2d,
    Downsample,
    TimestepEmbedSequential,
    embedding,
    input_blocks,
    residual,
    unet_levels,
)
from ldm.modules.diffusionmodules.util import normalization, timestep_embedding, zero_module


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
        levels = unet_levels(model_channels, channel_mult, num_res_blocks, attention_resolutions, None, None)
        attention = Attention(
            num_heads,
            num_head_channels,
            num_heads_upsample,
            True,
            False,
            None,
            False,
            use_new_attention_order,
            use_checkpoint,
        )
        emb_channels = 4 * model_channels
        res = residual(emb_channels, dropout, dims, use_scale_shift_norm, use_checkpoint)
        down = partial(res, down=True) if resblock_updown else partial(Downsample, use_conv=conv_resample, dims=dims)
        self.model_channels, self.pool, self.use_fp16 = model_channels, pool, use_fp16
        self.time_embed = embedding(model_channels, emb_channels)
        conv_in = CONVOLUTIONS[dims](in_channels, model_channels, 3, padding=1)
        self.input_blocks, widths = input_blocks(levels, conv_in, res, attention, down)
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
