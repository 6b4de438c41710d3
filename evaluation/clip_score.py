"""CLIP-score: how well pictures fit the texts that they were made from, by explicitly named variants.

hessel-b32 is 2.5 max(cos, 0) with the prefix "A photo depicts" and ViT-B/32 (arXiv 2104.08718), which the paper
reports; cos100-l14 and cos100-g14 are 100 cos with ViT-L/14 of OpenAI and ViT-g/14 of LAION. hessel and cos100 are
the same with any CLIP model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evaluation.metrics.reference import RECIPES, add_run, how_made, incomplete, open_samples
from ldm.cli.parser import Parser, command
from ldm.cli.setup import check_output
from ldm.io.errors import BadInput, blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from evaluation.metrics.clip import ClipModel
    from evaluation.runs.images import Pictures

PREFIX = "A photo depicts "
RESIZE = "clip-crop"


@dataclass(frozen=True)
class Variant:
    """scale * cos of picture and prefix + text.

    clamped: cosines below 0 count as 0.
    model:   where the weights are published; None = any model.
    shape:   pixels, patch size, width and layers of its vision encoder, by which weights of another model are told.
    """

    scale: float
    clamped: bool
    prefix: str = ""
    model: str | None = None
    shape: tuple[int, int, int, int] | None = None


VARIANTS = {
    "hessel-b32": Variant(2.5, True, PREFIX, "openai/clip-vit-base-patch32", (224, 32, 768, 12)),
    "cos100-l14": Variant(100.0, False, "", "openai/clip-vit-large-patch14", (224, 14, 1024, 24)),
    "cos100-g14": Variant(100.0, False, "", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K", (224, 14, 1408, 40)),
    "hessel": Variant(2.5, True, PREFIX),
    "cos100": Variant(100.0, False),
}


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="clip_score.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("samples", metavar="SAMPLES", help="pictures: a folder, or an npz or npy file")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help="a line per picture, JSON lines with file and prompt, or JSON; default: what is in the pictures",
    )
    p.add_argument("--variant", choices=VARIANTS, default="hessel-b32", help="which score")
    p.add_argument(
        "--weights", metavar="DIR", required=True, help="folder of the CLIP model, of transformers or open_clip"
    )
    p.add_argument("--vocabulary", metavar="PATH", help="CLIP's vocabulary; default: the folder's, or an installed one")
    p.add_argument("--resize", choices=RECIPES, default=RESIZE, help="how pictures come to the model's size")
    add_run(p)
    return p


def scores(images: np.ndarray, texts: np.ndarray, variant: Variant) -> np.ndarray:
    """The score of each pair, (N,).

    Args:
        images, texts: (N, D), of any length.

    Source: CLIPScore (arXiv 2104.08718).
    """
    import numpy as np

    images, texts = np.float64(images), np.float64(texts)
    cosines = (images * texts).sum(1) / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))
    return variant.scale * (cosines.clip(0) if variant.clamped else cosines)


def load_model(args: argparse.Namespace) -> tuple[ClipModel, torch.device]:
    """The model, which must be the one that the variant is defined with."""
    from evaluation.metrics.clip import load_clip
    from evaluation.runs.errors import FeatureError
    from ldm.cli.devices import find_device

    device, variant = find_device(args.device), VARIANTS[args.variant]
    with blame("--weights", (FeatureError, OSError)):
        model = load_clip(args.weights, args.vocabulary)
    if variant.shape not in (None, found := (model.size, *model.shape)):
        names = "pixels, patch size, width, layers"
        raise BadInput(
            f"--weights: {args.variant} is defined with {variant.model} ({names} {variant.shape}); "
            f"{args.weights} has {found}; for another model use hessel or cos100"
        )
    return model.to(device), device


def measure(
    pictures: Pictures,
    prompts: Sequence[str],
    model: ClipModel,
    device: torch.device,
    variant: Variant,
    recipe: str,
    batch: int,
) -> np.ndarray:
    """The score of every picture with its prompt, (N,)."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from evaluation.metrics.resize import resize

    found, waiting = [], []
    for i, picture in enumerate(tqdm(pictures, total=len(prompts), desc="CLIP", unit="image", disable=None)):
        waiting.append(resize(picture[None], model.size, recipe))
        if len(waiting) == batch or i == len(prompts) - 1:
            texts = [variant.prefix + prompt for prompt in prompts[i + 1 - len(waiting) : i + 1]]
            seen = model.see(torch.cat(waiting).to(device))
            found.append(scores(seen.cpu().numpy(), model.read(texts).cpu().numpy(), variant))
            waiting = []
    return np.concatenate(found)


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    pictures = open_samples("SAMPLES", args.samples)
    made = how_made("SAMPLES", pictures)
    from evaluation.metrics.captions import prompts_of
    from evaluation.metrics.distances import mean_of
    from evaluation.results import Result, identity, publish
    from evaluation.runs.errors import PictureError
    from ldm.io.files import file_sha256

    with blame("--prompts", (PictureError,)):
        prompts = prompts_of(pictures, args.prompts)
    model, device = load_model(args)
    variant = VARIANTS[args.variant]
    with blame("--vocabulary", (ValueError,)):
        texts = [variant.prefix + prompt for prompt in prompts]
        cut = sum(model.tokenizer.cut(texts))
        tokens = model.tokenizer(texts).tolist()
    with blame("SAMPLES", (PictureError,)):
        each = measure(pictures, prompts, model, device, variant, args.resize, args.batch_size)
    name = f"clip_score_{args.variant}"
    values = mean_of(name, each, prompts) | {"captions_cut": cut}
    warnings = incomplete(pictures, made)
    warnings += (
        [
            f"{cut} of {len(prompts)} captions are longer than CLIP reads ({model.tokenizer.max_length} tokens) "
            f"and lost their ends"
        ]
        if cut
        else []
    )
    protocol = {
        "measure": name,
        "features_sha256": file_sha256(model.weights),
        "resize": args.resize,
        "size": model.size,
        "n": len(each),
        "prompts": made.get("protocol_sha256"),
        "captions_sha256": identity({"captions": prompts}),
        "tokens_sha256": identity({"tokens": tokens}),
    }
    publish(Result(values, protocol, made, warnings), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("clip_score.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
