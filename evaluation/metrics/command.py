"""What the measures' commands share: flags, and how a result is printed. Nothing here imports PyTorch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evaluation.metrics.result import Result
from ldm.cli.parser import MOST, Parser, check_output, count, run_command, whole
from ldm.io.errors import BadInput

if TYPE_CHECKING:
    from evaluation.runs.images import Source

# The names of registries in modules that need PyTorch; a test holds that they are the same.
EXTRACTORS = ("inception-2015", "efficientnet-lite0", "dinov2", "clip")
RECIPES = ("clean", "tf1-bilinear", "torch-bilinear", "torch-antialias", "clip-crop")
VARIANTS = ("hessel-b32", "cos100-l14", "cos100-g14", "hessel", "cos100")
PREFERENCES = ("image-reward", "pick-score")
PROTOCOL = "protocol:"  # before the name of a protocol, whose real images are the reference

SAMPLES = "the images: a folder, or an npz or npy file"
PROMPTS = "a text file with a line per image, or JSON or JSON lines with file and prompt"
BATCH = "images per batch; changes speed and memory only"
ARGUMENTS: dict[str, dict[str, Any]] = {  # those that measures share
    "samples": {"metavar": "SAMPLES", "help": SAMPLES},
    "--prompts": {
        "metavar": "FILE",
        "help": f"the prompts of the images: {PROMPTS} (default: the prompts stored in the images)",
    },
    "--bootstrap": {"type": whole(2, MOST), "metavar": "N"},
    "--batch-size": {"type": count, "default": 50, "metavar": "N", "help": BATCH},
    "--device": {"default": "auto", "help": "auto, cpu, cuda, cuda:N or mps"},
    "--out": {"metavar": "JSON", "help": "file for the result, with everything that it depends on"},
}


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that states the default of each flag that has one, unless its text does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class MeasureParser(Parser):
    """The parser of a measure's command. `measure`: the module of evaluation.metrics whose `compute` it runs, and whose
    arguments have the names of the command's."""

    def __init__(self, prog: str, description: str | None, measure: str = "") -> None:
        super().__init__(prog=prog, description=description, formatter_class=Defaults)
        self.measure = measure

    def add(self, *names: str, **more: Any) -> None:
        """Add some of ARGUMENTS."""
        for name in names:
            self.add_argument(name, **ARGUMENTS[name], **more)

    def add_reference(self, what: str) -> None:
        text = f"{what}; or {PROTOCOL}NAME for the real images of a protocol"
        self.add_argument("reference", metavar="REFERENCE", help=text)
        text = f"folder with the data of {PROTOCOL}NAME (default: the one that the protocol names)"
        self.add_argument("--data", metavar="DIR", help=text)

    def add_extractor(self) -> None:
        group = self.add_argument_group("feature network")
        text = "the network that computes the features"
        group.add_argument("--extractor", choices=EXTRACTORS, default=EXTRACTORS[0], help=text)
        usual = "those in its package, or its download"
        text = f"weights of the network: a file, or a folder for dinov2 and clip (default: {usual})"
        group.add_argument("--weights", metavar="PATH", help=text)
        text = "how images are resized for the network (default: its own)"
        group.add_argument("--resize", choices=RECIPES, help=text)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the command line; returns the exit code."""
        return run_command(self, self.run, argv)

    def run(self, args: argparse.Namespace) -> None:
        check_output(args.out)
        given = {name: value for name, value in vars(args).items() if name not in ("out", "version", "data")}
        if "reference" in given:
            given["reference"] = reference_of(args)
        publish(import_module(f"evaluation.metrics.{self.measure}").compute(**given), args.out)


def reference_of(args: argparse.Namespace) -> Source:
    """The reference: a path, or the real images of protocol:NAME. Raises BadInput: --data without a protocol."""
    if args.reference.startswith(PROTOCOL):
        images = import_module("evaluation.runs.images")  # needs PyTorch
        return images.protocol_reference(args.reference.removeprefix(PROTOCOL), args.data)
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
