"""The UNet of VideoFusion (ModelScope's text to video): frames of one video that see one another; split as any UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer, to_map
from ldm.modules.diffusionmodules.unet_layers import Downsample, ResBlock, TokenConvolution, Upsample, embedding
from ldm.modules.diffusionmodules.util import Features, Unshared, normalization, timestep_embedding, zero_module
from ldm.modules.token_merging import check_ratio

HEADS_IN = 8  # of the temporal transformer after the first convolution, whatever its width


def apart(x: Tensor, frames: int) -> Tensor:
    """(B * F, C, H, W) -> (B, C, F, H, W)."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def together(x: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B * F, C, H, W), video by video."""
    return x.transpose(1, 2).flatten(0, 1)


def frames_in_rows(x: Tensor, frames: int) -> Tensor:
    """(B * F, C, H, W) -> (B, C, F, H * W): a video as one map; a view with channels_last strides if x has them."""
    return apart(x.flatten(2), frames)


class FrameConvolution(nn.Conv3d):
    """A convolution of three frames, (B, C, F, N) -> the same; the shape of its weight has three dimensions."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., 0], self.bias, padding=self.padding[:2])


class TemporalConvolution(nn.Module):
    """Four convolutions over the frames, with a residual; (B * F, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def layers(*between: nn.Module) -> nn.Sequential:
            return nn.Sequential(normalization(channels), nn.SiLU(), *between, FrameConvolution(channels))

        self.conv1 = layers()
        self.conv2, self.conv3, self.conv4 = (layers(nn.Identity()) for _ in range(3))  # there, dropout in training
        zero_module(self.conv4[-1])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = frames_in_rows(x, frames)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = conv(h)  # normalised over frames and space together
        return x + together(h).view_as(x)


class VideoResBlock(ResBlock):
    """A residual block of images, and a temporal convolution."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int | None = None) -> None:
        super().__init__(channels, emb_channels, dropout=0.0, out_channels=out_channels)
        self.temopral_conv = TemporalConvolution(out_channels or channels)  # the published spelling


class TemporalTransformer(nn.Module):
    """Self-attention, twice, among the frames of each position, with a residual; (B * F, C, H, W) -> the same."""

    def __init__(self, channels: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.norm = normalization(channels, eps=1e-6)
        self.proj_in = TokenConvolution(channels, inner)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(inner, heads, head_dim)])
        self.proj_out = zero_module(TokenConvolution(inner, channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = self.norm(frames_in_rows(x, frames)).permute(0, 3, 2, 1)  # (B, H * W, F, C)
        places = h.shape[:2]
        h = self.proj_in(h.flatten(0, 1))  # (B * H * W, F, inner)
        for block in self.transformer_blocks:
            h = block(h)
        h = self.proj_out(h).unflatten(0, places)  # (B, H * W, F, C)
        return x + to_map(h.transpose(1, 2).flatten(0, 1), x)


@dataclass(frozen=True)
class Given:
    """What the layers get beside the frames: embedding and text of each frame, (B * F, ...), and their number F."""

    emb: Tensor
    context: Tensor
    frames: int


class _Block(nn.ModuleList):
    """Layers one after the other, each with what it takes of `Given`."""

    def forward(self, h: Tensor, given: Given) -> Tensor:
        """(B * F, C, H, W)."""
        for layer in self:
            if isinstance(layer, VideoResBlock):
                h = layer.temopral_conv(layer(h, given.emb), given.frames)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, given.context)
            elif isinstance(layer, TemporalTransformer):
                h = layer(h, given.frames)
            else:
                h = layer(h)
        return h


class VideoUNet(Unshared):
    """UNet of videos, conditioned on the timestep and a text.

    Args:
        in_channels, out_channels: of the latents of a frame, and of the prediction.
        model_channels: of the first level for each unit of channel_mult, a multiple of 32.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        channel_mult: channels of each level as a multiple of model_channels. All levels but the last have attention.
        context_dim: width of the text's tokens.
        num_head_channels: channels of one head.

    Source: ModelScope text-to-video (arXiv 2308.06571), under the published names of weights.
    """

    num_classes = adm_in_channels = None
    merges_tokens = False
    small_map = 8  # a prediction has one of every frame

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[int],
        context_dim: int,
        num_head_channels: int = 64,
    ) -> None:
        super().__init__()
        width = 4 * model_channels
        res = partial(VideoResBlock, emb_channels=width)
        self.in_channels, self.out_channels, self.context_dim = in_channels, out_channels, context_dim
        self.model_channels, self.downsampling = model_channels, 2 ** (len(channel_mult) - 1)

        def attention(channels: int) -> list[nn.Module]:
            heads = channels // num_head_channels
            spatial = SpatialTransformer(channels, heads, num_head_channels, context_dim=context_dim, use_linear=True)
            return [spatial, TemporalTransformer(channels, heads, num_head_channels)]

        self.time_embed = embedding(model_channels, width)
        conv_in = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        first = TemporalTransformer(model_channels, HEADS_IN, num_head_channels)
        self.input_blocks = nn.ModuleList([_Block([conv_in, first])])
        widths, last = [model_channels], len(channel_mult) - 1
        for level, mult in enumerate(channel_mult):
            channels = mult * model_channels
            for _ in range(num_res_blocks):
                attended = attention(channels) if level < last else []
                self.input_blocks.append(_Block([res(widths[-1], out_channels=channels), *attended]))
                widths.append(channels)
            if level < last:
                self.input_blocks.append(Downsample(channels, use_conv=True))
                widths.append(channels)
        middle = widths[-1]
        self.middle_block = _Block([res(middle), *attention(middle), res(middle)])
        self.output_blocks, h = nn.ModuleList(), middle
        for level in reversed(range(len(channel_mult))):
            channels = channel_mult[level] * model_channels
            for i in range(num_res_blocks + 1):
                layers = [res(h + widths.pop(), out_channels=channels), *(attention(channels) if level < last else [])]
                if i == num_res_blocks and level > 0:
                    layers.append(Upsample(channels, use_conv=True))
                self.output_blocks.append(_Block(layers))
                h = channels
        self.out = nn.Sequential(normalization(h), nn.SiLU(), zero_module(nn.Conv2d(h, out_channels, 3, padding=1)))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, to which inputs are cast."""
        return self.time_embed[0].weight.dtype

    def project(self, context: Tensor) -> Tensor:
        """The context as it is: keys and values of every frame would fill the memory."""
        return context

    def encode(self, x: Tensor, timesteps: Tensor, context: Tensor, y: None = None, tome: float = 0.0) -> Features:
        """The part that encoder propagation skips: input blocks, with the temporal transformer, and middle block.

        Args:
            x: (B, in_channels, F, H, W), or single frames, (B, in_channels, H, W); H and W multiples of `downsampling`.
            timesteps: (B,), training timesteps 0..T-1.
            context: (B, L, context_dim).
            y, tome: None and 0; there is no label, and no merging of tokens.

        Returns:
            features of videos, each (B, F, C, h, w).

        Raises:
            ValueError: a shape that does not fit.
        """
        skips = self.encode_outer(x, timesteps, context, y, len(self.input_blocks), tome)
        given = self._given(timesteps, context, len(x), skips[0].shape[1])
        middle = self.middle_block(skips[-1].flatten(0, 1), given)
        return Features(middle.unflatten(0, (-1, given.frames)), skips)

    def encode_outer(
        self, x: Tensor, timesteps: Tensor, context: Tensor, y: None = None, blocks: int = 1, tome: float = 0.0
    ) -> tuple[Tensor, ...]:
        """The outputs of the first `blocks` input blocks alone, each (B, F, C, H, W); arguments as for `encode`."""
        x = x[:, :, None] if x.ndim == 4 else x
        self._check_input(x)
        self.check_merging(tome)
        given = self._given(timesteps, context, len(x), x.shape[2])
        h, skips = together(x.to(self.dtype)), []
        for block in self.input_blocks[:blocks]:
            h = block(h, given) if isinstance(block, _Block) else block(h)  # the latter halves the resolution
            skips.append(h.unflatten(0, (-1, given.frames)))
        return tuple(skips)

    def advance(
        self, features: Features, timesteps: Tensor, context: Tensor, y: None = None, blocks: int = 0, tome: float = 0.0
    ) -> Features:
        """Decode until `blocks` output blocks remain; arguments as for `decode`."""
        if not 0 <= blocks <= len(features.skips) <= len(self.output_blocks):
            raise ValueError(
                f"features must have {max(blocks, 1)}..{len(self.output_blocks)} skips for this network; "
                f"got {len(features.skips)}"
            )
        self.check_merging(tome)
        h, frames = features.hidden.flatten(0, 1), features.hidden.shape[1]
        given = self._given(timesteps, context, len(features), frames)
        for i in reversed(range(blocks, len(features.skips))):
            h = self.output_blocks[-1 - i](torch.cat([h, features.skips[i].flatten(0, 1)], dim=1), given)
        return Features(h.unflatten(0, (-1, frames)), features.skips[:blocks])

    def decode(
        self, features: Features, timesteps: Tensor, context: Tensor, y: None = None, tome: float = 0.0
    ) -> Tensor:
        """The prediction (B, out_channels, F, H, W) at `timesteps` from features of the same or an earlier step.

        Args:
            features: of this network, of batch B.
            timesteps, context, y, tome: as for `encode`, of this step, not of the key step.

        Raises:
            ValueError: as `encode`, or features of another network.
        """
        h = self.advance(features, timesteps, context, y, 0, tome).hidden  # (B, F, C, H, W)
        return apart(self.out(h.flatten(0, 1)), h.shape[1])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: None = None) -> Tensor:
        """`encode` and `decode` at the same timesteps."""
        return self.decode(self.encode(x, timesteps, context, y), timesteps, context, y)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Embedding of timesteps, (B,) -> (B, D)."""
        return self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))

    def embed(self, timesteps: Tensor, y: None, batch: int) -> Tensor:
        """Embedding (B, D) of timesteps alone."""
        return self.embed_time(timesteps)

    def check_merging(self, tome: float) -> None:
        """Raise ValueError unless tome is 0."""
        check_ratio(tome)
        if tome:
            raise ValueError(f"this network merges no tokens; accepted: 0; got {tome:g}")

    def _given(self, timesteps: Tensor, context: Tensor | None, batch: int, frames: int) -> Given:
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps must have shape ({batch},), one for each video; got {tuple(timesteps.shape)}")
        if context is None or context.ndim != 3 or context.shape[::2] != (batch, self.context_dim):
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context must have shape ({batch}, L, {self.context_dim}); got {got}")
        emb = self.embed_time(timesteps)
        return Given(
            emb.repeat_interleave(frames, dim=0), context.to(self.dtype).repeat_interleave(frames, dim=0), frames
        )

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels or any(side % self.downsampling for side in x.shape[3:]):
            raise ValueError(
                f"x must have shape (B, {self.in_channels}, F, H, W) with H and W multiples of {self.downsampling}; "
                f"got {tuple(x.shape)}"
            )
