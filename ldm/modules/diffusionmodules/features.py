"""What a network's encoder leaves for its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PartWeights = tuple[Tensor | None, Tensor | None]  # of a block's first convolution and its residual; None = its own


@dataclass(frozen=True, eq=False)
class SharedPart:
    """The part of an output block that depends on the key timestep's features alone, for the decoders of several nodes.

    rest:     channels of the skip that are normalised in one group with channels of the node, (B, C_r, H, W).
    conv:     the first convolution of the other channels, (B, C_out, H', W').
    residual: the residual connection of them, (B, C_out, H', W').
    weights:  of the two layers for the channels before those, see `UNetModel.part_weights`.
    """

    rest: Tensor
    conv: Tensor
    residual: Tensor
    weights: PartWeights = (None, None)

    def __len__(self) -> int:
        """The batch size of the features."""
        return len(self.conv)

    def images(self, chosen: slice) -> SharedPart:
        """Of some of the batch; a view."""
        return SharedPart(self.rest[chosen], self.conv[chosen], self.residual[chosen], self.weights)


@dataclass(frozen=True, eq=False)
class Features:
    """Where a decoder stands: what it has computed, and the skips that its remaining blocks will take.

    Fresh from the encoder, `hidden` is the output of the middle block and there is a skip for every output block.
    With fewer skips, `hidden` is what goes into the block that takes the last of them.

    hidden: (B, C, h, w).
    skips:  outputs of the outermost input blocks, first to last, each (B, C_i, H_i, W_i).
    shared: what the network has computed of them for several nodes, see `UNetModel.share`: for each skip that of the
        block that takes it. () = nothing.
    alone:  what the encoder left before something was added to it that is computed anew at every node; None = nothing.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    shared: tuple[SharedPart, ...] = ()
    alone: Features | None = None

    def __len__(self) -> int:
        """The batch size."""
        return len(self.hidden)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The features themselves, without what is computed of them."""
        return self.hidden, *self.skips

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Features:
        """The inverse of `tensors`, with nothing shared."""
        hidden, *skips = tensors
        return Features(hidden, tuple(skips))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Join batches in the order given; one alone is not copied. Keeps the memory format.

        Raises:
            ValueError: there is nothing to join, or the parts have different numbers of skips.
        """
        if not parts:
            raise ValueError("parts must be at least one; got none")
        if len(parts) == 1:
            return parts[0]
        return Features.of([torch.cat(same) for same in zip(*(part.tensors for part in parts), strict=True)])

    @staticmethod
    def for_nodes(parts: Sequence[Features]) -> Features:
        """What `decode` takes for a batch of nodes: shared features once, if all nodes have the same; else `cat`."""
        first = parts[0]
        return first if first.shared and all(part is first for part in parts) else Features.cat(parts)

    def images(self, chosen: slice) -> Features:
        """Some of the batch; a view."""
        hidden, *skips = (tensor[chosen] for tensor in self.tensors)
        return Features(hidden, tuple(skips), tuple(part.images(chosen) for part in self.shared))

    def chunk(self, n: int) -> list[Features]:
        """Views of n equal batches, the inverse of `cat`."""
        return [Features.of(same) for same in zip(*(tensor.chunk(n) for tensor in self.tensors), strict=True)]

    def without_skips(self) -> Features:
        return Features(self.hidden, ())

    def with_outer(self, skips: Sequence[Tensor]) -> Features:
        """With the outermost skips replaced by these."""
        return Features(self.hidden, (*skips, *self.skips[len(skips) :]))

    def plus(self, residuals: Sequence[Tensor]) -> Features:
        """With these added to the skips, first to last, and the last of them to the hidden features."""
        *outer, inner = residuals
        skips = tuple(skip + more for skip, more in zip(self.skips, outer, strict=True))
        return Features(self.hidden + inner, skips)

    @staticmethod
    def combine(parts: Sequence[Features], weights: Sequence[float]) -> Features:
        """The weighted sum of features of the same shapes."""
        return Features.of(
            [weighted_sum(same, weights) for same in zip(*(part.tensors for part in parts), strict=True)]
        )


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of tensors of the same shape; none is changed."""
    out = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out.add_(tensor, alpha=weight)
    return out
