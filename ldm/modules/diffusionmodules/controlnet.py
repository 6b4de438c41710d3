"""ControlNet: a second encoder, which reads a control image beside the latents and adds to the skips of the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock, Context, ProjectedContext
from ldm.modules.diffusionmodules.unet_layers import (
    CONVOLUTIONS,
    Attention,
    Downsample,
    TimestepEmbedSequential,
    embedding,
    input_blocks,
    residual,
    unet_levels,
)
from ldm.modules.diffusionmodules.util import timestep_embedding, zero_module

HINT_WIDTHS = (16, 32, 96, 256)  # of the published networks, for latents of an eighth of the control image


class ControlNet(nn.Module):
    """The encoder of a UNet, which also takes a control image, under its published names.

    Each of its outputs goes through a 1x1 convolution that is zero before training, and is added to the same output
    of the UNet's encoder.

    Args:
        hint_channels: of the control image.
        hint_widths: channels of the layers that read it; each after the first halves its size, so that it becomes as
            high and wide as the latents.
        The rest: see `UNetModel`; those of the UNet that it controls.

    Raises:
        ValueError: arguments that do not fit together.

    Source: Zhang et al. (arXiv 2302.05543).
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        hint_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        hint_widths: Sequence[int] = HINT_WIDTHS,
    ) -> None:
        super().__init__()
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
            -1,
            legacy,
            use_spatial_transformer,
            context_dim,
            use_linear_in_transformer,
            False,
            use_checkpoint,
        )
        emb_channels = 4 * model_channels
        res = residual(emb_channels, dropout, 2, use_scale_shift_norm, use_checkpoint)
        down = partial(res, down=True) if resblock_updown else partial(Downsample, use_conv=conv_resample)
        conv = partial(CONVOLUTIONS[2], kernel_size=3, padding=1)

        self.in_channels, self.model_channels = in_channels, model_channels
        self.hint_channels, self.context_dim = hint_channels, context_dim
        self.reduction = 2 ** (len(hint_widths) - 1)  # pixels of the control image per latent, each way
        self.time_embed = embedding(model_channels, emb_channels)
        self.input_blocks, widths = input_blocks(levels, conv(in_channels, model_channels), res, attention, down)
        self.zero_convs = nn.ModuleList(map(zero_output, widths))
        self.input_hint_block = hint_block(hint_channels, hint_widths, model_channels)
        middle = widths[-1]
        self.middle_block = TimestepEmbedSequential(
            res(middle), attention(middle, disable_middle_self_attn, depth=levels[-1].depth), res(middle)
        )
        self.middle_block_out = zero_output(middle)

    @property
    def residuals(self) -> int:
        """How many there are: of every input block, and of the middle."""
        return len(self.zero_convs) + 1

    def project(self, context: Tensor) -> ProjectedContext:
        """Keys and values of a context (B, L, context_dim), which are the same at every step."""
        context, projections = context.to(self.time_embed[0].weight.dtype), {}
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                projections |= block.projections(context)
        return ProjectedContext(projections, len(context))

    def read(self, hint: Tensor) -> Tensor:
        """What the network makes of the control image, once for all steps of a run.

        (B, hint_channels, H, W), as published RGB in [0, 1], -> (B, model_channels, H / reduction, W / reduction).

        Raises:
            ValueError: another number of channels, or a size that can't be reduced so.
        """
        if hint.ndim != 4 or hint.shape[1] != self.hint_channels or any(n % self.reduction for n in hint.shape[2:]):
            raise ValueError(
                f"a control image must have the shape (B, {self.hint_channels}, H, W), H and W multiples of "
                f"{self.reduction}; got {tuple(hint.shape)}"
            )
        return self.input_hint_block(hint.to(self.time_embed[0].weight.dtype))

    def encode(
        self, x: Tensor, read: Tensor, timesteps: Tensor, context: Context | None = None, blocks: int | None = None
    ) -> list[Tensor]:
        """What is added to the output of every input block of the UNet, and, as the last, of its middle block.

        Args:
            x: latents, (B, C_in, h, w).
            read: what `read` made of the control image, (B, model_channels, h, w).
            timesteps: (B,).
            context: (B, L, context_dim), or what `project` made of it.
            blocks: of the first so many input blocks alone; None = all, with the middle.

        Raises:
            ValueError: the control image has another size than the latents.
        """
        if read.shape[2:] != x.shape[2:]:
            size = tuple(self.reduction * n for n in x.shape[2:])
            raise ValueError(
                f"a control image for latents {tuple(x.shape)} must have {size[1]} x {size[0]} pixels; got "
                f"{self.reduction * read.shape[3]} x {self.reduction * read.shape[2]}"
            )
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))  # (B, D)
        if isinstance(context, Tensor):
            context = context.to(dtype)
        h, out = x.to(dtype), []
        for i, (block, zero) in enumerate(zip(self.input_blocks[:blocks], self.zero_convs, strict=False)):
            h = block(h, emb, context)  # (B, C_i, h_i, w_i)
            h = h + read if i == 0 else h
            out.append(zero(h))
        if blocks is None:
            out.append(self.middle_block_out(self.middle_block(h, emb, context)))
        return out

    def forward(self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Context | None = None) -> list[Tensor]:
        """`read` and `encode`."""
        return self.encode(x, self.read(hint), timesteps, context)


def zero_output(channels: int) -> nn.Sequential:
    """A 1x1 convolution that puts out zeros before training."""
    return nn.Sequential(zero_module(nn.Conv2d(channels, channels, 1)))


def hint_block(channels: int, widths: Sequence[int], out: int) -> nn.Sequential:
    """Reads the control image: 3x3 convolutions with SiLU between, a stride of 2 to each new width, the last zero."""
    layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), nn.SiLU()]
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, before, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, zero_module(nn.Conv2d(widths[-1], out, 3, padding=1)))


def guess_weights(strength: float, residuals: int) -> tuple[float, ...]:
    """The weight of each residual in guess mode, first to last: the inner ones, which say what is where, count most."""
    return tuple(strength * 0.825 ** (residuals - 1 - i) for i in range(residuals))
