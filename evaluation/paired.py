"""How far the pictures of an accelerated run are from those of the plain run from the same noise.

Pictures are paired by the noise and subject that are in the files, else by name; two arrays by place. Every value is
named ..._vs_plain: a distance from the plain run says how much the acceleration changes, not how good the pictures are;
that is evaluation/fid.py's fid_real.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics.command import add_extractor, add_output, add_run, measure_flags, publish
from ldm.cli.parser import Parser, check_output, command
from ldm.io.errors import BadInput, blame, fault_of, flags_named, one_line

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from evaluation.metrics.extractors import Extractor
    from evaluation.runs.images import Images

# Of pairs of pictures (B, 3, H, W) in [-1, 1]: a value each, (B,).
Measure = Callable[["Tensor", "Tensor"], "Tensor"]
SHOWN = 3
WINDOW = 11  # of SSIM, in pixels
LPIPS_LEAST = 31  # pixels that AlexNet needs
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="paired.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("plain", metavar="PLAIN", help="pictures of the plain run: a folder, or an npz or npy file")
    p.add_argument("accelerated", metavar="ACCELERATED", help="pictures of the other run")
    p.add_argument(
        "--lpips", action="store_true", help="perceptual distance LPIPS (AlexNet); needs torchvision and its weights"
    )
    add_extractor(p)
    add_run(p)
    add_output(p)
    return p


def pair(plain: Images, fast: Images) -> tuple[Images, Images]:
    """Both sets in one order.

    Raises:
        ImageError: a folder and an array, whose orders differ; runs from different noise; pictures without a
            partner, or several of the same noise and subject.
    """
    from evaluation.runs.images import ImageError, ImageFolder

    folders = [isinstance(pictures, ImageFolder) for pictures in (plain, fast)]
    if any(folders) and not all(folders):
        raise ImageError(
            f"can't pair {plain.path} with {fast.path}: a folder is in the order of its names, an array "
            f"is not; expected two folders or two arrays"
        )
    if not all(folders):
        if len(plain.names) != len(fast.names):
            raise ImageError(
                f"{plain.path} has {len(plain.names)} pictures, {fast.path} has {len(fast.names)}; "
                f"they are paired by place, so expected as many"
            )
        return plain, fast
    keys = [pictures.keys() for pictures in (plain, fast)]
    if set(keys[0]).isdisjoint(keys[1]):
        if all(of != list(pictures.names) for of, pictures in zip(keys, (plain, fast), strict=True)):
            raise ImageError(
                f"different noise or subjects: no picture of {plain.path} has a partner in {fast.path}; "
                f"[noise, start, subject] is {min(keys[0])} there and {min(keys[1])} here"
            )
        keys = [list(plain.names), list(fast.names)]
    places = [{key: i for i, key in enumerate(of)} for of in keys]
    for pictures, of, place in zip((plain, fast), keys, places, strict=True):
        if len(place) < len(of):
            raise ImageError(
                f"{pictures.path}: {len(of) - len(place)} pictures share noise and subject with "
                f"another; are there several runs in the folder?"
            )
    for one, other, path in ((0, 1, plain.path), (1, 0, fast.path)):
        alone = [(plain, fast)[one].names[i] for key, i in places[one].items() if key not in places[other]]
        if alone:
            raise ImageError(
                f"mismatched sets: {len(alone)} pictures of {path} have no partner, such as {', '.join(alone[:SHOWN])}"
            )
    shared = sorted(places[0])
    return plain.subset([places[0][k] for k in shared]), fast.subset([places[1][k] for k in shared])


def together(plain: Images, fast: Images, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both pictures of each pair, (B, 3, H, W) each, in batches; with progress.

    Raises:
        ImageError: a pair of different sizes.
    """
    import torch
    from tqdm import tqdm

    from evaluation.runs.images import ImageError

    waiting: list[tuple[Tensor, Tensor]] = []
    for i, (a, b) in enumerate(
        tqdm(zip(plain, fast, strict=True), total=len(plain.names), desc="pairs", unit="pair", disable=None)
    ):
        if a.shape != b.shape:
            raise ImageError(
                f"{plain.names[i]} has {a.shape[2]} x {a.shape[1]} pixels, its partner "
                f"{fast.names[i]} has {b.shape[2]} x {b.shape[1]}"
            )
        waiting.append((a, b))
        if len(waiting) == batch or i == len(plain.names) - 1:
            yield torch.stack([a for a, _ in waiting]), torch.stack([b for _, b in waiting])
            waiting = []


def load_ssim() -> Measure:
    """SSIM with the published window and constants, from torchmetrics. Source: Wang et al. (2004).

    Raises:
        ModelError: torchmetrics is missing or can't be imported.
    """
    from evaluation.metrics import ModelError

    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except Exception as error:  # a missing package; or a torchvision that does not fit PyTorch, which it imports
        raise ModelError(
            f"SSIM needs torchmetrics, which can't be imported here: {one_line(error)[:160]}; "
            f'pip install -e ".[eval]", and no torchvision rather than one that does not fit PyTorch'
        ) from error

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        a, b = ((x.double() + 1) / 2 for x in (a, b))  # brightness counts in it, so 0..1
        return ssim(a, b, data_range=1.0, kernel_size=WINDOW, reduction="none").reshape(-1)

    return similarity


