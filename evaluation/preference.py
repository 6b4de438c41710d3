"""What people would prefer, as the published models ImageReward and HPS v2 guess it; their packages are not ours.

The packages are imported when asked for. They fetch their own weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evaluation.metrics.reference import how_made, incomplete, open_samples
from ldm.cli.parser import Parser, command
from ldm.cli.setup import check_output
from ldm.io.errors import blame, one_line

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image

Judge = Callable[["Image.Image", str], float]
PACKAGES = {"image-reward": "ImageReward", "hps-v2.1": "hpsv2"}


def image_reward(package: Any) -> Judge:
    """ImageReward-v1.0, about 0 on average. Source: arXiv 2304.05977."""
    model = package.load("ImageReward-v1.0")
    return lambda image, prompt: float(model.score(prompt, image))


def hps(package: Any) -> Judge:
    """Human Preference Score v2.1, about 0.2 to 0.3. Source: arXiv 2306.09341."""
    return lambda image, prompt: float(package.score(image, prompt, hps_version="v2.1")[0])


JUDGES: dict[str, Callable[[Any], Judge]] = {"image-reward": image_reward, "hps-v2.1": hps}


def load_judge(name: str) -> Judge:
    """The model of that name.

    Raises:
        FeatureError: its package is not installed or does not work here, or its weights can't be had.
    """
    from evaluation.runs.errors import FeatureError

    package = PACKAGES[name]
    try:
        return JUDGES[name](import_module(package))
    except ModuleNotFoundError as error:
        raise FeatureError(
            f"{name} needs the package {package}, which is not installed or lacks {error.name}: "
            f"pip install {'image-reward' if package == 'ImageReward' else package}"
        ) from error
    except Exception as error:  # another project's code and its download can fail in any way
        raise FeatureError(
            f"{name}: its package {package} or its weights can't be used here: {one_line(error)[:200]}"
        ) from error


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="preference.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("samples", metavar="SAMPLES", help="pictures: a folder, or an npz or npy file")
    p.add_argument("--prompts", metavar="FILE", help="as evaluation/clip_score.py takes them")
    p.add_argument("--model", choices=PACKAGES, default="image-reward", help="who judges")
    p.add_argument("--out", metavar="JSON", help="write the result, with all that it depends on")
    return p


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    pictures = open_samples("SAMPLES", args.samples)
    made = how_made("SAMPLES", pictures)
    import numpy as np
    from tqdm import tqdm

    from evaluation.metrics.captions import prompts_of
    from evaluation.metrics.distances import mean_of
    from evaluation.results import Result, identity, publish
    from evaluation.runs.errors import FeatureError, PictureError
    from ldm.io.images import to_pil

    with blame("--prompts", (PictureError,)):
        prompts = prompts_of(pictures, args.prompts)
    with blame("--model", (FeatureError,)):
        judge = load_judge(args.model)
    with blame("SAMPLES", (PictureError,)):
        each = np.array(
            [
                judge(to_pil(picture[None])[0], prompt)
                for picture, prompt in tqdm(
                    zip(pictures, prompts, strict=True), total=len(prompts), desc=args.model, disable=None
                )
            ]
        )
    name = args.model.replace("-", "_").replace(".", "_")
    values = mean_of(name, each, prompts)
    protocol = {
        "measure": name,
        "n": len(each),
        "prompts": made.get("protocol_sha256"),
        "captions_sha256": identity({"captions": prompts}),
    }
    publish(Result(values, protocol, made, incomplete(pictures, made)), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("preference.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
