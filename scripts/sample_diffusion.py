"""Images from an unconditional model, with or without encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm.cli.arguments import (
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from
from ldm.io.errors import BadInput, SettingError, blame

STEPS = 50
WEIGHTS = ("model.safetensors", "model.ckpt")


def parser() -> Parser:
    p = Parser(prog="sample_diffusion.py", description=__doc__)
    what = p.add_argument_group("what to make")
    count_arguments(what, 50000, 10, "number of images", ("-n", "--n_samples"))
    size_arguments(what)
    solvers = sampling_arguments(
        p,
        None,
        eta=1.0,
        guided=False,
        unknown=f"{STEPS}, or with -v all timesteps of the training",
        eta_flags=("-e", "--eta"),
        steps_flags=("-c", "--custom_steps", "--steps", "--num_inference_steps"),
    )
    p.set_defaults(default_steps=STEPS)
    solvers.add_argument(
        "-v", "--vanilla_sample", action="store_true", help="ancestral sampling with all timesteps of the training"
    )
    propagation_arguments(p)
    model_arguments(p)
    p.add_argument(
        "-r",
        "--resume",
        metavar="PATH",
        help="the model, instead of --config and --ckpt: a folder with config.yaml and "
        f"{' or '.join(WEIGHTS)}, or the weights file in such a folder",
    )
    out = output_arguments(p, "outputs/sample-diffusion", ("-l", "--logdir", "--outdir"), grid=False)
    out.add_argument(
        "--npz",
        action="store_true",
        help="also save all images in one file, as an array N x H x W x 3 that evaluation tools read",
    )
    return p


def resumed_files(path: Path) -> tuple[str, str]:
    """Config and weights that --resume names: of a folder, or of the folder in which the weights lie.

    Raises:
        BadInput: they are not there.
    """
    folder, choices = (path, WEIGHTS) if path.is_dir() else (path.parent, (path.name,))
    found = [folder / name for name in choices if (folder / name).is_file()]
    if not found:
        problem = f"{path} has no {' or '.join(WEIGHTS)}" if path.is_dir() else f"{path}: no such file or folder"
        raise BadInput(f"--resume: {problem}")
    if not (folder / "config.yaml").is_file():
        raise BadInput(f"--resume: {folder} has no config.yaml; give --config and --ckpt")
    return str(folder / "config.yaml"), str(found[0])


def run(args: argparse.Namespace) -> None:
    config, ckpt = args.config, args.ckpt
    if args.resume is not None:
        if config or ckpt:
            raise BadInput("--resume: not allowed with --config and --ckpt")
        with blame("--resume", (OSError,)):  # a name that no file can have
            config, ckpt = resumed_files(Path(args.resume))
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings, config=config, ckpt=ckpt))
    sampling = settings_from(args, cli.settings.SamplingSettings, steps=args.steps or STEPS)
    if args.vanilla_sample:
        if args.spacing or args.timesteps_at:
            raise BadInput("--vanilla_sample: takes all timesteps; not allowed with --spacing and --timesteps-at")
        timesteps = model.config.model.params.get("timesteps", 1000)
        if args.steps not in (None, timesteps):
            raise SettingError("steps", f"-v runs all {timesteps} timesteps of the training; got {args.steps}")
        sampling = replace(sampling, sampler="ddpm", steps=timesteps)
    items = cli.tasks.image_items([{}], args.n_samples, args.seed, args.seed_by_position)
    made = cli.pipeline.make_images(
        model,
        items,
        cli.tasks.unconditional_task(),
        cli.setup.image_size(model.sizes, args.H, args.W),
        sampling,
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
        keep=args.npz,
    )
    for method in made if args.npz else ():
        print(f"{method.label}: {cli.pipeline.save_array(method, items, args.outdir)}")


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
