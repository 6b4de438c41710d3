"""Inpainting: new content in the masked parts of images, with or without encoder propagation (Faster Diffusion).

With --prompt any text-to-image model can be used: before every step, the latents outside the mask are replaced by
those of the image at the same noise level. An inpainting model of Stable Diffusion reads the prompt, the masked image
and the mask. Without --prompt the inpainting model of latent diffusion is used; it reads the masked image and the mask.
Pixels outside the mask never change.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ldm.cli.arguments import (
    EMOJI64,
    ROOT,
    count_arguments,
    model_arguments,
    output_arguments,
    prompt_arguments,
    propagation_arguments,
    sampling_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, run_command, settings_from
from ldm.io.errors import SettingError, blame, some

INPAINTING_BIG = (ROOT / "models/ldm/inpainting_big/config.yaml", ROOT / "models/ldm/inpainting_big/last.ckpt")
SHOWN = 3  # of files that are left out, how many the warning names


def parser() -> Parser:
    p = Parser(prog="inpaint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument(
        "--indir",
        required=True,
        metavar="DIR",
        help="folder with images NAME.png and masks NAME_mask.png, all of one size; white = the part to inpaint",
    )
    what.add_argument("--prompt", help="what the masked parts show, for a model that reads text")
    prompt_arguments(what)
    count_arguments(what, 1, 4, "results for each image")
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, adapters=True)
    p.epilog = (
        f"Without --config and --ckpt the model is {EMOJI64[1].parent.relative_to(ROOT)} with --prompt, and "
        f"{INPAINTING_BIG[1].parent.relative_to(ROOT)} without."
    )
    output_arguments(p, "outputs/inpainting")
    return p


def run(args: argparse.Namespace) -> None:
    with blame("--indir"):
        given = cli.tasks.masked_images(Path(args.indir))
    if given.left_out:
        print(
            f"warning: --indir: {len(given.left_out)} files are left out, which are no pair of NAME.png and "
            f"NAME{cli.tasks.MASK}{some(given.left_out, SHOWN)}",
            file=sys.stderr,
        )
    sampling = settings_from(args, cli.settings.SamplingSettings)
    text, prompts = args.prompt is not None, settings_from(args, cli.tasks.PromptSettings)
    if not text:
        for name, value in vars(prompts).items():
            if value != getattr(cli.tasks.AS_USUAL, name):
                raise SettingError(name, "only with --prompt")
        if args.scale not in (None, 1.0):
            raise SettingError("scale", "there is guidance only with --prompt")
        sampling = replace(sampling, scale=1.0)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), EMOJI64 if text else INPAINTING_BIG)
    subjects = [{**subject, **({"prompt": args.prompt} if text else {})} for subject in given.subjects]
    cli.pipeline.make_images(
        model,
        cli.tasks.image_items(subjects, args.n_samples, args.seed, args.seed_by_position),
        cli.tasks.inpainting_task(model, given.images, given.masks, text, prompts),
        tuple(given.images.shape[-2:]),
        sampling,
        settings_from(args, cli.settings.OutputSettings),
        args.batch_size,
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
