"""Pretrained networks for measures, by name, and how images are resized for them.

A feature extractor makes features of images; CLIP's two encoders make unit vectors of images and of texts. CLIP comes
from a folder on this machine. Source: CLIP (arXiv 2103.00020), OpenCLIP (arXiv 2212.07143).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.metrics.inception import Inception
from evaluation.runs.images import Images, batched, reading
from ldm.checkpoint.download import DownloadError, fetch
from ldm.cli.setup import find_device
from ldm.io.errors import SettingError, fault_of, one_line
from ldm.io.files import file_sha256, read_json
from ldm.io.images import to_pil
from ldm.modules.efficientnet import efficientnet_lite0, feature_maps
from ldm.modules.encoders.clip import MEAN, STD, from_folder
from ldm.modules.encoders.clip_tokenizer import ClipTokenizer
from ldm.modules.encoders.dual import DualEncoder
from ldm.modules.encoders.openclip import OpenCLIP, Vision
from ldm.modules.encoders.tokenizer import tokenize
from ldm.retrieval.embedders import load_embedder

INSTALL = 'install it with: pip install -e ".[eval]"'
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
SPATIAL_CHANNELS = 7  # of a map of features, as the ADM suite takes them
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of red, green, blue


class ModelError(ValueError):
    """A model that a measure needs can't be had."""


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1], shifted and scaled as a network was trained with, given for 0..1."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(images) for v in (mean, std))
    return ((images + 1) / 2 - mean) / std


# CLIP

OPEN_CONFIG = "open_clip_config.json"
OPEN_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
EXPECTED = (
    "expected a folder with config.json and model.safetensors of a CLIP model (such as "
    "openai/clip-vit-base-patch32), or with open_clip_config.json and open_clip_model.safetensors (or "
    "open_clip_pytorch_model.bin), or models/rdm/emoji-encoder"
)


class ClipModel(nn.Module, ABC):
    """Images and texts to unit vectors."""

    weights: Path  # the file of the weights
    size: int  # side of the vision encoder's input in pixels
    shape: tuple[int, int, int]  # its patch size, width and layers
    mean, std = MEAN, STD  # of the images, as it was trained with

    def __init__(self, tokenizer: ClipTokenizer | DualTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def embed_images(self, prepared: Tensor) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1] -> (B, D), unit length."""
        return F.normalize(self.image_features(normalised(prepared, self.mean, self.std)))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, D), unit length; what is too long loses its end, see `ClipTokenizer.cut`.
        Raises ValueError: the vocabulary is missing."""
        return F.normalize(self.text_features(self.tokenizer(texts).to(self.device)))

    @torch.no_grad()
    def agreement(self, prepared: Tensor, texts: Sequence[str]) -> Tensor:
        """How well images, see `embed_images`, and as many texts agree: cosines at the model's own scale, (B,). That of
        PickScore is a score of preference (arXiv 2305.01569)."""
        return self.model.logit_scale.exp() * (self.embed_images(prepared) * self.embed_texts(texts)).sum(1)

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, size, size) -> (B, D)."""

    @abstractmethod
    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) -> (B, D)."""


class TransformersClip(ClipModel):
    """A CLIPModel of the transformers library."""

    def __init__(self, folder: Path, vocabulary: Path | None) -> None:
        super().__init__(ClipTokenizer(vocabulary))
        self.model = from_folder("CLIPModel", folder)
        config = self.model.config.vision_config
        self.weights, self.size = folder / "model.safetensors", config.image_size
        self.shape = config.patch_size, config.hidden_size, config.num_hidden_layers

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def text_features(self, tokens: Tensor) -> Tensor:
        return self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)


