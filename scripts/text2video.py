"""A short video from text, with or without encoder propagation (Faster Diffusion).

By default a model of images makes it (Text2Video-Zero): the first frame is an image of its own, and the others begin
from its latents, moved, and attend to it at every step, so the same things are seen from frame to frame. --model
videofusion takes a model of videos instead. Frames are saved as images, and together as one file.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import (
    EMOJI64,
    ROOT,
    list_plans_argument,
    model_arguments,
    noise_arguments,
    output_arguments,
    plan_arguments,
    prompt_arguments,
    sampling_arguments,
    size_arguments,
)
from ldm.cli.parser import GO_ON, MOST_STEPS, Parser, cli, count, finite, number, run_command, settings_from

VIDEOFUSION = (ROOT / "configs/video/videofusion.yaml", ROOT / "models/video/videofusion")
FORMATS = ("gif", "mp4", "frames")
step = number(int, 0, MOST_STEPS, "a whole number >= 0")


def motion(text: str) -> tuple[float, float]:
    """An argparse type: two numbers, X,Y."""
    x, comma, y = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be X,Y, two numbers such as 12,12; got {text!r}")
    return finite(x), finite(y)


def parser() -> Parser:
    p = Parser(prog="text2video.py", description=__doc__)
    video_arguments(p)
    sampling_arguments(p)
    fast = p.add_argument_group("encoder propagation, in the steps of all frames")
    plan_arguments(fast, "faster-diffusion")
    list_plans_argument(fast)
    # As published without prior noise; nothing here compares methods.
    p.set_defaults(tome=0.0, noise_weight=0.0, noise_below=500.0, noise_order="before", compare=False)
    model_arguments(p, EMOJI64)
    output_arguments(p, "outputs/text2video-samples", grid=False)
    return p


def video_arguments(p: argparse.ArgumentParser) -> None:
    """What the video shows, and how it moves."""
    what = p.add_argument_group("what to make")
    what.add_argument("--prompt", required=True, help="text that describes the video")
    prompt_arguments(what, framed=False)
    what.add_argument(
        "--model",
        choices=("zero", "videofusion"),
        default="zero",
        help="zero = a model of images, whose frames are moved (Text2Video-Zero); videofusion = a model of videos "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--frames", type=count, metavar="N", help="number of frames (default: 8; with --model videofusion 16)"
    )
    what.add_argument(
        "--chunk",
        type=count,
        metavar="N",
        help="most frames at a time; changes speed, memory, and rounding errors. With each chunk the first frame is "
        "computed again (default: all)",
    )
    what.add_argument(
        "--motion",
        type=motion,
        metavar="X,Y",
        help="how far each frame moves to the left and up, in 512ths of the image; negative: to the right and "
        "down (default: 12,12)",
    )
    for name, default, meaning in (
        ("--t1", 47, "all frames are sampled from here on"),
        ("--t0", 44, "the first frame is sampled alone to here, and moved for the others"),
    ):
        what.add_argument(
            name, type=step, metavar="N", help=f"steps before the last: {meaning} (default: {default} of 50 steps)"
        )
    what.add_argument(
        "--format",
        choices=FORMATS,
        default="gif",
        help="the file beside the frames; frames = none (default: %(default)s)",
    )
    what.add_argument(
        "--fps",
        type=number(float, 0.1, 100, "a number in 0.1..100"),
        default=4.0,
        metavar="N",
        help="frames per second of the file (default: %(default)s)",
    )
    noise_arguments(what)
    size_arguments(what)
    control = p.add_argument_group("what the frames follow (ControlNet)")
    control.add_argument(
        "--control",
        nargs="+",
        default=[],
        metavar="FILE",
        help="a control image for each frame, of the size of the frames",
    )
    control.add_argument("--control-model", metavar="FILE", help="the control network that reads them")


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args, cli.video.VideoSettings, prompts=settings_from(args, cli.tasks.PromptSettings))
    sampling = settings_from(args, cli.settings.SamplingSettings)
    cli.video.check_video(settings, sampling)
    default = VIDEOFUSION if args.model == "videofusion" else EMOJI64
    model = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), default)
    size = cli.setup.image_size(model.sizes, args.H, args.W)
    made = cli.video.make_video(model, settings, size, sampling, settings_from(args, cli.settings.OutputSettings))
    if made is not None:
        print(f"{settings.count} frame{'s' * (settings.count != 1)}: {made}")


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
