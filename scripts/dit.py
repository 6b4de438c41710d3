"""Class-conditional images by a diffusion transformer (DiT), with or without encoder propagation (Faster Diffusion).

Without flags a small model draws emoji of eight groups. How it samples is as in the authors' experiment with DiT-XL/2:
250 steps of DDPM with the learned variance, 113 key timesteps, prior noise after the solver's update at timesteps below
300. DiT-XL/2 itself needs --image-size 256 or 512, and its weights. These hold no first stage; scripts/convert.py
DiT-XL-2-256x256.pt --to ldm --vae FILE adds it, see docs/dit.md.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    DIT_EMOJI,
    ROOT,
    classes_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from
from ldm.io.errors import SettingError

MODELS = {
    size: (ROOT / f"configs/dit/dit-xl-2-{size}.yaml", ROOT / f"models/dit/dit-xl-2-{size}/model.safetensors")
    for size in (256, 512)
}
PUBLISHED = ("207", "360", "387", "974", "88", "979", "417", "279")  # the published example


def parser() -> Parser:
    p = Parser(prog="dit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    classes_arguments(what, PUBLISHED, 1)
    p.set_defaults(classes=None)
    what.add_argument(
        "--image-size",
        type=int,
        choices=(256, 512),
        help="one of the two published models, in the place of --config and --ckpt (default: the model that ships)",
    )
    sampling_arguments(p, 250, steps_flags=("--steps", "--num-sampling-steps"), unknown="the model's")
    p.set_defaults(sampler="ddpm-learned")
    propagation_arguments(p, "dit250", 300.0, "update")
    model_arguments(p, DIT_EMOJI)
    output_arguments(p, "outputs/dit")
    return p


def run(args: argparse.Namespace) -> None:
    if args.image_size is not None and (args.config or args.ckpt):
        raise SettingError("image_size", "one of the published models; leave it out beside --config or --ckpt")
    model = cli.setup.make_setup(
        settings_from(args, cli.settings.ModelSettings), MODELS.get(args.image_size, DIT_EMOJI)
    )
    classes = args.classes or cli.tasks.usual_classes(model, PUBLISHED)
    subjects, task = cli.tasks.class_task(model, classes, args.scale != 1.0, args.class_names, args.uncond_class)
    cli.pipeline.make_images(
        model,
        cli.tasks.image_items(subjects, args.n_samples, args.seed, args.seed_by_position),
        task,
        cli.setup.image_size(model.sizes, None, None),
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