class OpenClip(ClipModel):
    """A vision transformer with CLIP's text encoder, as the open_clip library stores it."""

    def __init__(self, folder: Path, vocabulary: Path | None) -> None:
        settings = open_clip_settings(folder / OPEN_CONFIG)
        super().__init__(ClipTokenizer(vocabulary, settings["text_cfg"]["context_length"], padding=0))
        self.weights = next((folder / name for name in OPEN_WEIGHTS if (folder / name).is_file()), None)
        if self.weights is None:
            raise ModelError(f"{folder}: none of {', '.join(OPEN_WEIGHTS)} is there")
        vision = settings["vision_cfg"]
        self.size, self.shape = vision["image_size"], (vision["patch_size"], vision["width"], vision["layers"])
        with reading(folder / OPEN_CONFIG, "no such model can be built", ModelError):
            self.model = OpenCLIP("both", **settings)
        with reading(self.weights, f"not the weights of its {OPEN_CONFIG}", ModelError):
            self.model.load_state_dict(read_tensors(self.weights))

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.model.visual(pixels)

    def text_features(self, tokens: Tensor) -> Tensor:
        return self.model.embed_text(tokens)


class DualTokenizer:
    """The tokens of a `DualEncoder`, as `ClipTokenizer` gives those of CLIP."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder, self.max_length = encoder, len(encoder.pos_emb)

    def cut(self, texts: Sequence[str]) -> list[bool]:
        return self.encoder.cut(texts)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return tokenize(self.encoder.tokenizer, texts)


class DualClip(ClipModel):
    """A `DualEncoder` on the features of EfficientNet-lite0, such as models/rdm/emoji-encoder."""

    mean = std = (0.5, 0.5, 0.5)  # EfficientNet's features are of images in [-1, 1]

    def __init__(self, folder: Path, vocabulary: Path | None) -> None:
        embedder = load_embedder(f"emoji:{folder}")
        super().__init__(DualTokenizer(embedder.encoder))
        self.encoder, self.features = embedder.encoder, embedder.features.network
        self.weights, self.size, self.shape = embedder.weights_file, embedder.side, (1, embedder.encoder.width, 0)

    def image_features(self, pixels: Tensor) -> Tensor:
        return self.encoder.images(self.features(pixels))

    def text_features(self, tokens: Tensor) -> Tensor:
        return self.encoder.of_tokens(tokens)


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, which can't execute code."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def open_clip_settings(path: Path) -> dict[str, Any]:
    """The arguments of `OpenCLIP` that a configuration of open_clip asks for.
    Raises ModelError: not such a file, or a model that has more than a vision transformer and CLIP's text encoder."""
    with reading(path, "not a configuration of open_clip", ModelError):
        config = read_json(path)["model_cfg"]
        text, vision = dict(config["text_cfg"]), dict(config["vision_cfg"])
    vision_keys = {*inspect.signature(Vision).parameters} - {"embed_dim", "quick_gelu"}
    text_keys = {"context_length", "vocab_size", "width", "heads", "layers"}
    whole = {"embed_dim", "text_cfg", "vision_cfg"}
    unknown = ({*vision} - vision_keys) | ({*text} - text_keys) | ({*config} - whole - {"quick_gelu"})
    needed = {"image_size", "patch_size", "width", "layers"}
    lacking = (text_keys - {*text}) | (needed - {*vision}) | (whole - {*config})
    if unknown or lacking:
        others, absent = (", ".join(sorted(keys)) or "none" for keys in (unknown, lacking))
        known = "only plain vision transformers with CLIP's text encoder are known here"
        raise ModelError(f"{path}: {known}; unknown: {others}; missing: {absent}")
    return {**{key: config[key] for key in whole}, "quick_gelu": bool(config.get("quick_gelu"))}


def load_clip(folder: str | Path | None, vocabulary: str | Path | None = None) -> ClipModel:
    """The model in a folder, in eval mode; nothing is fetched.

    Args:
        folder: of the transformers or the open_clip library, or of a `DualEncoder`, told apart by its files.
        vocabulary: see `find_vocabulary`; None = the folder's merges.txt, or that of an installed package.

    Raises ModelError: no such folder, or not such a model.
    """
    files = {OPEN_CONFIG: OpenClip, "config.json": TransformersClip, "config.yaml": DualClip}
    kind = next((kind for name, kind in files.items() if folder and (Path(folder) / name).is_file()), None)
    if kind is None:
        raise ModelError(f"clip: {f'{folder}: no such model' if folder else 'no weights are named'}; {EXPECTED}")
    folder = Path(folder)
    if vocabulary is None and (folder / "merges.txt").is_file():
        vocabulary = folder / "merges.txt"
    try:
        return kind(folder, vocabulary).eval().requires_grad_(False)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"clip: {one_line(error)}") from error


