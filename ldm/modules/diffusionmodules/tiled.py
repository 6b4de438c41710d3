"""A first stage's decoder in tiles: the same image, up to rounding, in a fraction of the memory.

Two things in the decoder see the whole image. The middle and levels with attention are computed whole: they are at the
resolution of the latents, where it costs little. The statistics of group normalisation are found tile by tile before
they are used, one normalisation after the other, so they are those of the whole image. Convolutions see a margin
around each tile that is as wide as they reach, and the image's own edge where it ends there. So nothing is blended.

The price is time: within a level, what comes before a normalisation is computed again for each of them, on average
(n + 2) / 2 times for n normalisations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, ResnetBlock

Statistics = tuple[Tensor, Tensor]  # mean and variance of each group, (B, groups)


def decode_tiled(decoder: Decoder, z: Tensor, tile: int) -> Tensor:
    """What `decoder(z)` gives, up to rounding: (B, z_channels, h, w) -> (B, out_ch, f*h, f*w).

    Args:
        tile: height and width of a tile, in pixels; smaller ones take less memory, and longer.

    Raises:
        ValueError: tile is not above 0, or the decoder gives features in the place of an image.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 pixel; got {tile}")
    if decoder.give_pre_end:
        raise ValueError("give_pre_end: features are not decoded in tiles, only images")
    h, upsample = decoder.mid(decoder.conv_in(z)), None
    for i, level in reversed(list(enumerate(decoder.up))):
        last = _Output(decoder.norm_out, decoder.conv_out) if i == 0 else None
        pixels = decoder.patch_size * 2**i  # per position
        if level.attn:
            h = level(h if upsample is None else upsample(h))
            h = last.whole(h) if last else h
        else:
            h = _Section(upsample, level.block, last).run(h, max(1, tile // pixels))
        upsample = level.upsample if i > 0 else None
    x = F.pixel_shuffle(h, decoder.patch_size)
    if decoder.shortcut is not None:
        x = x + F.pixel_shuffle(decoder.shortcut(z), decoder.factor)
    return torch.tanh(x) if decoder.tanh_out else x


@dataclass(frozen=True, eq=False)
class _Output:
    """The last normalisation and convolution."""

    norm: nn.GroupNorm
    conv: nn.Module

    def whole(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


@dataclass(frozen=True, eq=False)
class _Section:
    """What runs between two maps that are held whole: upsampling, residual blocks, and what ends the decoder."""

    upsample: nn.Module | None
    blocks: Sequence[ResnetBlock]
    last: _Output | None

    @property
    def scale(self) -> int:
        """Positions of the result for one of what is given, in each direction."""
        return 1 if self.upsample is None else 2

    @property
    def margin(self) -> int:
        """How far the convolutions reach, in positions of the result."""
        return 2 * len(self.blocks) + 2

    def run(self, given: Tensor, side: int) -> Tensor:
        """(B, C, h, w) -> (B, C', scale * h, scale * w), in tiles of `side` positions of the result."""
        norms = [norm for block in self.blocks for norm in (block.norm1, block.norm2)]
        norms += [self.last.norm] if self.last else []
        known: list[Statistics] = []
        for norm in norms:
            tiles = (part for _, part in self._tiles(given, side, known))
            known.append(pooled(tiles, norm.num_groups))
        result: Tensor | None = None
        for (rows, columns), part in self._tiles(given, side, known):
            if result is None:
                result = part.new_empty(*part.shape[:2], *(self.scale * length for length in given.shape[2:]))
            result[..., rows, columns] = part
        return result

    def _tiles(
        self, given: Tensor, side: int, known: Sequence[Statistics]
    ) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Where each tile is in the result, and what there is as far as the statistics are known."""
        height, width = given.shape[2:]
        for rows, row_in, row_out in _cuts(height, side, self.scale, self.margin):
            for columns, column_in, column_out in _cuts(width, side, self.scale, self.margin):
                part = self._compute(given[..., row_in, column_in], known)
                yield (rows, columns), part[..., row_out, column_out]

    def _compute(self, x: Tensor, known: Sequence[Statistics]) -> Tensor:
        """What the normalisation gets whose statistics are the first that are not known; the result, if all are."""
        x = x if self.upsample is None else self.upsample(x)
        for i, block in enumerate(self.blocks):
            own = known[2 * i : 2 * i + 2]
            if len(own) < 2:
                return block.conv1(F.silu(normalized(block.norm1, x, own[0]))) if own else x
            h = block.conv1(F.silu(normalized(block.norm1, x, own[0])))
            h = block.conv2(F.silu(normalized(block.norm2, h, own[1])))
            x = block.nin_shortcut(x) + h
        if self.last is None or len(known) == 2 * len(self.blocks):
            return x
        return self.last.conv(F.silu(normalized(self.last.norm, x, known[-1])))


def _cuts(length: int, side: int, scale: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each tile in one direction: its place in the result, what it needs of the `length` given, its place in that.

    side, margin: in positions of the result, which has `scale` for each of those given.
    """
    for start in range(0, scale * length, side):
        stop = min(start + side, scale * length)
        first = max(0, (start - margin) // scale)
        end = min(length, -(-(stop + margin) // scale))
        yield slice(start, stop), slice(first, end), slice(start - scale * first, stop - scale * first)


def pooled(parts: Iterator[Tensor], groups: int) -> Statistics:
    """The statistics of a whole map (B, C, H, W) from those of its parts, which do not overlap; as float32.

    Source: Chan, Golub and LeVeque (1979), here with weights by the number of positions.
    """
    total, mean, square = 0, 0.0, 0.0
    for part in parts:
        count = part.shape[2] * part.shape[3]
        variance, own = torch.var_mean(part.float().unflatten(1, (groups, -1)), dim=(2, 3, 4), correction=0)
        variance, own = variance.double(), own.double()  # (B, groups)
        total, mean, square = total + count, mean + count * own, square + count * (variance + own**2)
    mean, square = mean / total, square / total
    return mean.float(), (square - mean**2).clamp(min=0).float()


def normalized(norm: nn.GroupNorm, x: Tensor, statistics: Statistics) -> Tensor:
    """Group normalisation of (B, C, H, W) with statistics that are given, in the precision of x."""
    mean, variance = (part.repeat_interleave(x.shape[1] // norm.num_groups, dim=1) for part in statistics)  # (B, C)
    weight = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = norm.bias - mean * weight
    return torch.addcmul(bias[..., None, None].to(x.dtype), x, weight[..., None, None].to(x.dtype))
