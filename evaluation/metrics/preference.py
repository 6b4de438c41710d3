"""Scores of human preference by the published models ImageReward and HPS v2.1.

Their packages are not requirements of this project: they are imported when asked for, and download their own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from evaluation.metrics import ModelError
from evaluation.metrics.captions import prompts_of
from evaluation.metrics.result import Result, mean_values
from evaluation.runs.images import Source, image_warnings, open_samples
from ldm.io.errors import SettingError, fault_of, one_line
from ldm.io.files import json_sha256
from ldm.io.images import to_pil

Scorer = Callable[[Image.Image, str], float]
PACKAGES = {"image-reward": "ImageReward", "hps-v2.1": "hpsv2"}


def compute(
    samples: Source, *, model: str = "image-reward", prompts: str | Path | Sequence[str] | None = None
) -> Result:
    """The mean score of images with their prompts, under the model's name, with its 95 % interval.

    Args:
        samples: see `Source`.
        model: one of PACKAGES.
        prompts: a prompt per image, or a file of them, see `prompts_of`; None = those stored in the images.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    with fault_of("samples"):
        images = open_samples(samples)
        made = images.provenance
    with fault_of("prompts"):
        prompts = prompts_of(images, prompts)
    with fault_of("model"):
        score = load_scorer(model)
    with fault_of("samples"):
        pairs = tqdm(zip(images, prompts, strict=True), total=len(prompts), desc=model, disable=None)
        each = np.array([score(to_pil(image[None])[0], prompt) for image, prompt in pairs])
    name = model.replace("-", "_").replace(".", "_")
    protocol = {
        "measure": name,
        "n": len(each),
        "prompts": made.get("protocol_sha256"),
        "captions_sha256": json_sha256({"captions": prompts}),
    }
    return Result(mean_values(name, each, prompts), protocol, made, image_warnings(images))


def load_scorer(name: str) -> Scorer:
    """The model of that name: an image and its prompt -> a score. Raises ModelError: its package is not installed or
    does not work here, or its weights can't be had. SettingError: `model`: there is none of that name."""
    if name not in PACKAGES:
        raise SettingError("model", f"{name!r} is not one of {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    try:
        return SCORERS[name](import_module(package))
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{name} needs the package {package}, which is not installed or lacks {error.name}: "
            f"pip install {'image-reward' if package == 'ImageReward' else package}"
        ) from error
    except Exception as error:  # another project's code and its download can fail in any way
        raise ModelError(
            f"{name}: its package {package} or its weights can't be used here: {one_line(error)[:200]}"
        ) from error


def image_reward(package: Any) -> Scorer:
    """ImageReward-v1.0, about 0 on average. Source: arXiv 2304.05977."""
    model = package.load("ImageReward-v1.0")
    return lambda image, prompt: float(model.score(prompt, image))


def hps(package: Any) -> Scorer:
    """Human Preference Score v2.1, about 0.2 to 0.3. Source: arXiv 2306.09341."""
    return lambda image, prompt: float(package.score(image, prompt, hps_version="v2.1")[0])


SCORERS: dict[str, Callable[[Any], Scorer]] = {"image-reward": image_reward, "hps-v2.1": hps}