# Feature extractors


class Features(NamedTuple):
    """Features of B images."""

    pooled: Tensor  # (B, D); Fréchet distances are of these
    spatial: Tensor | None = None  # (B, S), a few channels of a map of features, position after position; None = no map
    logits: Tensor | None = None  # (B, classes); None = the network has no classifier


class Extractor(nn.Module, ABC):
    """Images -> features.

    Args:
        weights: file or folder of the network's weights; None = those of the network's package or cache.
        resize: a name of RECIPES; None = the usual one.

    Raises ModelError: the weights can't be had. SettingError: `resize`: there is no such recipe.
    """

    name: str
    usual_resize: str
    size: int  # side of the input in pixels

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
        # Channels last: half the time of the default layout on a CPU.
        return fill(network, weights or own, self.name).to(memory_format=torch.channels_last), weights or own

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
                problem = f"{self.name}: its weights can't be downloaded: {one_line(error)}"
                remedy = f"fetch {name} from {INCEPTION_URL} elsewhere, and name the file or put it at {cached}"
                raise ModelError(f"{problem}; {remedy}") from error
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
            expected = "expected a folder with config.json and model.safetensors of facebook/dinov2-large"
            raise ModelError(f"{self.name}: {weights or 'no weights are named'}: {expected}")
        try:
            return from_folder("Dinov2Model", weights), file
        except ValueError as error:
            raise ModelError(f"{self.name}: {one_line(error)}") from error

    @torch.no_grad()
    def extract(self, prepared: Tensor) -> Features:
        return Features(self.network(pixel_values=normalised(prepared, *IMAGENET)).pooler_output)


class Clip(Extractor):
    """CLIP's embedding of an image, made unit length. Raises ModelError: see `load_clip`."""

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
    """The network with the weights of a file. Raises ModelError: no such file, or not the weights of this network."""
    if not weights.is_file():
        raise ModelError(f"{name}: {weights}: no such file; expected its weights")
    with reading(weights, f"not the weights of {name}", ModelError):
        network.load_state_dict(read_tensors(weights))
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


def named_extractor(extractor: Extractor | str, weights: str | Path | None, *how: Any) -> Extractor:
    """What `load_extractor` returns; what it raises is a SettingError, of `weights` if they are given."""
    with fault_of("weights" if weights else "extractor"):
        return load_extractor(extractor, weights, *how)


def network_fields(extractor: Extractor) -> dict[str, Any]:
    """The network and the resize, for the protocol of a result."""
    of = {"extractor": extractor.name, "features_sha256": extractor.sha256}
    return of | {"resize": extractor.resize, "size": extractor.size}


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


def score_pairs(
    score: Callable[[Tensor, Sequence[str]], Any],  # images (B, 3, size, size) in [-1, 1], B texts -> scores (B,)
    images: Images,
    texts: Sequence[str],
    size: int,
    recipe: str,
    batch_size: int,
    label: str,  # of the progress bar
) -> np.ndarray:
    """The score of every image, resized, with its text, (N,) in float64. Raises ImageError: an image can't be read."""
    found = []
    for pairs in batched(zip(images, texts, strict=True), len(texts), batch_size, label):
        prepared = torch.cat([resized(image[None], size, recipe) for image, _ in pairs])
        found.append(np.asarray(score(prepared, [text for _, text in pairs]), np.float64))
    return np.concatenate(found)


def resized(images: Tensor, size: int, recipe: str) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] -> (B, 3, size, size); each depends on itself alone.
    Raises ValueError: the recipe is not one of RECIPES, or the images have another shape."""
    find_recipe(recipe)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have the shape (B, 3, H, W); got {tuple(images.shape)}")
    return RECIPES[recipe](images, size)
