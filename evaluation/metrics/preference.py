"""Scores of human preference by published models, from weights on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.metrics.extractors import ModelError, load_clip, resized
from evaluation.metrics.image_reward import ImageReward
from evaluation.metrics.result import Result, mean_values
from evaluation.runs.images import Source, batched, image_warnings, open_samples, prompts_of, reading
from ldm.checkpoint import read_checkpoint
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256, json_sha256

BATCH = 16
# Where the weights of each model are published, and what they are.
MODELS = {
    "image-reward": "ImageReward.pt of huggingface.co/THUDM/ImageReward, with vocab.txt of bert-base-uncased beside it",
    "pick-score": "the folder of huggingface.co/yuvalkirstain/PickScore_v1",
}


class Scorer(NamedTuple):
    """A model of preference."""

    score: Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, size, size) in [-1, 1], B texts -> scores (B,)
    size: int  # side of its images in pixels
    file: Path  # of its weights
    cut: Callable[[Sequence[str]], list[bool]]  # whether texts are longer than what it reads of them


def compute(
    samples: Source,
    *,
    model: str = "image-reward",
    weights: str | Path | Scorer | None = None,
    prompts: str | Path | Sequence[str] | None = None,
) -> Result:
    """The mean score of images with their prompts, under the model's name, with its 95 % interval.

    Args:
        samples: see `Source`.
        model: one of MODELS; weights: what that says, or what `load_scorer` loaded.
        prompts: see `prompts_of`.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    with fault_of("samples"):
        images = open_samples(samples)
        made = images.provenance
    with fault_of("prompts"):
        prompts = prompts_of(images, prompts)
    scorer = weights if isinstance(weights, Scorer) else load_scorer(model, weights)
    with fault_of("weights"):  # their vocabulary may be missing
        cut = sum(scorer.cut(prompts))
    each = []
    with fault_of("samples"):
        for pairs in batched(zip(images, prompts, strict=True), len(prompts), BATCH, model):
            prepared = torch.cat([resized(image[None], scorer.size, "clip-crop") for image, _ in pairs])
            each.append(scorer.score(prepared, [prompt for _, prompt in pairs]))
    found = torch.cat(each).double().numpy()
    name = model.replace("-", "_")
    protocol = {"measure": name, "features_sha256": file_sha256(scorer.file), "n": len(found)}
    protocol |= {"prompts": made.get("protocol_sha256"), "captions_sha256": json_sha256({"captions": prompts})}
    warnings = image_warnings(images)
    if cut:
        warnings.append(f"{cut} of {len(prompts)} prompts are longer than {model} reads and lost their ends")
    return Result(mean_values(name, found, prompts), protocol, made, warnings)


def load_scorer(name: str, weights: str | Path | None) -> Scorer:
    """The model of that name.
    Raises SettingError: `model`: there is none of that name; `weights`: not there, or not its weights."""
    if name not in MODELS:
        raise SettingError("model", f"{name!r} is not one of {', '.join(MODELS)}")
    with fault_of("weights"):
        if weights is None or not Path(weights).exists():
            raise ModelError(f"{name} needs {MODELS[name]}; got {weights or 'nothing'}")
        if name == "pick-score":
            clip = load_clip(weights)
            return Scorer(clip.agreement, clip.size, clip.weights, clip.tokenizer.cut)
        with reading(weights, f"not {MODELS[name]}", ModelError):  # or a vocabulary that is none
            model = ImageReward(read_checkpoint(weights), Path(weights).with_name("vocab.txt"))
        return Scorer(model, model.size, Path(weights), model.cut)
