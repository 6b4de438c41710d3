"""HED: how much each pixel is an edge, by a network on the layers of VGG16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width and convolutions of each
MEANS = (104.00698793, 116.66876762, 122.67891434)  # of blue, green and red in the images of the older network


class Stage(nn.Module):
    """Convolutions at one size, and the score that they give each pixel; each stage but the first begins with pooling.

    Args:
        before, width: channels of what it takes, and of its own.
        count: of convolutions.
    """

    def __init__(self, before: int, width: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width if i else before, width, 3, padding=1) for i in range(count))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> features (B, C', H, W), scores (B, 1, H, W)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """The published network, in either of its two versions.

    Args:
        combined: the older one, which weighs the scores of its stages; else their mean counts.

    Source: Xie and Tu (arXiv 1504.06375); the older network with the release of ControlNet 1.0, the other with 1.1.
    """

    def __init__(self, combined: bool) -> None:
        super().__init__()
        if combined:
            self.combine = nn.Conv2d(len(STAGES), 1, 1)
        else:
            self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.combined, before = combined, 3
        for i, (width, count) in enumerate(STAGES, start=1):
            setattr(self, f"block{i}", Stage(before, width, count))
            before = width

    def scores(self, image: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W), RGB in 0..255 -> the scores of each stage, each half as high and wide as that before."""
        if self.combined:
            x = image.flip(1) - torch.tensor(MEANS, device=image.device).view(1, 3, 1, 1)
        else:
            x = image - self.norm
        found = []
        for i in range(1, len(STAGES) + 1):
            x, score = self.get_submodule(f"block{i}")(F.max_pool2d(x, 2) if i > 1 else x)
            found.append(score)
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB in 0..255, H and W at least 16 -> how much each pixel is an edge, (B, 1, H, W)."""
        size = image.shape[2:]
        scores = torch.cat([F.interpolate(score, size=size, mode="bilinear") for score in self.scores(image)], dim=1)
        return torch.sigmoid(self.combine(scores) if self.combined else scores.mean(1, keepdim=True))
