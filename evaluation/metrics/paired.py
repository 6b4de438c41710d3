"""Distances between the images of an accelerated run and those of the plain run from the same noise.

Every value is named ..._vs_plain: it says how much the acceleration changes the images, not how good they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.metrics.extractors import Extractor, ModelError, named_extractor, network_fields
from evaluation.metrics.frechet import Moments, distance, few_images_warnings, to_numpy, total
from evaluation.metrics.result import Result, mean_values
from evaluation.runs.images import ImageError, ImageFolder, Images, Source, batched, image_warnings, open_samples
from ldm.io.errors import fault_of, one_line
from ldm.io.files import file_sha256, flat
from ldm.io.images import psnr

# Pairs of images, (B, 3, H, W) in [-1, 1] each, -> a value for each pair, (B,).
Measure = Callable[[Tensor, Tensor], Tensor]
SHOWN = 3  # of many images, how many a message names
WINDOW = 11  # of SSIM, in pixels
LPIPS_LEAST = 31  # pixels that AlexNet needs
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
ALIKE = ("protocol", "weights", "config", "averaged", "seeds", "precision")  # what both runs must have in common


def compute(
    plain: Source,
    accelerated: Source,
    *,
    extractor: Extractor | str = "inception-2015",
    weights: str | Path | None = None,
    resize: str | None = None,
    batch_size: int = 50,
    device: str = "auto",
    lpips: bool = False,
) -> Result:
    """PSNR, SSIM, feature distances and the Fréchet distance of an accelerated run from the plain run.

    Args:
        plain, accelerated: see `Source`, and `paired` for what belongs together.
        extractor, weights, resize, device: of the feature network, see `load_extractor`.
        batch_size: pairs per batch; changes speed and memory only.
        lpips: also the perceptual distance LPIPS (AlexNet).

    Raises SettingError: an argument can't be used, or `packages`: torchmetrics is missing.
    """
    with fault_of("plain"):
        plain = open_samples(plain)
    with fault_of("accelerated"):
        accelerated = open_samples(accelerated)
        check_alike(plain.provenance, accelerated.provenance)
        plain, accelerated = paired(plain, accelerated)
        side, least = min(next(iter(plain)).shape[1:]), LPIPS_LEAST if lpips else WINDOW
        if side < least or len(plain.names) < 2:
            got = f"{len(plain.names)} with a side of {side}"
            raise ImageError(f"expected at least 2 pairs of images of at least {least} x {least} pixels; got {got}")
    network = named_extractor(extractor, weights, resize, device)
    with fault_of("packages"):
        measures: dict[str, Measure] = {"psnr": psnr, "ssim": load_ssim()}
    with fault_of("lpips"):
        measures |= {"lpips": load_lpips(network.device)} if lpips else {}
    with fault_of("accelerated"):
        values, width = all_values(plain, accelerated, network, measures, batch_size)
    made, n = accelerated.provenance, len(plain.names)
    protocol = {"measure": "paired", **network_fields(network), "n": n, "plain": {"sha256": plain.sha256()}}
    protocol["prompts"] = made.get("protocol_sha256")
    if lpips:
        sha256 = file_sha256(Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS)
        protocol["lpips"] = {"network": "alexnet", "sha256": sha256, "torchmetrics": version("torchmetrics")}
    warnings = [*image_warnings(plain), *image_warnings(accelerated), *few_images_warnings(n, width, "fid_vs_plain")]
    return Result(values, protocol, {**made, "plain": plain.provenance}, warnings)


def all_values(
    plain: Images, accelerated: Images, extractor: Extractor, measures: Mapping[str, Measure], batch_size: int
) -> tuple[dict[str, Any], int]:
    """The values of the pairs, which are in the same order, by name; and the number of features of the network.
    Raises ImageError: an image can't be read, or the images of a pair differ in size."""
    each: dict[str, list[np.ndarray]] = {}
    moments: list[tuple[Moments, ...]] = []
    pairs = zip(plain, accelerated, plain.names, accelerated.names, strict=True)
    for part in batched(pairs, len(plain.names), batch_size, "pairs", "pair"):
        for a, b, name, other in part:
            if a.shape != b.shape:
                (_, height, width), (_, h, w) = a.shape, b.shape
                raise ImageError(f"{name} has {width} x {height} pixels, its partner {other} has {w} x {h}")
        a, b = (torch.stack(images) for images in list(zip(*part, strict=True))[:2])  # (B, 3, H, W)
        found = {name: measure(a, b) for name, measure in measures.items()}
        one, other = (extractor.features(images).pooled.double().cpu() for images in (a, b))  # (B, D)
        found |= {"feature_distance": (one - other).norm(dim=1), "feature_cosine": F.cosine_similarity(one, other)}
        for name, values in found.items():
            each.setdefault(name, []).append(to_numpy(values))
        moments.append(tuple(Moments.from_features(features.numpy()) for features in (one, other)))
    of_plain, of_accelerated = (total(parts).gaussian() for parts in zip(*moments, strict=True))
    result: dict[str, Any] = {"fid_vs_plain": distance(of_accelerated, of_plain)}
    for name, parts in each.items():
        values = np.concatenate(parts)
        # Identical images have an infinite PSNR, which its mean leaves out.
        result |= mean_values(f"{name}_vs_plain", values[np.isfinite(values)].astype(np.float64))
    result["identical_pictures"] = int(np.isinf(np.concatenate(each["psnr"])).sum())
    return result, len(of_plain.mean)


