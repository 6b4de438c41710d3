"""The decoders of one image on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ldm.models.diffusion.denoiser import Denoiser, Past, Prediction, Wrapper
from ldm.modules.diffusionmodules.features import Features


class DistributedDecode(Wrapper):
    """A denoiser that shares the nodes of each decoder batch among processes, one device each.

    Every process runs the same loop from the same latents with the same plan. Each encodes for itself, so features
    stay where they are; each decodes its part of a batch of n nodes, ceil(n / processes) at most, and all get all
    predictions. A batch of one node, as shallow and refreshed nodes are, is computed by every process: correct, and
    no faster.

    Args:
        denoiser: on this process's device.
        group: of processes; None = all.

    Raises:
        ValueError: (in decode) the denoiser uses guidance offsets again: only the process with the key node has one.
    """

    def __init__(self, denoiser: Denoiser, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(denoiser)
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def decode(
        self, features: Sequence[Features], ts: Sequence[float], last: Prediction | Past | None = None
    ) -> list[Prediction]:
        n = len(ts)
        if n == 1:
            return self.inner.decode(features, ts, last)
        share = -(-n // self.size)
        # Who comes after the last node decodes that one once more: there is a part for everyone.
        part = slice(min(self.rank * share, n - 1), min((self.rank + 1) * share, n))
        predictions = self.inner.decode(features[part], ts[part])
        if any(prediction.offsets for prediction in predictions):
            raise ValueError("reuse of the guidance offset does not go with decoders spread over processes")
        mine = torch.stack([prediction.out for prediction in predictions])  # (<= share, B, C, H, W)
        mine = torch.cat([mine, mine[-1:].expand(share - len(mine), *mine.shape[1:])])  # (share, B, C, H, W)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return [Prediction(out) for part in parts for out in part][:n]
