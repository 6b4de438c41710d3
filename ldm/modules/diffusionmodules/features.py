"""What a network's encoder leaves for its decoder."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """What the encoder leaves for the decoder at one key step.

    hidden: output of the middle block, (B, C_mid, h, w).
    skips:  output of every input block, first to last, each (B, C_i, H_i, W_i).
    """
    hidden: Tensor
    skips: tuple[Tensor, ...]

    def tile(self, n: int) -> Features:
        """Repeat for n decoder steps, step-major: (B, ...) -> (n*B, ...), entry s*B + b is image b at step s.

        Keeps the memory format; n = 1 copies nothing.

        Raises:
            ValueError: n is not positive.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1 decoder step; got {n}")
        if n == 1:
            return self
        # cat keeps channels_last, which Tensor.repeat would lose.
        return Features(torch.cat((self.hidden,) * n), tuple(torch.cat((skip,) * n) for skip in self.skips))
