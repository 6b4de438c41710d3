"""Decoder batches that shrink when the device runs out of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ldm.models.diffusion.denoiser import Denoiser, Past, Prediction, Wrapper
from ldm.modules.diffusionmodules.features import Features

T = TypeVar("T")


class BatchBackoff(Wrapper):
    """A denoiser that decodes in smaller batches when the device runs out of memory; the results stay the same.

    Args:
        denoiser: decodes.
        most: nodes in one batch; None = as many as it is given. Halved at every failure, and kept after it.

    Raises:
        torch.OutOfMemoryError: (in decode and advance) a single node is too much; or encode or refresh fails, which
            have no batch to halve.
    """

    def __init__(self, denoiser: Denoiser, most: int | None = None) -> None:
        super().__init__(denoiser)
        self.most = most

    def share(self, features: Features) -> Features:
        try:
            return super().share(features)
        except torch.OutOfMemoryError:
            return features  # sharing saves time only

    def advance(self, features: Sequence[Features], ts: Sequence[float], blocks: int) -> list[Features]:
        return self._in_parts(len(ts), lambda part, _: self.inner.advance(features[part], ts[part], blocks))

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        return self._in_parts(
            len(ts), lambda part, done: self.inner.decode(features[part], ts[part], done[-1] if done else last)
        )

    def _in_parts(self, n: int, call: Callable[[slice, list[T]], list[T]]) -> list[T]:
        """call(part, results so far) for 0..n-1 in parts, in order."""
        done: list[T] = []
        while len(done) < n:
            part = slice(len(done), min(len(done) + (self.most or n), n))
            try:
                done += call(part, done)
            except torch.OutOfMemoryError:
                if part.stop - part.start == 1:
                    raise
                # The next attempt comes after this block, when nothing holds the failed one's tensors any more.
                self.most = (part.stop - part.start + 1) // 2
        return done
