"""What turns images, and texts, into the embeddings of a database."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint import load_config, load_weights
from ldm.io.errors import did_you_mean
from ldm.io.files import PROJECT_ROOT, file_sha256
from ldm.io.images import fit, from_pil
from ldm.modules.efficientnet import EfficientNetFeatures
from ldm.modules.encoders.clip import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.dual import DualEncoder
from ldm.util import instantiate_from_config

EMOJI_FOLDER = PROJECT_ROOT / "models/rdm/emoji-encoder"
CLIP_FOLDER = PROJECT_ROOT / "models/clip/ViT-L-14"
VIT_L_14 = "ViT-L/14"  # what published commands call it


class Embedder(ABC):
    """A network that embeds images, and some of them texts, into one space.

    Args:
        weights: file or folder of its weights; None = where they usually are.

    Raises:
        ValueError: they are not there.
    """

    name: str
    side: int  # of the images that it takes, in pixels

    def __init__(self, weights: Path | None = None):
        self.weights = weights

    @property
    @abstractmethod
    def weights_file(self) -> Path:
        """The file of the weights."""

    @cached_property
    def identity(self) -> str:
        """A hash of the weights: embeddings by other weights can't be compared."""
        return file_sha256(self.weights_file)[:16]

    def prepared(self, image: Image.Image) -> Tensor:
        """An image as the network takes it: scaled to cover a square, cropped, (3, side, side) in [-1, 1]."""
        return from_pil(fit(image, self.side, self.side))

    @abstractmethod
    def images(self, images: Tensor) -> Tensor:
        """Images (B, 3, side, side) in [-1, 1] -> (B, D), not normalised."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D), not normalised.

        Raises:
            ValueError: the network reads no text.
        """
        raise ValueError(f"{self.name} embeds images only, so a text finds nothing; expected an image as the query")

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the network reads."""
        return 0


class EfficientNetLite0(Embedder):
    """Features of EfficientNet-lite0, trained on ImageNet; its weights come with a package."""

    name, side = "efficientnet-lite0", 128

    def __init__(self, weights: Path | None = None):
        super().__init__(weights)
        try:
            self.network = EfficientNetFeatures()
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the package of module {error.name} is missing; install it with: pip install -e '.[retrieval]'"
            ) from error

    @property
    def weights_file(self) -> Path:
        return self.network.weights

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        return self.network(images)


class Clip(Embedder):
    """OpenAI's CLIP in a folder of transformers. Published databases are of ViT-L/14, from images of 256 pixels."""

    name, side = "clip", 256

    def __init__(self, weights: Path | None = None):
        super().__init__(weights or CLIP_FOLDER)
        if not self.weights_file.is_file():
            raise ValueError(
                f"{self.name}: {self.weights_file}: no such file; download config.json and model.safetensors of "
                f"openai/clip-vit-large-patch14 into {self.weights}, or name their folder: {self.name}:FOLDER"
            )

    @property
    def weights_file(self) -> Path:
        return self.weights / "model.safetensors"

    @cached_property
    def vision(self) -> FrozenClipImageEmbedder:
        return FrozenClipImageEmbedder(self.weights)

    @cached_property
    def text(self) -> FrozenCLIPTextEmbedder:
        beside = self.weights / "merges.txt"
        return FrozenCLIPTextEmbedder(self.weights, normalize=False, vocabulary=beside if beside.is_file() else None)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        return self.vision(images)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.text(list(texts))[:, 0]

    def cut(self, texts: Sequence[str]) -> int:
        return sum(self.text.cut(texts))


class Emoji(Embedder):
    """A `DualEncoder` on the features of EfficientNet-lite0, in a folder with config.yaml and model.safetensors."""

    name, side = "emoji", EfficientNetLite0.side

    def __init__(self, weights: Path | None = None):
        super().__init__(weights or EMOJI_FOLDER)
        self.features = EfficientNetLite0()
        if not self.weights_file.is_file():
            raise ValueError(f"{self.name}: {self.weights_file}: no such file; expected the weights of a dual encoder")
        self.encoder = load_dual_encoder(self.weights / "config.yaml", self.weights_file)

    @property
    def weights_file(self) -> Path:
        return self.weights / "model.safetensors"

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        return self.encoder.images(self.features.images(images))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.encoder.texts(texts)

    def cut(self, texts: Sequence[str]) -> int:
        return sum(self.encoder.cut(texts))


def load_dual_encoder(config: Path, weights: Path) -> DualEncoder:
    """A trained encoder, in evaluation mode.

    Raises:
        ValueError: the files do not make one.
    """
    encoder = instantiate_from_config(load_config(config).model)
    if not isinstance(encoder, DualEncoder):
        raise ValueError(f"{config}: its model is a {type(encoder).__name__}; expected a DualEncoder")
    load_weights(encoder, weights)
    return encoder.eval().requires_grad_(False)


EMBEDDERS: dict[str, Callable[[Path | None], Embedder]] = {kind.name: kind for kind in (EfficientNetLite0, Clip, Emoji)}


@cache
def load_embedder(spec: str) -> Embedder:
    """An embedder by name, or NAME:FOLDER with its weights; ViT-L/14 is CLIP. Each is loaded once for a process.

    Raises:
        ValueError: no such embedder, or its weights are not there.
    """
    name, _, weights = ("clip" if spec == VIT_L_14 else spec).partition(":")
    if name not in EMBEDDERS:
        known = [*EMBEDDERS, VIT_L_14]
        raise ValueError(f"there is no embedder {name!r}; accepted: {', '.join(known)}{did_you_mean(name, known)}")
    return EMBEDDERS[name](Path(weights) if weights else None)