# What is compared with what


def check_alike(plain: Mapping[str, Any], accelerated: Mapping[str, Any]) -> None:
    """Check that the runs differ only in what an acceleration changes, as far as their provenance is known. Raises
    ImageError: they differ in more; it names the fields."""

    def facts(made: Mapping[str, Any]) -> dict[str, Any]:
        # A run card has the precision among the settings of its method, an image among its other settings.
        method = made["method"] if isinstance(made.get("method"), Mapping) else {}
        return flat({name: made.get(name, method.get(name)) or {} for name in ALIKE})

    ours, theirs = facts(plain), facts(accelerated)
    names = sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])
    if names:
        differ = "; ".join(f"{name} ({ours[name]} there, {theirs[name]} here)" for name in names)
        raise ImageError(
            f"differs from the plain run in {differ}; expected runs that differ in sampler, steps or plan only"
        )


def paired(plain: Images, accelerated: Images) -> tuple[Images, Images]:
    """Both sets in the same order.

    Files are paired by the noise and the inputs that are stored in them, or by name if a side has none stored; the
    images of two arrays by position.

    Raises ImageError: a folder and an array, whose orders differ; runs from different noise; images without a partner,
    or several of the same noise and inputs.
    """
    sides = plain, accelerated
    folders = [isinstance(side, ImageFolder) for side in sides]
    if all(folders):
        return paired_files(plain, accelerated)
    if any(folders):
        why = "a folder is in the order of its names, an array is not; expected two folders or two arrays"
        raise ImageError(f"can't pair {plain.path} with {accelerated.path}: {why}")
    if len(plain.names) != len(accelerated.names):
        there, here = (f"{side.path} has {len(side.names)}" for side in sides)
        raise ImageError(f"{there} images, {here}; they are paired by position, so expected the same number")
    return sides


def paired_files(*folders: ImageFolder) -> tuple[ImageFolder, ...]:
    """The images of two folders in the same order; see `paired`."""
    keys, names = [folder.keys() for folder in folders], [list(folder.names) for folder in folders]
    if set(keys[0]).isdisjoint(keys[1]):
        if all(stored != of for stored, of in zip(keys, names, strict=True)):
            raise ImageError(
                f"different noise or inputs: no image of {folders[0].path} has a partner in {folders[1].path}; "
                f"[noise, start, inputs] is {min(keys[0])} there and {min(keys[1])} here"
            )
        keys = names
    positions = [{key: i for i, key in enumerate(of)} for of in keys]
    for folder, of, position in zip(folders, keys, positions, strict=True):
        if twice := len(of) - len(position):
            shared = f"{twice} images share noise and inputs with another"
            raise ImageError(f"{folder.path}: {shared}; are there several runs in the folder?")
    for folder, ours, theirs in zip(folders, positions, reversed(positions), strict=True):
        if alone := [folder.names[i] for key, i in ours.items() if key not in theirs]:
            some = f"{len(alone)} images of {folder.path} have no partner, such as {', '.join(alone[:SHOWN])}"
            raise ImageError(f"mismatched sets: {some}")
    order = sorted(positions[0])
    return tuple(
        folder.subset([position[key] for key in order]) for folder, position in zip(folders, positions, strict=True)
    )


# Measures of pairs


def load_ssim() -> Measure:
    """SSIM with the published window and constants, from torchmetrics. Source: Wang et al. (2004).
    Raises ModelError: torchmetrics is missing or can't be imported."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except Exception as error:  # a missing package; or a torchvision that does not fit PyTorch, which it imports
        problem = f"SSIM needs torchmetrics, which can't be imported here: {one_line(error)[:160]}"
        remedy = 'pip install -e ".[eval]", and no torchvision rather than one that does not fit PyTorch'
        raise ModelError(f"{problem}; {remedy}") from error

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        a, b = ((x.double() + 1) / 2 for x in (a, b))  # SSIM depends on brightness, so 0..1
        return ssim(a, b, data_range=1.0, kernel_size=WINDOW, reduction="none").reshape(-1)

    return similarity


def load_lpips(device: torch.device) -> Measure:
    """LPIPS with AlexNet, from torchmetrics. Source: arXiv 1801.03924.
    Raises ModelError: torchvision or the weights are missing."""
    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        measure = LearnedPerceptualImagePatchSimilarity("alex").to(device)
    except Exception as error:  # a missing package, a package that does not fit PyTorch, a download that fails
        raise ModelError(
            f"LPIPS needs torchvision (one that fits the installed PyTorch) and its weights "
            f"{LPIPS_WEIGHTS} in torch.hub's folder checkpoints: {one_line(error)[:160]}"
        ) from error
    return lambda a, b: measure.net(a.to(device), b.to(device)).reshape(-1)
