"""Perceptual distances of images: LPIPS, and the same idea with a network whose weights come with a package."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.io.files import PROJECT_ROOT, FileError
from ldm.modules.efficientnet import efficientnet_lite0

VGG16 = "vgg16-397923af.pth"  # torchvision's name for its weights
ALTERNATIVES = (
    "the alternatives without a download are lossconfig.params.perceptual: efficientnet-lite0 (its weights "
    "come with a package) and none"
)
# Kernels of VGG16 by their index in torchvision's list of layers; a slice of LPIPS ends after the last of its row.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
EVERY_CHANNEL = 1e-10  # keeps the division by the norm of a black feature possible


class Perceptual(nn.Module, ABC):
    """A distance of images by the features of a fixed network; always in evaluation mode."""

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1)."""

    def train(self, mode: bool = True) -> Perceptual:
        return super().train(False)


def normalized(features: Tensor) -> Tensor:
    """Features (B, C, H, W) divided by their norm over the channels; in float32, since squares overflow fp16."""
    features = features.float()
    return features / (features.square().sum(1, keepdim=True).sqrt() + EVERY_CHANNEL)


class ScalingLayer(nn.Module):
    """Images in [-1, 1] -> the range that VGG16 was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class WeightedChannels(nn.Module):
    """Learned weights of the channels of a squared difference: (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(Perceptual):
    """LPIPS with VGG16 (arXiv 1801.03924), in the layout of the published first stages (`loss.perceptual_loss.*`).

    Args:
        width: channels of the five slices; others than the published ones are for small networks in tests.
    """

    def __init__(self, width: Sequence[int] = (64, 128, 256, 512, 512)):
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = nn.Module()
        before = 3
        for n, (kernels, channels) in enumerate(zip(SLICES, width, strict=True)):
            layers: dict[str, nn.Module] = {} if n == 0 else {str(kernels[0] - 1): nn.MaxPool2d(2)}
            for index in kernels:
                layers[str(index)] = nn.Conv2d(before, channels, 3, padding=1)
                layers[str(index + 1)] = nn.ReLU()
                before = channels
            slice_ = nn.Sequential()
            for name, layer in layers.items():
                slice_.add_module(name, layer)
            self.net.add_module(f"slice{n + 1}", slice_)
            self.add_module(f"lin{n}", WeightedChannels(channels))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> the output of each slice, (B, C_i, H_i, W_i)."""
        h, outputs = self.scaling_layer(x), []
        for slice_ in self.net.children():
            h = slice_(h)
            outputs.append(h)
        return outputs

    def per_layer(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance at each slice, (B, 5)."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        squares = [(normalized(a) - normalized(b)).square() for a, b in pairs]
        weighted = [self.get_submodule(f"lin{n}")(square) for n, square in enumerate(squares)]
        return torch.stack([w.mean((1, 2, 3)) for w in weighted], dim=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.per_layer(x, y).sum(1)[:, None, None, None]


class EfficientNetDistance(Perceptual):
    """As LPIPS, without learned weights, by features of EfficientNet-lite0 at 1/2, 1/4, 1/8 and 1/16 of the size.

    The squared differences are summed over the channels, and averaged over positions and the four features. Nothing
    is downloaded.

    Raises:
        ValueError: a package is missing.

    Source: EfficientNet (arXiv 1905.11946), the lite variant; weights trained on ImageNet.
    """

    BLOCKS = (0, 2, 4, 10)  # the last before the size is halved

    def __init__(self) -> None:
        super().__init__()
        try:
            network, weights = efficientnet_lite0()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"perceptual: efficientnet-lite0 needs the module {error.name}; install it with: "
                f'pip install -e ".[train]"'
            ) from error
        network.load_state_dict(read(weights))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: self.BLOCKS[-1] + 1]
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, C_i, H_i, W_i)."""
        h, outputs = self.stem((x + 1.0) * (127.5 / 128.0) - 127.0 / 128.0), []
        for i, block in enumerate(self.blocks):
            h = block(h)
            if i in self.BLOCKS:
                outputs.append(h)
        return outputs

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(y), strict=True)
        distances = [(normalized(a) - normalized(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
        return torch.stack(distances).mean(0)[:, None, None, None]


# Weights of VGG16


def read(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a file that PyTorch wrote; nothing in it is run.

    Raises:
        FileError: it can't be read as such.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise FileError(f"{path}: not a file of weights ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise FileError(f"{path}: not a file of weights")
    return state.get("state_dict", state)


def vgg16_file() -> Path:
    """The weights of VGG16: `models/lpips/` of the project, or torch.hub's cache.

    Raises:
        ValueError: they are in neither; the message says what can be done.
    """
    places = (PROJECT_ROOT / "models" / "lpips" / VGG16, Path(torch.hub.get_dir()) / "checkpoints" / VGG16)
    for place in places:
        if place.is_file():
            return place
    raise ValueError(
        f"perceptual: vgg16 needs the weights of VGG16, which are not on this machine: python "
        f"scripts/download_models.py vgg16 fetches them, or name a file with lossconfig.params.perceptual_weights; "
        f"looked for {' and '.join(map(str, places))}; {ALTERNATIVES}"
    )


def lpips(weights: str | Path | None = None) -> LPIPS:
    """LPIPS with the weights of a file.

    Args:
        weights: VGG16 as torchvision has it, LPIPS in the published layout, or a checkpoint of a first stage that was
            trained with it; None = see `vgg16_file`. If a file lacks LPIPS's own weights of channels, they are those
            that come with torchmetrics.

    Raises:
        ValueError, FileError: the weights can't be had, or are not those of the network.
    """
    path = Path(weights) if weights else vgg16_file()
    if not path.is_file():
        raise FileError(f"perceptual_weights: no file {path}; {ALTERNATIVES}")
    state = published_layout(read(path))
    if not any(key.startswith("lin") for key in state):
        state |= channel_weights()
    last = [state.get(f"net.slice{n + 1}.{kernels[0]}.weight") for n, kernels in enumerate(SLICES)]
    if any(weight is None for weight in last):
        raise FileError(f"{path}: neither VGG16 nor LPIPS: it has no kernels of that network")
    network = LPIPS([len(weight) for weight in last])
    missing = [key for key, _ in network.named_parameters() if key not in state]
    if missing:
        raise FileError(f"{path}: not the weights of LPIPS with VGG16: it has no {missing[0]}")
    try:
        network.load_state_dict(network.state_dict() | state)
    except RuntimeError as error:
        raise FileError(f"{path}: not the weights of LPIPS with VGG16: {error}") from error
    return network


def published_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of LPIPS among those of a file, under the published keys."""
    slice_of = {index: n + 1 for n, kernels in enumerate(SLICES) for index in kernels}
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("loss.perceptual_loss.")
        found = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
        if found and int(found[1]) in slice_of:
            renamed[f"net.slice{slice_of[int(found[1])]}.{found[1]}.{found[2]}"] = value
        elif key.startswith(("net.slice", "lin", "scaling_layer.")):
            renamed[key] = value
    return renamed


def channel_weights() -> dict[str, Tensor]:
    """The published weights of LPIPS's channels, which torchmetrics has in its package; it takes seconds to import.

    Raises:
        ValueError: it is not installed.
    """
    package = find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise ValueError(
            f"perceptual: vgg16 needs weights that come with torchmetrics, which is not installed: "
            f'pip install -e ".[eval]"; {ALTERNATIVES}'
        )
    return dict(read(Path(package.origin).parent / "functional/image/lpips_models/vgg.pth"))


def perceptual(name: str, weights: str | None = None) -> Perceptual | None:
    """The distance of this name: vgg16 (LPIPS, as published), efficientnet-lite0, or none.

    Raises:
        ValueError: there is no such distance, or its weights can't be had.
    """
    if name == "vgg16":
        return lpips(weights)
    if weights:
        raise ValueError(f"perceptual_weights: only vgg16 takes a file; perceptual is {name!r}")
    if name == "efficientnet-lite0":
        return EfficientNetDistance()
    if name == "none":
        return None
    raise ValueError(f"perceptual: {name!r} is not one of vgg16, efficientnet-lite0, none")
