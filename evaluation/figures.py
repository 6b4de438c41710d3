"""The paper's figures, one command each, for any model; the one that ships needs no flag.

    python evaluation/figures.py evolution --out docs/figures
    python evaluation/figures.py all --out docs/figures

Each writes KIND.svg, KIND.png and KIND.json into that folder; the JSON has the caption and the numbers that are drawn.
`pareto` writes pareto.md, too. The pictures are of the first --count lines of --prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm.cli.arguments import EMOJI64, SAMPLERS, count, finite, model_arguments, seed_argument, step_count
from ldm.cli.parser import Parser, command
from ldm.cli.setup import check_outdir
from ldm.io.errors import BadInput, blame

PROMPTS = EMOJI64[0].parent / "prompts.txt"
PLANS = ("off", "faster-diffusion", "uniform:6", "pro", "deepcache:3")


@dataclass(frozen=True)
class Kind:
    """A kind of figure: `make` of the module evaluation.plots.NAME.

    summary: for the help.
    count:   pictures by default; None = that is no choice.
    steps:   whether it has a number of steps; the others have one with each sampler.
    more:    adds the arguments that only this kind has.
    """

    summary: str
    count: int | None
    more: Callable[[argparse.ArgumentParser], None] = lambda p: None
    steps: bool = True


def sampler_and_steps(text: str) -> tuple[str, int]:
    name, colon, steps = text.rpartition(":")
    if not colon or name not in SAMPLERS.split(", "):
        raise argparse.ArgumentTypeError(f"expected SAMPLER:STEPS, the sampler one of {SAMPLERS}; got {text!r}")
    return name, step_count(steps)


def samplers_argument(p: argparse.ArgumentParser, default: Sequence[str]) -> None:
    p.add_argument(
        "--samplers",
        nargs="+",
        type=sampler_and_steps,
        metavar="SAMPLER:STEPS",
        default=[sampler_and_steps(text) for text in default],
        help=f"what to sample with (default: {' '.join(default)})",
    )


def gallery(p: argparse.ArgumentParser) -> None:
    samplers_argument(p, ("ddim:50", "plms:50", "dpm-solver++:20", "unipc:20"))


def timing(p: argparse.ArgumentParser) -> None:
    samplers_argument(p, ("ddim:50", "dpm-solver:20", "dpm-solver++:20"))
    p.add_argument(
        "--repeats", type=count, default=5, metavar="N", help="timed runs of each method (default: %(default)s)"
    )


def step_counts(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--step-counts",
        nargs="+",
        type=step_count,
        default=[50, 25, 20, 10, 5],
        metavar="N",
        help="(default: 50 25 20 10 5)",
    )


def plans(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--plans",
        nargs="+",
        default=PLANS,
        metavar="PLAN",
        help=f"as --plan of the sampling scripts (default: {' '.join(PLANS)})",
    )


def rows_and_data(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--rows",
        default=str(Path(__file__).with_name("plots") / "pareto.yaml"),
        metavar="YAML",
        help="the ways to make pictures; those in pareto.json are kept (default: evaluation/plots/pareto.yaml)",
    )
    p.add_argument(
        "--data",
        metavar="DIR",
        help="dataset of scripts/prepare_emoji.py, whose captions are taken instead of --prompts, and with "
        "whose pictures those made are compared (default: none, distances from the plain run only)",
    )


KINDS = {
    "evolution": Kind("change of each block's features from step to step (eq. 2, figure 3a)", 8),
    "norms": Kind("size of each block's features and its deviation over a run (figures 3b, 3c)", 8),
    "maps": Kind("feature maps as colours, by block and step (figures 2, 10)", None),
    "variants": Kind("encoder, decoder, both or neither propagated (figure 16)", 4),
    "fewer-steps": Kind("fewer steps, with and without propagation and noise (figures 7, 13, 14)", 4, step_counts),
    "placement": Kind("number and placement of the key steps (table 5, figure 9)", 16),
    "pareto": Kind("quality against both costs, for plans and for fewer steps", 16, rows_and_data),
    "samplers": Kind("plain and accelerated pictures of several samplers (figures 18 to 24)", 5, gallery, steps=False),
    "prior-noise": Kind("prior noise and the frequencies of the pictures (figure 6)", 8),
    "timeline": Kind("which parts of the UNet run at which step", None, plans),
    "times": Kind("seconds per picture, plain, serial and parallel (figure 5)", 4, timing, steps=False),
}


def shared_arguments(p: argparse.ArgumentParser, steps: bool = True) -> None:
    p.add_argument(
        "--out",
        default="outputs/figures",
        metavar="DIR",
        help="gets KIND.svg, KIND.png and KIND.json (default: %(default)s)",
    )
    p.add_argument(
        "--prompts",
        default=str(PROMPTS),
        metavar="FILE",
        help="texts, one per line (default: those of emoji64); models without texts take classes or nothing",
    )
    if steps:
        p.add_argument(
            "--steps",
            type=step_count,
            default=50,
            metavar="N",
            help="sampling steps; of `fewer-steps` and `pareto` those of the run that others are compared "
            "with (default: %(default)s)",
        )
    p.add_argument("--scale", type=finite, help="guidance scale, 1 = none (default: the model's, or 7.5)")
    seed_argument(p)
    model_arguments(p, EMOJI64)
    p.set_defaults(outdir=".")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    for name, kind in KINDS.items():
        one = kinds.add_parser(name, help=kind.summary, description=kind.summary)
        if kind.count is None:
            one.set_defaults(count=1)
        else:
            one.add_argument(
                "--count", type=count, default=kind.count, metavar="N", help="pictures (default: %(default)s)"
            )
        shared_arguments(one, kind.steps)
        kind.more(one)
    every = kinds.add_parser("all", help="all of these, with their defaults")
    every.add_argument("--count", type=count, metavar="N", help="pictures (default: as many as each kind has)")
    every.add_argument("--without", nargs="+", choices=[*KINDS], default=[], metavar="KIND", help="leave these out")
    shared_arguments(every)
    return p


def draw(args: argparse.Namespace) -> None:
    """Make one figure and say where it is."""
    from evaluation.plots.scene import Scene, in_words
    from ldm.models.diffusion.loop import NonFiniteLatents

    stem = Path(args.out) / args.kind
    check_outdir(stem.parent, "--out")
    args = argparse.Namespace(**{**vars(args), "out": str(stem)})
    scene = Scene.of(args)
    try:
        from evaluation.plots.drawing import house_style
    except ImportError as error:
        raise BadInput(f'packages: figures need {error.name}; pip install -e ".[eval]"') from error
    module = import_module(f"evaluation.plots.{args.kind.replace('-', '_')}")
    with house_style():
        with blame("--ckpt", (NonFiniteLatents,)):
            drawing = module.make(scene, args)
        settings = scene.settings(drawing.pictured)
        print(", ".join(drawing.save(args.out, in_words(settings), settings)))


def run(args: argparse.Namespace) -> None:
    if args.kind != "all":
        return draw(args)
    for name, kind in KINDS.items():
        if name not in args.without:
            own: dict[str, Any] = {"kind": name}
            if kind.count is None or args.count is None:
                own["count"] = kind.count or 1
            draw(argparse.Namespace(**vars(parser().parse_args([name])) | vars(args) | own))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("figures.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
