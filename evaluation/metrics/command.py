"""What the measures' commands share: flags, and how a result is printed. Nothing here imports PyTorch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from evaluation.metrics.result import Result
from ldm.cli.arguments import count
from ldm.io.errors import BadInput

# The names of registries in modules that need PyTorch; a test holds that they are the same.
EXTRACTORS = ("inception-2015", "efficientnet-lite0", "dinov2", "clip")
RECIPES = ("clean", "tf1-bilinear", "torch-bilinear", "torch-antialias", "clip-crop")
VARIANTS = ("hessel-b32", "cos100-l14", "cos100-g14", "hessel", "cos100")
PREFERENCES = ("image-reward", "hps-v2.1")
PROTOCOL = "protocol:"  # before the name of a protocol, whose real images are the reference
CACHE = Path.home() / ".cache" / "faster-diffusion-ldm" / "statistics"
SAMPLES = "the images: a folder, or an npz or npy file"
PROMPTS = (
    "the prompts of the images: a text file with a line per image, or JSON or JSON lines with file and prompt "
    "(default: the prompts stored in the images)"
)


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that states the default of each flag that has one, unless its text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def add_reference(p: argparse.ArgumentParser, what: str) -> None:
    p.add_argument(
        "reference", metavar="REFERENCE", help=f"{what}; or {PROTOCOL}NAME for the real images of a protocol"
    )
    p.add_argument(
        "--data",
        metavar="DIR",
        help=f"folder with the data of {PROTOCOL}NAME (default: the one that the protocol names)",
    )


def protocol_name(args: argparse.Namespace) -> str | None:
    """NAME, where the reference is protocol:NAME. Raises BadInput: --data without a protocol."""
    if args.reference.startswith(PROTOCOL):
        return args.reference.removeprefix(PROTOCOL)
    if args.data is not None:
        raise BadInput(f"--data: goes with REFERENCE {PROTOCOL}NAME; got {args.reference}")
    return None


def add_extractor(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("feature network")
    group.add_argument(
        "--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="the network that computes the features"
    )
    group.add_argument(
        "--weights",
        metavar="PATH",
        help="weights of the network: a file, or a folder for dinov2 and clip (default: those in its package, or its "
        "download)",
    )
    group.add_argument("--resize", choices=RECIPES, help="how images are resized for the network (default: its own)")


def add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--batch-size", type=count, default=50, metavar="N", help="images per batch; changes speed and memory only"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", metavar="JSON", help="file for the result, with everything that it depends on")


def add_cache(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--cache",
        default=str(CACHE),
        metavar="DIR",
        help="folder that keeps statistics of reference images; none = keep none",
    )


def measure_flags(args: argparse.Namespace) -> dict[str, str]:
    """What the commands call the arguments of the measures, where it is not --THE-NAME."""
    of_weights = getattr(args, "weights", None)
    return {"samples": "SAMPLES", "reference": "REFERENCE", "extractor": "--weights" if of_weights else "--extractor"}


def shown(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return "(" + " to ".join(map(shown, value)) + ")"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def publish(result: Result, out: str | None) -> None:
    """Print the values and the warnings, then write the file: a full disk loses no value. Raises BadInput: the file
    can't be written."""
    for name, value in result.values.items():
        print(f"{name:24} {shown(value)}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.flush()
    if out is not None:
        try:
            result.write(out)
        except OSError as error:
            raise BadInput(f"--out: can't write {out}: {error.strerror or error}; the values are above") from error
