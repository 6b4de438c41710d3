"""Feature extractors: pretrained networks by name, and how images are resized for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.metrics import ModelError
from evaluation.metrics.clip import load_clip
from evaluation.metrics.inception import Inception
from ldm.checkpoint.download import DownloadError, fetch
from ldm.cli.setup import find_device
from ldm.io.errors import SettingError, one_line
from ldm.io.files import file_sha256
from ldm.io.images import to_pil
from ldm.modules.efficientnet import efficientnet_lite0, feature_maps
from ldm.modules.encoders.clip import from_folder

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


class Extractor(nn.Module, ABC):
    """Images -> features. A network has its own `load`, `extract`, and constants: its name, how images are resized for
    it usually, and the side of its input in pixels.

    Args:
        weights: file or folder of the network's weights; None = those of the network's package or cache.
        resize: a name of RECIPES; None = the usual one.

    Raises ModelError: the weights can't be had. SettingError: `resize`: there is no such recipe.
    """

    name: str
    usual_resize: str
    size: int

    def __init__(self, weights: str | Path | None = None, resize: str | None = None) -> None:
        super().__init__()
        self.resize = find_recipe(resize or self.usual_resize)
        self.network, self.weights = self.load(None if weights is None else Path(weights))
        self.network.eval().requires_grad_(False)
        self.sha256 = file_sha256(self.weights)

    @abstractmethod
    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        """The network, and the file that its weights came from."""

    @property
    def recipe(self) -> str:
        """Features and resize in words, for reports."""
        return f"{self.name}, pooled; {self.resize} to {self.size} px"

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size -> (B, 3, size, size)."""
        return resized(images, self.size, self.resize)

    @abstractmethod
    def extract(self, prepared: Tensor) -> Features:
        """Images as `prepare` returns them -> all features that measures need."""

    def features(self, images: Iterable[Tensor]) -> Features:
        """All features of B images (3, H, W) in [-1, 1], each of any size and resized on its own."""
        return self.extract(torch.cat([self.prepare(image[None]) for image in images]).to(self.device))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], of any size -> features (B, D)."""
        return self.extract(self.prepare(images)).pooled


class EfficientNetLite0(Extractor):
    """Features of EfficientNet-lite0 before its classifier, averaged over positions: 1280 of them, >= 0.

    Its weights come with a package, so nothing is downloaded. Spatial: 7 channels of the last map, 4 x 4.
    Source: EfficientNet (arXiv 1905.11946), the lite variant; weights trained on ImageNet.
    """

    name, usual_resize, size = "efficientnet-lite0", "torch-antialias", 128

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        try:
            network, own = efficientnet_lite0()
        except ModuleNotFoundError as error:
            raise ModelError(f"the package of module {error.name} is missing; {INSTALL}") from error
        weights = weights or own
        network = fill(network, weights, self.name)
        # Half the time of the default layout on a CPU.
        return network.to(memory_format=torch.channels_last), weights

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        x = feature_maps(self.network, prepared)  # (B, 1280, 4, 4)
        pooled = x.mean((2, 3))
        return Features(pooled, spatial_features(x), self.network._fc(pooled))


class Inception2015(Extractor):
    """The network of the published Fréchet distances: 2048 features, 7 x 17 x 17 spatial ones, 1008 classes.

    Its weights are torch-fidelity's conversion of the published ones: a local file, the cache of torch.hub where
    torch-fidelity puts it, or else its download.
    """

    name, usual_resize, size = "inception-2015", "tf1-bilinear", 299

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
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


class DinoV2(Extractor):
    """The class token of DINOv2 after the final norm; 1024 features of the large model.
    Raises ModelError: no folder with the model as the transformers library stores it. Source: DINOv2 (arXiv
    2304.07193); its use for Fréchet distances: arXiv 2306.04675."""

    name, usual_resize, size = "dinov2", "clean", 224

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        file = Path(weights or "") / "model.safetensors"
        if weights is None or not file.is_file():
            raise ModelError(
                f"{self.name}: {weights or 'no weights are named'}: expected a folder with config.json "
                f"and model.safetensors of facebook/dinov2-large"
            )
        try:
            return from_folder("Dinov2Model", weights), file
        except ValueError as error:
            raise ModelError(f"{self.name}: {one_line(error)}") from error

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        mean, std = (torch.tensor(v).view(3, 1, 1).to(prepared) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return Features(self.network(pixel_values=((prepared + 1) / 2 - mean) / std).pooler_output)


class Clip(Extractor):
    """CLIP's embedding of an image, made unit length. Raises ModelError: see `evaluation.metrics.clip.load_clip`."""

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
    Raises ModelError: no such file, or not the weights of this network."""
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
    extractor: Extractor | str, weights: str | Path | None = None, resize: str | None = None, device: str = "auto"
) -> Extractor:
    """A feature network. Only the weights of inception-2015 may be downloaded.

    Args:
        extractor: one that is loaded, which is returned; or one of EXTRACTORS.
        weights, resize: see `Extractor`.
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ModelError: see the networks; or the name is not one of EXTRACTORS.
        SettingError: `device` or `resize`: there is none of that name.
    """
    if isinstance(extractor, Extractor):
        return extractor
    if extractor not in EXTRACTORS:
        raise ModelError(f"{extractor!r} is not one of {', '.join(EXTRACTORS)}")
    place = find_device(device)
    return EXTRACTORS[extractor](weights, resize).to(place)


def network_fields(extractor: Extractor) -> dict[str, Any]:
    """The network and the resize, for the protocol of a result."""
    return {
        "extractor": extractor.name,
        "features_sha256": extractor.sha256,
        "resize": extractor.resize,
        "size": extractor.size,
    }


# Resizing. The recipe changes a Fréchet distance by as much as a model does, so every result names it.
# Source: On Aliased Resizing and Surprising Subtleties in GAN Evaluation (arXiv 2104.11222).


def clean(images: Tensor, size: int) -> Tensor:
    """Pillow's bicubic filter, smoothed when it shrinks, one channel at a time and without rounding to levels."""
    channels = images.detach().float().cpu().flatten(0, 1).numpy()  # (B*3, H, W)
    resized = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in channels]
    return torch.from_numpy(np.stack(resized)).unflatten(0, images.shape[:2]).clamp(-1, 1).to(images)


def tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """What TensorFlow 1 did: the pixel at i is read at i * old / new, corners not aligned, nothing smoothed."""

    def between(x: Tensor, dim: int) -> Tensor:
        old = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(old / size, dtype=torch.float32)
        low = at.long()
        share = (at - low).to(x.dtype).view([-1 if d == dim else 1 for d in range(4)])
        first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=old - 1))
        return first + (second - first) * share

    return between(between(images, 3), 2)


def torch_bilinear(images: Tensor, size: int, antialias: bool = False) -> Tensor:
    """PyTorch's bilinear resize with pixel centres, as most ports of the score use it; or smoothed when it shrinks."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


def clip_crop(images: Tensor, size: int) -> Tensor:
    """What CLIP's authors do: 8 bits, Pillow's bicubic filter for the shorter side, the middle cut out."""
    found = []
    for image in to_pil(images):
        width, height = (max(size, int(size * side / min(image.size))) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        found.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)  # (3, size, size)
    return torch.stack(found).to(images)


RECIPES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": clean,
    "tf1-bilinear": tf1_bilinear,
    "torch-bilinear": torch_bilinear,
    "torch-antialias": partial(torch_bilinear, antialias=True),
    "clip-crop": clip_crop,
}


def find_recipe(name: str) -> str:
    """The name, if it is one of RECIPES; else raises a SettingError of `resize`."""
    if name not in RECIPES:
        raise SettingError("resize", f"{name!r} is not one of {', '.join(RECIPES)}")
    return name


def resized(images: Tensor, size: int, recipe: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size); each depends on itself alone.
    Raises ValueError: the recipe is not one of RECIPES, or the images have another shape."""
    find_recipe(recipe)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W); got {tuple(images.shape)}")
    return RECIPES[recipe](images, size)
