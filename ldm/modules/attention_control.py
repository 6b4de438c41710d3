"""Attention that some images of a batch take from another one: the part of prompt-to-prompt that the network sees.

It travels with the context of cross-attention. Source: prompt-to-prompt (arXiv 2208.01626).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

LARGEST = 16 * 16  # positions of a map, at most, of which self-attention is taken and maps are kept, as published


class AttentionMaps:
    """The cross-attention maps of some layers, mean over their heads, which the layers add while they run.

    Args:
        layers: of which maps are kept.
        largest: most positions of a map that is kept.
    """

    def __init__(self, layers: Iterable[nn.Module], largest: int = LARGEST) -> None:
        self.largest = largest
        self.kept: dict[nn.Module, dict[int, Tensor]] = {layer: {} for layer in layers}  # by layer and step

    def add(self, layer: nn.Module, steps: Sequence[int], maps: Tensor) -> None:
        """Maps of a layer at some steps, (steps, B, heads, N, L)."""
        if layer in self.kept and maps.shape[-2] <= self.largest:
            self.kept[layer] |= dict(zip(steps, maps.mean(2), strict=True))

    def sums(self, last: int) -> list[Tensor]:
        """The attention of each layer that has run, summed over all steps up to `last`, (B, N, L)."""
        of_layers = ([part for step, part in parts.items() if step <= last] for parts in self.kept.values())
        return [torch.stack(parts).sum(0) for parts in of_layers if parts]


@dataclass(frozen=True, eq=False)
class AttentionControl:
    """What images take of the attention of the source image of their group.

    The last rows of the batch that a network gets are whole groups: a source, then its E edits. Rows before them, such
    as those of the unconditional prediction, and the sources keep their own attention. At step s an edit has

    cross-attention:  source map @ cross[s] + own map * own[s]
    self-attention:   the source map, where s is one of self_steps and the map has at most `largest` positions

    cross:      (S, E, L, L), L tokens of the source to L tokens of the edit.
    own:        (S, E, L).
    self_steps: steps at which self-attention is taken.
    step_of:    the step of each timestep.
    groups:     in a batch.
    largest:    see above.
    maps:       gets the edited cross-attention maps of these rows; None = they are not kept.
    steps:      of the copies of the batch that are joined in one call, see `at`.
    """

    cross: Tensor
    own: Tensor
    self_steps: range
    step_of: Mapping[float, int]
    groups: int = 1
    largest: int = LARGEST
    maps: AttentionMaps | None = None
    steps: tuple[int, ...] = ()

    def at(self, ts: Sequence[float]) -> AttentionControl:
        """For one copy of the batch at each of these timesteps."""
        return replace(self, steps=tuple(self.step_of[t] for t in ts))

    def changes(self, positions: int, cross: bool) -> bool:
        """Whether anything is taken of maps of so many positions; if not, they need not be computed one by one."""
        return cross or (positions <= self.largest and any(step in self.self_steps for step in self.steps))

    def edited(self, layer: nn.Module, maps: Tensor, cross: bool) -> Tensor:
        """The maps with those of the edits replaced, where `changes` says so.

        Args:
            layer: whose maps they are.
            maps: after the softmax, (steps * B, heads, N, L) or, of self-attention, (steps * B, heads, N, N); changed
                in place.
            cross: whether they are those of cross-attention.
        """
        copies = maps.unflatten(0, (len(self.steps), -1))  # (steps, B, heads, N, L)
        rows = self.groups * (1 + self.cross.shape[1])
        grouped = copies[:, -rows:].unflatten(1, (self.groups, -1))  # (steps, groups, 1 + E, heads, N, L)
        source, edits = grouped[:, :, :1], grouped[:, :, 1:]
        if cross:
            chosen = [*self.steps]
            own = self.own.to(maps)[chosen][:, None, :, None, None]  # (steps, 1, E, 1, 1, L)
            taken = source @ self.cross.to(maps)[chosen][:, None, :, None]  # (steps, groups, E, heads, N, L)
            edits.copy_(taken + edits * own)
            if self.maps is not None:
                self.maps.add(layer, self.steps, copies[:, -rows:])
        else:
            chosen = [copy for copy, step in enumerate(self.steps) if step in self.self_steps]
            edits[chosen] = source[chosen]
        return maps
