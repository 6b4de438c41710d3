"""Images from a text by DeepFloyd-IF, in up to three stages, with or without encoder propagation (Faster Diffusion).

Stage 1 makes images of 64 x 64 pixels, stage 2 makes them 256, and stage 3, the x4 upscaler of Stable Diffusion, 1024.
Each stage's images are kept in a folder of their own, DIR/stage1 to DIR/stage3, and what exists is not made again.
--stages 2,3 goes on with the images that an earlier call left. The weights of one stage are freed before the next.
See docs/deepfloyd-if.md.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import list_plans_argument, negative_argument, seed_argument
from ldm.cli.parser import GO_ON, Parser, cli, count, number, run_command, scale_value, settings_from, step_count

PUBLISHED_PLANS = ["if-stage1", "if-stage2", "if-stage3"]


def stages(text: str) -> tuple[int, ...]:
    """An argparse type: stages that follow one another."""
    accepted = ("1", "2", "3", "1,2", "2,3", "1,2,3")
    if text not in accepted:
        raise argparse.ArgumentTypeError(f"expected one of {' '.join(accepted)}; got {text!r}")
    return tuple(map(int, text.split(",")))


def parser() -> Parser:
    p = Parser(prog="if2img.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    text = what.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="text that describes the images")
    text.add_argument("--from-file", metavar="FILE", help="text file with one prompt per line")
    negative_argument(what)
    what.add_argument(
        "--n_samples", type=count, default=1, metavar="N", help="images of each prompt (default: %(default)s)"
    )
    what.add_argument(
        "--batch_size", type=count, default=1, metavar="N", help="images at a time (default: %(default)s)"
    )
    seed_argument(
        what,
        "an image's noise depends on the seed and its prompt, from stage 2 on also on the seed of the smaller image",
    )
    files = p.add_argument_group("the models")
    files.add_argument(
        "--stages", type=stages, default=(1, 2, 3), metavar="N,N", help="which stages to run (default: 1,2,3)"
    )
    for stage in ("stage1", "stage2"):
        files.add_argument(
            f"--{stage}",
            metavar="DIR",
            help="its folder: unet/config.json with its weights, or config.yml with pytorch_model.bin",
        )
    files.add_argument(
        "--stage3", metavar="FILE", help="weights of the x4 upscaler (default: those in models/ldm/stable-diffusion-v2)"
    )
    files.add_argument(
        "--t5",
        metavar="DIR",
        help="folder with text_encoder/ and tokenizer/ of T5 v1.1 XXL (default: that of --stage1)",
    )
    files.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    files.add_argument(
        "--precision",
        choices=("full", "autocast"),
        help="float32, or the device's lower precision (default: autocast on cuda, else full)",
    )
    how = p.add_argument_group("how to sample: three values, one for each stage")
    level = number(int, 0, sys.maxsize, "a whole number >= 0")
    for flag, kind, default, help_ in (
        ("--steps", step_count, [100, 50, 75], "sampling steps"),
        ("--scales", scale_value, [7.0, 4.0, 9.0], "guidance scales; 1 = no guidance"),
        ("--plans", str, PUBLISHED_PLANS, "key timesteps, as --plan of the other scripts takes them; off = every step"),
    ):
        usual = " ".join(map(str, default))
        how.add_argument(
            flag, type=kind, nargs=3, default=default, metavar=("S1", "S2", "S3"), help=f"{help_} (default: {usual})"
        )
    list_plans_argument(how)
    how.add_argument(
        "--noise_levels",
        type=level,
        nargs=2,
        default=[250, 20],
        metavar=("S2", "S3"),
        help="noise that is added to the smaller image in stages 2 and 3, as a timestep (default: 250 20)",
    )
    how.add_argument(
        "--sampler",
        default="ddpm-learned",
        help="the solver of stages 1 and 2; dpm-solver++-published is that of the paper's faster rows, with 25 steps "
        "(default: %(default)s; stage 3 has ddim, as published)",
    )
    p.set_defaults(parallel=None)
    out = p.add_argument_group("output")
    out.add_argument(
        "--outdir",
        default="outputs/if",
        metavar="DIR",
        help="folder for stage1/, stage2/ and stage3/ (default: %(default)s)",
    )
    out.add_argument("--again", action="store_true", help="make images again that already exist")
    return p


def run(args: argparse.Namespace) -> None:
    cli.deepfloyd.make_cascade(settings_from(args, cli.deepfloyd.CascadeSettings))


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
