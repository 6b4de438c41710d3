"""What a network is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ldm.modules.attention import Context, ProjectedContext


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a network is conditioned on; a part that the model does not use is None.

    context: tokens for cross-attention, (B, L, D); or what a network has made of them for all steps.
    concat:  image-like input beside the latent, (B, C', H, W).
    y:       class label (B,) or embedding (B, D) added to the time embedding.
    """

    context: Context | None = None
    concat: Tensor | None = None
    y: Tensor | None = None

    def parts(self) -> dict[str, Context]:
        """The parts that are given, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def batch(self) -> int | None:
        """How many images it is for; None = any number."""
        return next((len(part) for part in self.parts().values()), None)

    def tile(self, n: int) -> Conditioning:
        """Repeat for n decoder steps, step-major: (B, ...) -> (n*B, ...)."""
        if n == 1:
            return self
        return Conditioning(
            **{
                name: p.tile(n) if isinstance(p, ProjectedContext) else p.repeat(n, *[1] * (p.ndim - 1))
                for name, p in self.parts().items()
            }
        )

    def images(self, which: slice) -> Conditioning:
        """Of some images of the batch."""
        return Conditioning(
            **{
                name: p.images(which) if isinstance(p, ProjectedContext) else p[which]
                for name, p in self.parts().items()
            }
        )

    @staticmethod
    def cat(first: Conditioning, second: Conditioning) -> Conditioning:
        """Join two batches, for example [uncond | cond].

        Raises:
            ValueError: one has a part that the other lacks, or a part differs in more than its batch size.
        """
        one, two = first.parts(), second.parts()
        if one.keys() != two.keys():
            raise ValueError(f"conditionings to join must have the same parts; got {[*one]} and {[*two]}")
        for name in one:
            if one[name].shape[1:] != two[name].shape[1:]:
                raise ValueError(
                    f"conditionings to join differ in {name}: {tuple(one[name].shape)} and {tuple(two[name].shape)}"
                )
        return Conditioning(**{name: torch.cat([one[name], two[name]]) for name in one})