def load_lpips(device: torch.device) -> Measure:
    """LPIPS with AlexNet, from torchmetrics. Source: arXiv 1801.03924.

    Raises:
        ModelError: torchvision or the weights are missing.
    """
    from evaluation.metrics import ModelError

    try:
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        measure = LearnedPerceptualImagePatchSimilarity("alex").to(device)
    except Exception as error:  # a missing package, a package that does not fit PyTorch, a download that fails
        raise ModelError(
            f"LPIPS needs torchvision (one that fits the installed PyTorch) and its weights "
            f"{LPIPS_WEIGHTS} in torch.hub's folder checkpoints: {one_line(error)[:160]}"
        ) from error
    return lambda a, b: measure.net(a.to(device), b.to(device)).reshape(-1)


def measure(
    plain: Images, fast: Images, extract: Extractor, device: torch.device, batch: int, measures: Mapping[str, Measure]
) -> tuple[dict[str, Any], int]:
    """All values of the pairs, by explicit name; and how many features the network has.

    measures: of pictures, by name, beside the distances of their features.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F

    from evaluation.metrics.frechet import distance
    from evaluation.metrics.intervals import mean_values
    from evaluation.metrics.statistics import Moments, to_numpy, total

    each: dict[str, list[np.ndarray]] = {}
    moments: tuple[list[Moments], list[Moments]] = ([], [])
    for a, b in together(plain, fast, batch):
        found = {name: measured(a, b) for name, measured in measures.items()}
        seen = [torch.cat([extract.prepare(x[None]) for x in half]) for half in (a, b)]
        one, other = (extract.extract(half.to(device)).pooled.double().cpu() for half in seen)
        found |= {"feature_distance": (one - other).norm(dim=1), "feature_cosine": F.cosine_similarity(one, other)}
        for name, values in found.items():
            each.setdefault(name, []).append(to_numpy(values))
        for parts, features in zip(moments, (one, other), strict=True):
            parts.append(Moments.from_features(features.numpy()))
    ours, theirs = (total(parts).gaussian() for parts in moments)
    result: dict[str, Any] = {"fid_vs_plain": distance(theirs, ours)}
    for name, parts in each.items():
        values = np.concatenate(parts)
        # Equal pictures have no PSNR and are left out of its mean.
        result |= mean_values(f"{name}_vs_plain", values[np.isfinite(values)].astype(np.float64))
    result["identical_pictures"] = int(np.isinf(np.concatenate(each["psnr"])).sum())
    return result, len(ours.mean)


def check_made_alike(plain: Mapping[str, Any], fast: Mapping[str, Any]) -> None:
    """Raise BadInput if the runs, as far as it is known, differ in more than what an acceleration may change."""
    from evaluation.metrics.result import flat

    names = ("protocol", "weights", "config", "averaged", "seeds", "precision")

    def facts(made: Mapping[str, Any]) -> dict[str, Any]:
        # A run card has the precision among the settings of its method, a picture has it beside the others.
        method = made["method"] if isinstance(made.get("method"), Mapping) else {}
        return flat({name: made.get(name, method.get(name)) or {} for name in names})

    ours, theirs = facts(plain), facts(fast)
    differ = [
        f"{name} ({ours[name]} there, {theirs[name]} here)"
        for name in sorted(ours.keys() & theirs.keys())
        if ours[name] != theirs[name]
    ]
    if differ:
        raise BadInput(
            f"ACCELERATED: was not made as PLAIN was: {'; '.join(differ)}; expected runs that differ in "
            f"sampler, steps or plan only"
        )


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    from evaluation.metrics import ModelError
    from evaluation.runs.images import ImageError, incomplete_warnings, open_samples

    with blame("PLAIN"):
        plain = open_samples(args.plain)
        of_plain = plain.provenance
    with blame("ACCELERATED"):
        fast = open_samples(args.accelerated)
        made = fast.provenance
    check_made_alike(of_plain, made)
    import torch

    from evaluation.metrics.extractors import load_extractor, network_fields
    from evaluation.metrics.frechet import few_images_warnings
    from evaluation.metrics.result import Result
    from ldm.io.files import file_sha256
    from ldm.io.images import psnr

    with blame("ACCELERATED", (ImageError,)):
        plain, fast = pair(plain, fast)
    smallest = min(next(iter(plain)).shape[1:])
    least = LPIPS_LEAST if args.lpips else WINDOW
    if smallest < least or len(plain.names) < 2:
        raise BadInput(
            f"PLAIN: expected at least 2 pictures of at least {least} x {least} pixels; got "
            f"{len(plain.names)} with a side of {smallest}"
        )
    with flags_named(measure_flags(args)), fault_of("extractor"):
        extract = load_extractor(args.extractor, args.weights, args.resize, args.device)
        device = extract.device
    with blame("packages", (ModelError,)):
        measures = {"psnr": psnr, "ssim": load_ssim()}
    if args.lpips:
        with blame("--lpips", (ModelError, OSError)):
            measures["lpips"] = load_lpips(device)
            lpips_sha256 = file_sha256(Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS)
    with blame("ACCELERATED", (ImageError,)):
        values, width = measure(plain, fast, extract, device, args.batch_size, measures)
    n = len(plain.names)
    protocol = {
        "measure": "paired",
        **network_fields(extract),
        "n": n,
        "plain": {"sha256": plain.sha256()},
        "prompts": made.get("protocol_sha256"),
    }
    if args.lpips:
        protocol["lpips"] = {"network": "alexnet", "sha256": lpips_sha256, "torchmetrics": version("torchmetrics")}
    warnings = [
        *incomplete_warnings(plain, of_plain),
        *incomplete_warnings(fast, made),
        *few_images_warnings(n, width, "fid_vs_plain"),
    ]
    publish(Result(values, protocol, made | {"plain": of_plain}, warnings), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("paired.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
