"""Images edited by their prompts (prompt-to-prompt), with or without encoder propagation (Faster Diffusion).

Makes the image of --prompt and, beside it, that of each --edit. The edited images take the attention of the first one
at the early steps, so what the prompts have in common stays where it is. With --init-img the first image is not made
from noise: it is found again from the noise that leads to the given image.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    EMOJI64,
    count_arguments,
    model_arguments,
    output_arguments,
    propagation_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.parser import GO_ON, Parser, cli, number, run_command, settings_from

share = number(float, 0, 1, "a number in 0..1")
factor = number(float, -1000, 1000, "a number in -1000..1000")


def bounds(text: str) -> tuple[float, float]:
    """An argparse type: END, or BEGIN,END, as shares of the steps."""
    low, comma, high = text.rpartition(",")
    low, high = share(low) if comma else 0.0, share(high)
    if low > high:
        raise argparse.ArgumentTypeError(f"must be END or BEGIN,END with BEGIN <= END; got {text!r}")
    return low, high


def word_bounds(text: str) -> tuple[str, tuple[float, float]]:
    """An argparse type: the same, of one word (WORD=END) or of all words."""
    word, _, value = text.rpartition("=")
    return word, bounds(value)


def word_factor(text: str) -> tuple[str, float]:
    """An argparse type: WORD=FACTOR."""
    word, equals, value = text.rpartition("=")
    if not equals or not word:
        raise argparse.ArgumentTypeError(f"must be WORD=FACTOR such as snowy=2; got {text!r}")
    return word, factor(value)


def edit_arguments(p: argparse.ArgumentParser) -> None:
    edit = p.add_argument_group("what is edited, and how")
    edit.add_argument("--prompt", required=True, help="text that describes the first image, the source")
    edit.add_argument(
        "--edit", action="append", metavar="PROMPT", help="a changed text; may be given several times, each an image"
    )
    edit.add_argument(
        "--init-img", metavar="FILE", help="an image that --prompt describes, to be edited; its noise is found by DDIM"
    )
    edit.add_argument(
        "--method",
        choices=("auto", "replace", "refine"),
        default="auto",
        help="replace: words are exchanged one for one; refine: words are added or left out; auto: replace if all "
        "texts have as many words (default: %(default)s)",
    )
    edit.add_argument(
        "--cross-steps",
        type=word_bounds,
        action="append",
        metavar="[WORD=]END",
        help="take the source's cross-attention up to this share of the steps, or between two, BEGIN,END; with WORD= "
        "for one word; may be given several times (default: 0.8)",
    )
    edit.add_argument(
        "--self-steps",
        type=bounds,
        default=(0.0, 0.4),
        metavar="END",
        help="the same for self-attention among at most 16 x 16 positions (default: 0.4)",
    )
    edit.add_argument(
        "--reweight",
        type=word_factor,
        action="append",
        metavar="WORD=FACTOR",
        help="multiply the attention to a word of the edits; may be given several times. Without --edit the text is "
        "that of --prompt",
    )
    edit.add_argument(
        "--blend",
        nargs="+",
        metavar="WORD",
        help="change only where the attention to these words is, in the source or in the edit; each text needs one",
    )
    edit.add_argument(
        "--blend-threshold",
        type=share,
        default=0.3,
        metavar="X",
        help="share of the strongest attention above which a place belongs to a word (default: %(default)s)",
    )
    edit.add_argument(
        "--negative_prompt",
        metavar="PROMPT",
        help="what guidance leads away from (default: the empty text; with --init-img the text of --prompt, so that "
        "the source stays as it is)",
    )
    count_arguments(edit, 1, 4, "sources with their edits, each from other noise")
    size_arguments(edit, "the model's; with --init-img the image's, rounded down to what the model can make")


def parser() -> Parser:
    p = Parser(prog="prompt2prompt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    edit_arguments(p)
    sampling_arguments(p)
    propagation_arguments(p)
    model_arguments(p, EMOJI64, adapters=True)
    output_arguments(p, "outputs/prompt2prompt")
    return p


def run(args: argparse.Namespace) -> None:
    given = settings_from(args, cli.editing.EditArguments)
    prompts, image, reference = given.prompts, None, {}
    if args.init_img is not None:
        start, reference = cli.tasks.start_image(args.init_img)
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), EMOJI64)
    size = cli.setup.image_size(model.sizes, args.H, args.W)
    if args.init_img is not None:
        image = cli.tasks.resized_start(start, model.sizes, args.H, args.W)
        size = tuple(image.shape[1:])
    sampling = settings_from(args, cli.settings.SamplingSettings)
    cli.pipeline.make_images(
        model,
        cli.editing.edit_items(prompts, args.n_samples, args.seed, args.seed_by_position, reference),
        cli.editing.edit_task(model, given, sampling, image),
        size,
        sampling,
        settings_from(args, cli.settings.OutputSettings),
        -(-args.batch_size // len(prompts)) * len(prompts),  # whole groups
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
