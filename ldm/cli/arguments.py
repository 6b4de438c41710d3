"""Argument groups that the sampling scripts share, each with the defaults of the script that asks for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.cli.parser import number, whole
from ldm.util import PROJECT_ROOT

Files = tuple[Path, Path]  # a model's config and weights

ROOT = PROJECT_ROOT
EMOJI64: Files = (ROOT / "models/ldm/emoji64/config.yaml", ROOT / "models/ldm/emoji64/model.safetensors")
PROMPT, SHOWN = "a red heart, noto style", 8
NOISE_WEIGHT = 0.003
IMAGENET = 1000  # classes; where a model has one more, that one is their absence
PROPAGATE = ("hold", "linear", "quadratic", "zeros")
NOISE_ORDERS = ("before", "after", "update")
# The names of ldm.models.diffusion.solvers.registry.SOLVERS, which needs PyTorch; --help must answer at once.
SAMPLERS = (
    "ddim, plms, ddpm, dpm-solver, dpm-solver++, dpm-solver++2s, dpm-solver-3s, dpm-solver++3m, euler, euler-a, heun, "
    "dpm++2m-karras, unipc"
)

MOST = 1_000_000  # images of one run, and whatever else is counted
MOST_STEPS = 10_000  # of a solver; no training has more timesteps
LARGEST_SIDE = 2**14  # pixels of an image, or positions of a latent

count = whole(1, MOST)
step_count = whole(1, MOST_STEPS)
side = whole(1, LARGEST_SIDE)
finite = number(float, -sys.float_info.max, sys.float_info.max, "a finite number")


def parallel(text: str) -> int | None:
    return None if text == "auto" else whole(1, MOST, "auto or a whole number")(text)


def interval(text: str) -> tuple[float, float]:
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be LOW,HIGH, two timesteps such as 200,800; got {text!r}")
    return finite(low), finite(high)


def text_arguments(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Prompts, and how many pictures of each."""
    what = p.add_argument_group("what to make")
    text = what.add_mutually_exclusive_group()
    text.add_argument(
        "--prompt",
        help=f"the text to picture (default: {PROMPT}; with --compare the first {SHOWN} of prompts.txt "
        f"beside the model's weights, if it is there)",
    )
    text.add_argument("--from-file", metavar="FILE", help="one prompt per line, each made n_iter times")
    negative_argument(what)
    what.add_argument("--repeat", type=count, default=1, metavar="N", help="use each prompt N times")
    what.add_argument(
        "--n_samples",
        type=count,
        default=4,
        metavar="N",
        help="pictures of the prompt in each iteration; the batch size (default: %(default)s)",
    )
    what.add_argument("--n_iter", type=count, default=1, metavar="N", help="iterations (default: %(default)s)")
    noise_arguments(what)
    what.add_argument("--fixed_code", action="store_true", help="begin every prompt and iteration from the same noise")
    return what


def negative_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--negative_prompt",
        default="",
        metavar="PROMPT",
        help="what the pictures are not to show: the text that guidance leads away from (default: the empty text)",
    )


def picture_arguments(p: argparse.ArgumentParser, strength: float) -> None:
    """Prompts, the picture to begin with, how much of it is made anew, and the size of the results."""
    what = text_arguments(p)
    what.add_argument(
        "--init-img", required=True, metavar="FILE", help="the picture to begin with; transparent parts become white"
    )
    strength_argument(what, strength)
    size_arguments(
        what,
        "the picture's, rounded down to what the model can make; the picture is scaled to cover it and cut off evenly",
    )


def strength_argument(group: argparse._ActionsContainer, default: float) -> None:
    group.add_argument(
        "--strength",
        type=number(float, sys.float_info.min, 1, "a number above 0, up to 1"),
        default=default,
        help="how much of the picture is made anew: the share of the steps that is run; a plan "
        "counts these (default: %(default)s)",
    )


def noise_level_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--noise_level",
        type=number(int, 0, sys.maxsize, "a whole number >= 0"),
        metavar="N",
        help="noise on the small picture, for the x4 upscaler: the timestep of its schedule; with "
        "more it invents more (default: see above)",
    )


def uncond_class_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--uncond_class",
        type=number(int, 0, sys.maxsize, "a whole number >= 0"),
        metavar="CLASS",
        help=f"class that stands for none, which guidance needs (default: {IMAGENET}, of a model with "
        f"{IMAGENET + 1} classes)",
    )


def size_arguments(group: argparse._ArgumentGroup, default: str = "the model's") -> None:
    group.add_argument("--H", "--height", type=side, help=f"height in pixels (default: {default})")
    group.add_argument("--W", "--width", type=side, help=f"width in pixels (default: {default})")


