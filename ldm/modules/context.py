"""The context of cross-attention, as tokens or made into keys and values once for all steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class ProjectedContext:
    """What the attention layers of one network make of a context, computed once for all steps of a run.

    keys_values: by layer, both (B, heads, L, dim_head).
    batch:       B.
    copies:      how often the batch is repeated; each layer repeats its own where it uses them, to save memory.
    """

    keys_values: Mapping[nn.Module, tuple[Tensor, Tensor]]
    batch: int
    copies: int = 1

    def __len__(self) -> int:
        return self.batch * self.copies

    def tile(self, n: int) -> ProjectedContext:
        """Repeat for n decoder steps, step-major: B -> n*B."""
        return replace(self, copies=n * self.copies)

    def images(self, which: slice) -> ProjectedContext:
        """Of some images of a batch that is not repeated."""
        chosen = {layer: (k[which], v[which]) for layer, (k, v) in self.keys_values.items()}
        return ProjectedContext(chosen, len(range(self.batch)[which]))

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (copies*B, heads, L, dim_head).

        Raises:
            ValueError: the context was projected by another network.
        """
        if layer not in self.keys_values:
            raise ValueError("context was projected by another network than the one that it is given to")
        k, v = self.keys_values[layer]
        return (k, v) if self.copies == 1 else (k.repeat(self.copies, 1, 1, 1), v.repeat(self.copies, 1, 1, 1))


Context = Tensor | ProjectedContext  # (B, L, context_dim), or made into keys and values
