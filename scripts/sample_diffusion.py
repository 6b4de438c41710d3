"""Pictures from an unconditional model, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.arguments import (
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.inputs import image_items
from ldm.cli.parser import Parser, command
from ldm.cli.run import GO_ON, make_pictures
from ldm.cli.setup import make_setup, picture_size
from ldm.io.errors import BadInput, blame

if TYPE_CHECKING:
    from ldm.cli.report import Result
    from ldm.sampling.generate import Item

WEIGHTS = ("model.safetensors", "model.ckpt")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="sample_diffusion.py", description=__doc__)
    what = p.add_argument_group("what to make")
    count_arguments(what, 50000, 10, "how many pictures", ("-n", "--n_samples"))
    size_arguments(what)
    solvers = sampling_arguments(
        p,
        50,
        eta=1.0,
        guided=False,
        eta_flags=("-e", "--eta"),
        steps_flags=("-c", "--custom_steps", "--steps", "--num_inference_steps"),
    )
    solvers.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="ancestral sampling over all timesteps of the training"
    )
    propagation_arguments(p)
    model_arguments(p)
    p.add_argument(
        "-r",
        "--resume",
        metavar="PATH",
        help="the model in place of --config and --ckpt: a folder with config.yaml and "
        f"{' or '.join(WEIGHTS)}, or the weights in such a folder",
    )
    out = output_arguments(p, "outputs/sample-diffusion", ("-l", "--logdir", "--outdir"), grid=False)
    out.add_argument(
        "--npz",
        action="store_true",
        help="also write all pictures into one file as an array N x H x W x 3, which evaluators read",
    )
    return p


def find_model(args: argparse.Namespace) -> None:
    """--resume as --config and --ckpt."""
    if args.resume is None:
        return
    if args.config or args.ckpt:
        raise BadInput("--resume: not allowed with --config and --ckpt")
    path = Path(args.resume)
    folder, choices = (path, WEIGHTS) if path.is_dir() else (path.parent, (path.name,))
    found = [folder / name for name in choices if (folder / name).is_file()]
    if not found:
        raise BadInput(
            f"--resume: {path} has no {' or '.join(WEIGHTS)}"
            if path.is_dir()
            else f"--resume: {path}: no such file or folder"
        )
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"--resume: {folder} has no config.yaml; give --config and --ckpt")
    args.config, args.ckpt = str(folder / "config.yaml"), str(found[0])


def save_npz(args: argparse.Namespace, result: Result, items: Sequence[Item]) -> Path:
    """All pictures as `arr_0`, (N, H, W, 3) uint8, under a name from all that they depend on."""
    import numpy as np

    from ldm.io.files import atomic_write
    from ldm.sampling.generate import digest

    shape = "x".join(map(str, (len(items), result.settings["height"], result.settings["width"], 3)))
    path = Path(args.outdir) / f"{shape}-{args.seed}-{digest(result.settings)}.npz"
    with blame("--outdir", (OSError,)), atomic_write(path) as temporary:
        np.savez(temporary, np.stack([np.asarray(image) for image in result.images]))
    return path


def run(args: argparse.Namespace) -> None:
    with blame("--resume", (OSError,)):  # a name that no file can have
        find_model(args)
    setup = make_setup(args)
    size = picture_size(args, setup.sizes)

    from ldm.sampling.conditions import Condition
    from ldm.sampling.engine import Task

    if args.vanilla_sample:
        args.sampler, args.steps = "ddpm", setup.config.model.params.get("timesteps", 1000)
    items = image_items(args, [{}])
    results = make_pictures(args, setup, items, Task(Condition()), size, args.batch_size, keep=args.npz)
    if args.npz:
        for result in results:
            print(f"{result.label}: {save_npz(args, result, items)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("sample_diffusion.py", lambda: run(parser().parse_args(argv)), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