def class_names_argument(group: argparse._ArgumentGroup, default: str = "none") -> None:
    group.add_argument(
        "--class-names",
        metavar="FILE",
        help=f"names of the classes, one line each from class 0, synonyms separated by commas (default: {default})",
    )


def count_arguments(
    group: argparse._ArgumentGroup, samples: int, batch: int, what: str, flags: Sequence[str] = ("--n_samples",)
) -> None:
    """How many pictures, at most how many at a time, and the seed of their noise.

    Args:
        samples, batch: the defaults.
        what: pictures of what, for the help.
        flags: what the published script calls their number.
    """
    group.add_argument(
        *flags, dest="n_samples", type=count, default=samples, metavar="N", help=f"{what} (default: %(default)s)"
    )
    group.add_argument(
        "--batch_size",
        type=count,
        default=batch,
        metavar="N",
        help="pictures at a time; changes speed and memory, and the last digits of what is computed "
        "(default: %(default)s)",
    )
    noise_arguments(group)


def noise_arguments(group: argparse._ArgumentGroup) -> None:
    """The seed, and what else a picture's noise depends on."""
    seed_argument(
        group,
        "fixes each picture's noise, with what is pictured (prompt, class, content of the file) and "
        "the number of its sample",
    )
    group.add_argument(
        "--seed-by-position",
        action="store_true",
        help="noise from the place in the list instead of what is pictured, as in earlier versions",
    )


def seed_argument(
    group: argparse._ArgumentGroup, what: str = "fixes each picture's noise, with its place in the list"
) -> None:
    group.add_argument(
        "--seed", type=number(int, 0, 2**32 - 1, "0..2^32-1"), default=42, help=f"{what} (default: %(default)s)"
    )


def sampling_arguments(
    p: argparse.ArgumentParser,
    steps: int | None = 50,
    eta: float | None = 0.0,
    scale: float | None = None,
    guided: bool = True,
    unknown: str = "the model's, or 7.5",
    steps_flags: Sequence[str] = ("--steps", "--ddim_steps", "--num_inference_steps"),
    eta_flags: Sequence[str] = ("--ddim_eta",),
) -> argparse._MutuallyExclusiveGroup:
    """Steps, noise, guidance, solver; returns the group of the flags that name a solver.

    Args:
        steps, eta: their defaults; a solver that has no choice of eta is not held to that.
        scale: default of the guidance scale.
        guided: whether there is guidance at all.
        unknown: what the help calls a default that is None, because it depends on the model.
        steps_flags, eta_flags: what the published script calls them.
    """

    def default(value: float | None) -> str:
        return f"(default: {unknown if value is None else value})"

    how = p.add_argument_group("how to sample")
    how.add_argument(
        *steps_flags, dest="steps", type=step_count, default=steps, metavar="N", help=f"sampling steps {default(steps)}"
    )
    how.add_argument(
        *eta_flags,
        dest="eta",
        type=number(float, 0, 1, "a number in 0..1"),
        metavar="ETA",
        help=f"of ddim: 0 = deterministic, 1 = ancestral sampling {default(eta)}",
    )
    p.set_defaults(default_eta=eta, eta_flag=eta_flags[-1])
    if guided:
        how.add_argument(
            "--scale", "--guidance_scale", type=finite, default=scale, help=f"guidance scale, 1 = none {default(scale)}"
        )
        how.add_argument(
            "--guidance-interval",
            type=interval,
            metavar="LOW,HIGH",
            help="guide only from key steps at these training timesteps (default: all)",
        )
        how.add_argument(
            "--guidance-reuse",
            action="store_true",
            help="between key steps add the key step's guidance to the conditional prediction alone",
        )
    else:
        p.set_defaults(scale=1.0, guidance_interval=None, guidance_reuse=False)
    sampler = how.add_mutually_exclusive_group()
    sampler.add_argument("--sampler", default="ddim", help=f"the solver: {SAMPLERS} (default: %(default)s)")
    sampler.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    sampler.add_argument("--dpm", action="store_true", help="the same as --sampler dpm-solver++")
    return sampler


