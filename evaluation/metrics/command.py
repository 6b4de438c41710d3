"""What the measures' commands share: flags, and how a result is printed. Nothing here imports PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from evaluation.metrics.result import Result
from ldm.cli.parser import MOST, Parser, check_output, count, run_command, whole
from ldm.io.errors import BadInput, flags_named

# The names of registries in modules that need PyTorch; a test holds that they are the same.
EXTRACTORS = ("inception-2015", "efficientnet-lite0", "dinov2", "clip")
RECIPES = ("clean", "tf1-bilinear", "torch-bilinear", "torch-antialias", "clip-crop")
VARIANTS = ("hessel-b32", "cos100-l14", "cos100-g14", "hessel", "cos100")
PREFERENCES = ("image-reward", "pick-score")
T = TypeVar("T")
PROTOCOL = "protocol:"  # before the name of a protocol, whose real images are the reference


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that states the default of each flag that has one, unless its text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class MeasureParser(Parser):
    """The parser of a measure's command, with the arguments that measures share."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=Defaults)

    def add_samples(self) -> None:
        self.add_argument("samples", metavar="SAMPLES", help="the images: a folder, or an npz or npy file")

    def add_prompts(self) -> None:
        self.add_argument(
            "--prompts",
            metavar="FILE",
            help="the prompts of the images: a text file with a line per image, or JSON or JSON lines with file and "
            "prompt (default: the prompts stored in the images)",
        )

    def add_reference(self, what: str) -> None:
        self.add_argument(
            "reference", metavar="REFERENCE", help=f"{what}; or {PROTOCOL}NAME for the real images of a protocol"
        )
        self.add_argument(
            "--data",
            metavar="DIR",
            help=f"folder with the data of {PROTOCOL}NAME (default: the one that the protocol names)",
        )

    def add_bootstrap(self, what: str) -> None:
        self.add_argument("--bootstrap", type=whole(2, MOST), metavar="N", help=f"also compute {what}")

    def add_extractor(self) -> None:
        group = self.add_argument_group("feature network")
        group.add_argument(
            "--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help="the network that computes the features"
        )
        group.add_argument(
            "--weights",
            metavar="PATH",
            help="weights of the network: a file, or a folder for dinov2 and clip (default: those in its package, or "
            "its download)",
        )
        group.add_argument(
            "--resize", choices=RECIPES, help="how images are resized for the network (default: its own)"
        )

    def add_run(self) -> None:
        self.add_argument(
            "--batch-size", type=count, default=50, metavar="N", help="images per batch; changes speed and memory only"
        )
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")

    def add_output(self) -> None:
        self.add_argument("--out", metavar="JSON", help="file for the result, with everything that it depends on")

    def run(self, compute: Callable[[argparse.Namespace], Result], argv: Sequence[str] | None, **flags: str) -> int:
        """Parse, compute, print and write; returns the exit code. `flags`: what the command calls the measure's
        arguments, where it is not --THE-NAME."""

        def run(args: argparse.Namespace) -> None:
            check_output(args.out)
            with flags_named(measure_flags(args) | flags):
                result = compute(args)
            publish(result, args.out)

        return run_command(self, run, argv)


def measure_flags(args: argparse.Namespace) -> dict[str, str]:
    """What the commands call the arguments of the measures, where it is not --THE-NAME."""
    weights = getattr(args, "weights", None)
    return {"samples": "SAMPLES", "reference": "REFERENCE", "extractor": "--weights" if weights else "--extractor"}


def arguments(args: argparse.Namespace, *others: str) -> dict[str, Any]:
    """The arguments of a measure, which are called as those of its command; without the others' and the output's."""
    return {name: value for name, value in vars(args).items() if name not in ("out", "version", *others)}


def reference_of(args: argparse.Namespace, of_protocol: Callable[[str, str | None], T]) -> T | str:
    """The reference: a path, or what `of_protocol` says of protocol:NAME and its data.
    Raises BadInput: --data without a protocol."""
    if args.reference.startswith(PROTOCOL):
        return of_protocol(args.reference.removeprefix(PROTOCOL), args.data)
    if args.data is not None:
        raise BadInput(f"--data: goes with REFERENCE {PROTOCOL}NAME; got {args.reference}")
    return args.reference


def shown(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return "(" + " to ".join(map(shown, value)) + ")"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def publish(result: Result, out: str | None) -> None:
    """Print the values and the warnings, then write the file: a full disk loses no value.
    Raises BadInput: the file can't be written."""
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
