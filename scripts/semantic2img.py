"""Pictures from maps of labels, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ldm.arguments import (
    ROOT,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli import BadInput, Parser, blame, command
from ldm.script import GO_ON, Setup, conditioner, image_items, make_pictures, make_setup, named, stacked

SYNTHESIS = (ROOT / "models/ldm/semantic_synthesis512/config.yaml",
             ROOT / "models/ldm/semantic_synthesis512/model.ckpt")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="semantic2img.py", description=__doc__)
    what = p.add_argument_group("what to make")
    what.add_argument("--maps", nargs="+", required=True, metavar="FILE",
                      help="maps of one size, whose grey levels or palette indices are the labels; the pictures "
                           "are as large")
    count_arguments(what, 1, 1, "pictures of each map")
    sampling_arguments(p, guided=False)
    propagation_arguments(p)
    model_arguments(p, SYNTHESIS)
    output_arguments(p, "outputs/semantic2img")
    return p


def label_count(setup: Setup) -> int:
    """How many labels the config's model knows; found out without its weights."""
    from ldm.modules.encoders.modules import SpatialRescaler

    rescaler = conditioner(setup)
    if not isinstance(rescaler, SpatialRescaler) or rescaler.channel_mapper is None:
        raise BadInput(f"--config: not a semantic synthesis model: its conditioner is {type(rescaler).__name__}")
    return rescaler.channel_mapper.in_channels


def run(args: argparse.Namespace) -> None:
    from ldm.images import open_labels, pad

    with blame("--maps"):
        maps = {path: open_labels(path) for path in args.maps}
        batch = stacked(maps)                                                               # (N, H, W)
        subjects = [named(path, "map") for path in maps]
    setup = make_setup(args, SYNTHESIS)
    labels = label_count(setup)
    for path, labelled in maps.items():
        if labelled.max() >= labels:
            raise BadInput(f"--maps: {path} has a label {labelled.max()}; this model's are 0..{labels - 1}")

    from ldm.sampling.conditions import Labels
    from ldm.sampling.engine import Task

    # What the model can't make is filled up with the edge, and cut off in the end.
    height, width = batch.shape[-2:]
    whole = pad(batch[:, None].float(), *map(setup.sizes.whole, (height, width)))[:, 0].long()
    items = image_items(args, subjects)
    make_pictures(args, setup, items, Task(Labels(whole)), (height, width), args.batch_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("semantic2img.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
