"""CLIP-score: how well images fit the prompts that they were made from, by variants with explicit names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.metrics.extractors import ClipModel, ModelError, find_recipe, load_clip, score_pairs
from evaluation.metrics.result import Result, mean_values
from evaluation.runs.images import Source, image_warnings, open_with_prompts
from ldm.cli.setup import find_device
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256, json_sha256

PREFIX = "A photo depicts "


@dataclass(frozen=True)
class Variant:
    """scale * cos(image, prefix + prompt)."""

    scale: float
    clamped: bool  # cosines below 0 count as 0
    prefix: str = ""
    model: str | None = None  # where the weights are published; None = any model
    shape: tuple[int, int, int, int] | None = None  # pixels, patch size, width, layers, by which another model is told


VARIANTS = {
    "hessel-b32": Variant(2.5, True, PREFIX, "openai/clip-vit-base-patch32", (224, 32, 768, 12)),
    "cos100-l14": Variant(100.0, False, "", "openai/clip-vit-large-patch14", (224, 14, 1024, 24)),
    "cos100-g14": Variant(100.0, False, "", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", (224, 14, 1408, 40)),
    "hessel": Variant(2.5, True, PREFIX),
    "cos100": Variant(100.0, False),
}


def compute(
    samples: Source,
    *,
    variant: str = "hessel-b32",
    weights: str | Path | ClipModel,
    prompts: str | Path | Sequence[str] | None = None,
    vocabulary: str | Path | None = None,
    resize: str = "clip-crop",
    batch_size: int = 50,
    device: str = "auto",
) -> Result:
    """CLIP-score of images: `clip_score_VARIANT` with its 95 % interval, and how many prompts CLIP had to cut.

    Args:
        samples: see `Source`.
        variant: one of VARIANTS.
        weights: folder of the CLIP model, of transformers or open_clip, or what `load_variant` loaded.
        prompts: see `prompts_of`.
        vocabulary, device: of a model that is not loaded yet: CLIP's vocabulary (None = the folder's, or an installed
            one); auto, cpu, cuda, cuda:N or mps.
        resize: how images are resized for the model, one of RECIPES.
        batch_size: images per batch; changes speed and memory only.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    images, prompts = open_with_prompts(samples, prompts)
    kind, recipe = find_variant(variant), find_recipe(resize)
    model = weights if isinstance(weights, ClipModel) else load_variant(variant, weights, vocabulary, device)
    with fault_of("vocabulary"):
        texts = [kind.prefix + prompt for prompt in prompts]
        cut = sum(model.tokenizer.cut(texts))
        tokens = model.tokenizer(texts).tolist()

    def score(prepared: Tensor, texts: Sequence[str]) -> np.ndarray:
        embedded = model.embed_images(prepared.to(model.device)), model.embed_texts(texts)
        return scores(*(vectors.cpu().numpy() for vectors in embedded), kind)

    with fault_of("samples"):
        each = score_pairs(score, images, texts, model.size, recipe, batch_size, "CLIP")
    name, made = f"clip_score_{variant}", images.provenance
    protocol = {"measure": name, "features_sha256": file_sha256(model.weights), "resize": resize, "size": model.size}
    protocol |= {"n": len(each), "prompts": made.get("protocol_sha256")}
    texts = {"captions": prompts, "tokens": tokens}
    protocol |= {f"{what}_sha256": json_sha256({what: of}) for what, of in texts.items()}
    warnings = image_warnings(images)
    if cut:
        longer = f"longer than CLIP reads ({model.tokenizer.max_length} tokens) and lost their ends"
        warnings.append(f"{cut} of {len(prompts)} captions are {longer}")
    return Result(mean_values(name, each, prompts) | {"captions_cut": cut}, protocol, made, warnings)


def find_variant(name: str) -> Variant:
    """The variant of that name. Raises SettingError: `variant`: there is none."""
    if name not in VARIANTS:
        raise SettingError("variant", f"{name!r} is not one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def load_variant(
    variant: str, weights: str | Path, vocabulary: str | Path | None = None, device: str = "auto"
) -> ClipModel:
    """The CLIP model of a variant, on its device; see `compute`. Raises SettingError: `weights`: no CLIP model, or not
    the one that the variant is defined with; `device`: not there."""
    place, kind = find_device(device), find_variant(variant)
    with fault_of("weights"):
        model = load_clip(weights, vocabulary)
        if kind.shape not in (None, found := (model.size, *model.shape)):
            model_of = f"{kind.model} (pixels, patch size, width, layers {kind.shape})"
            other = f"{weights} has {found}; for another model use hessel or cos100"
            raise ModelError(f"{variant} is defined with {model_of}; {other}")
    return model.to(place)


def scores(images: np.ndarray, texts: np.ndarray, variant: Variant) -> np.ndarray:
    """The score of each pair, (N,). `images`, `texts`: embeddings (N, D), of any length. Source: CLIPScore (arXiv
    2104.08718)."""
    images, texts = np.float64(images), np.float64(texts)
    cosines = (images * texts).sum(1) / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))
    return variant.scale * (cosines.clip(0) if variant.clamped else cosines)