def propagation_arguments(
    p: argparse.ArgumentParser,
    plan: str = "faster-diffusion",
    below: float = 500.0,
    order: str = "before",
    compare: bool = True,
) -> None:
    """The plan and prior noise injection, with their defaults; `compare`: whether both methods can be run at once."""
    fast = p.add_argument_group("encoder propagation")
    fast.add_argument(
        "--plan",
        default=plan,
        help="what of the UNet runs at which steps: off (all), faster-diffusion or another name in "
        "configs/plans, uniform:N, pro, deepcache:N[:BRANCH], deepcache:NAME[:BRANCH], "
        "online:[time:]X, auto:K or auto:SHARE%% (by calibration), key steps such as 0,1,2,5, or "
        "FILE.yaml (default: %(default)s)",
    )
    fast.add_argument(
        "--propagate",
        choices=PROPAGATE,
        help="what the decoder gets between key steps: the last one's features, those of the last two or "
        "three extrapolated, or nothing, for comparison (default: the plan file's, or hold)",
    )
    fast.add_argument(
        "--parallel",
        type=parallel,
        metavar="N|auto",
        help="most decoder steps in one batch; changes speed and memory, and the last digits of what is "
        "computed (default: auto; on a GPU what memory allows, on a CPU as many as are faster)",
    )
    fast.add_argument(
        "--tome",
        type=number(float, 0, 0.75, "a number in 0..0.75"),
        default=0.0,
        metavar="R",
        help="merge this share of the tokens for self-attention at the UNet's finest level (ToMe; "
        "its authors' share is 0.5; default: 0, none)",
    )
    fast.add_argument(
        "--noise-weight",
        type=number(float, 0, sys.float_info.max, "a number >= 0"),
        metavar="X",
        help=f"prior noise injection; 0 = off (default: {NOISE_WEIGHT}, with --plan off 0)",
    )
    fast.add_argument(
        "--noise-below",
        type=finite,
        default=below,
        metavar="T",
        help="inject at timesteps below T of the training's (default: %(default)s)",
    )
    fast.add_argument(
        "--noise-order",
        choices=NOISE_ORDERS,
        default=order,
        help="inject before the prediction, after it, or after the solver's step (default: %(default)s)",
    )
    if compare:
        fast.add_argument(
            "--list-plans", action="store_true", help="print the named plans with their cost, and make nothing"
        )
        fast.add_argument(
            "--compare",
            action="store_true",
            help="make each picture plain, as --plan says, and by the best calibrated plan of that cost; "
            "save them side by side and say what each took",
        )
    else:
        p.set_defaults(compare=False, list_plans=False)


def model_arguments(
    p: argparse.ArgumentParser, default: Files | None = None, note: str = "no default"
) -> argparse._ArgumentGroup:
    """The model's files and where it runs; `default` is the model that needs no flag, `note` says if another is."""
    note = f"default: {default[1].parent.relative_to(ROOT)}" if default else note
    model = p.add_argument_group(f"the model ({note})")
    model.add_argument(
        "--config", metavar="YAML", help="the model's config; alone it stands for the one published model that has it"
    )
    model.add_argument(
        "--ckpt",
        metavar="FILE",
        help="its weights, .safetensors or .ckpt, or a diffusers folder; alone they take config.yaml "
        "beside them, or the published config that fits",
    )
    model.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="averaged or last weights of the UNet; auto = averaged if there are any",
    )
    model.add_argument("--C", type=count, help="latent channels, to check the config (default: the model's)")
    model.add_argument("--f", type=count, help="downsampling factor, to check the config (default: the model's)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    precision = model.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=("full", "autocast"), help="(default: autocast on cuda, else full)")
    precision.add_argument(
        "--fp16", action="store_const", const="autocast", dest="precision", help="the same as --precision autocast"
    )
    return model


def output_arguments(
    p: argparse.ArgumentParser, outdir: str, flags: Sequence[str] = ("--outdir",), grid: bool = True
) -> argparse._ArgumentGroup:
    """Where pictures go.

    Args:
        outdir: the default.
        flags: what the published script calls it.
        grid: whether a grid of all pictures is offered.
    """
    out = p.add_argument_group("output")
    out.add_argument(
        *flags,
        dest="outdir",
        default=outdir,
        metavar="DIR",
        help="gets samples/, manifest.jsonl and what shows pictures together; what is already there is "
        "not made again (default: %(default)s)",
    )
    if grid:
        out.add_argument(
            "--n_rows",
            type=whole(0, MOST),
            default=0,
            metavar="N",
            help="pictures in a row of the grid; 0 = the batch size",
        )
        out.add_argument("--skip_grid", action="store_true", help="save no grid; needed for very many pictures")
    else:
        p.set_defaults(skip_grid=True)
    out.add_argument("--skip_save", action="store_true", help="save no single pictures")
    out.add_argument("--again", action="store_true", help="make what is already there again, to measure its time")
    return out
