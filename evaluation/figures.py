"""Draw the paper's figures, for any model. The default model needs no download.

    python evaluation/figures.py evolution --out docs/figures
    python evaluation/figures.py all --out docs/figures

Each figure is saved as KIND.svg, KIND.png and KIND.json; the JSON file has the caption and the numbers that are drawn.
The images are sampled with the first --count lines of --prompts. `pareto` also saves pareto.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli.arguments import EMOJI64, RDM_EMOJI, SAMPLERS, Files, model_arguments, seed_argument
from ldm.cli.parser import Parser, check_outdir, cli, count, finite, run_command, settings_from, step_count
from ldm.io.errors import BadInput

DATABASE = str(RDM_EMOJI[0].parent / "database")
ROWS = Path(__file__).with_name("plots") / "pareto.yaml"


# Of each task a command line that runs on the model that ships.
TASKS = (
    "prompt2prompt.py --prompt 'a red heart, noto style' --edit 'a blue heart, noto style' "
    "--edit 'a red apple, noto style' --edit 'a red heart, openmoji style'",
    "controlnet.py --prompt 'a pig face, fluent flat style' --control edges --image docs/examples/inpaint/face.png "
    "--n_samples 3",
    "txt2img.py --prompt 'a giraffe, noto style' --n_samples 4 --lora models/personalization/giraffe/lora.safetensors",
    "text2video.py --prompt 'a cat face, noto style' --motion 32,0 --t0 16 --t1 22 --format frames",
)


@dataclass(frozen=True)
class Kind:
    """A kind of figure: the function `draw_NAME` of a module of evaluation.plots."""

    module: str
    summary: str  # for the help
    count: int | None  # default number of images; None = the figure has one image, or none
    # The other keyword arguments of the function, with their defaults; each has its flag in `OPTIONS`.
    options: Mapping[str, Any] = field(default_factory=lambda: {"steps": 50})
    keeps: bool = False  # the function also gets `cache`, a folder beside the figure for intermediate results
    model: Files = EMOJI64  # the default model, with its prompts.txt


SOLVERS = (("ddim", 50), ("dpm-solver", 20), ("dpm-solver++", 20))
PLANS = ("off", "faster-diffusion", "uniform:6", "pro", "deepcache:3")
FEWER = {"steps": 50, "step_counts": (50, 25, 20, 10, 5)}
SAMPLED = {"samplers": (("ddim", 50), ("plms", 50), ("dpm-solver++", 20), ("unipc", 20))}
COMPARED = {"steps": 50, "rows": str(ROWS), "data": None}
KINDS = {
    "evolution": Kind("features", "change of each block's features from step to step (eq. 2, figure 3a)", 8),
    "norms": Kind("features", "size of each block's features, and its deviation during a run (figures 3b, 3c)", 8),
    "maps": Kind("features", "feature maps as colours, by block and step (figures 2, 10)", None),
    "expected": Kind("images", "the image expected on the way: what is decided when", 8),
    "variants": Kind("images", "propagation of encoder, decoder, both or neither (figure 16)", 4),
    "fewer-steps": Kind(
        "images", "fewer steps, with and without propagation and prior noise (figures 7, 13, 14)", 4, FEWER
    ),
    "databases": Kind(
        "retrieval",
        "images of a retrieval-augmented model by several databases, and by the text alone",
        6,
        {"steps": 50, "databases": (DATABASE,), "knn": 4},
        model=RDM_EMOJI,
    ),
    "neighbours": Kind(
        "retrieval",
        "quality of a retrieval-augmented model by number of neighbours and size of the database",
        1000,
        {"steps": 50, "databases": (DATABASE,), "knns": (1, 2, 4, 8, 16), "sizes": (100, 1000, 10000)},
        keeps=True,
        model=RDM_EMOJI,
    ),
    "placement": Kind("images", "number and placement of the key timesteps (table 5, figure 9)", 16),
    "pareto": Kind("pareto", "error against both costs, for plans and for fewer steps", 16, COMPARED, keeps=True),
    "samplers": Kind("images", "plain and accelerated images of several samplers (figures 18 to 24)", 5, SAMPLED),
    "prior-noise": Kind("images", "prior noise, and the frequencies of the images (figure 6)", 8),
    "tasks": Kind(
        "tasks",
        "what the sampling scripts make for each task, plain and with plans (figures 15, 18 to 25)",
        None,
        {"commands": TASKS, "plans": ("off", "faster-diffusion", "deepcache:3")},
        keeps=True,
    ),
    "timeline": Kind("timeline", "which parts of the UNet run at which step", None, {"steps": 50, "plans": PLANS}),
    "times": Kind(
        "timeline",
        "seconds per image of plain, serial and parallel runs (figure 5)",
        4,
        {"samplers": SOLVERS, "repeats": 5},
    ),
}

OF_ALL = [name for name, kind in KINDS.items() if not {"databases", "commands"} & kind.options.keys()]


def sampler_and_steps(text: str) -> tuple[str, int]:
    """An argparse type: SAMPLER:STEPS."""
    name, colon, steps = text.rpartition(":")
    if not colon or name not in SAMPLERS.split(", "):
        raise argparse.ArgumentTypeError(f"expected SAMPLER:STEPS, the sampler one of {SAMPLERS}; got {text!r}")
    return name, step_count(steps)


STEPS = "sampling steps; for fewer-steps and pareto: of the run that the others are compared with"
COMMANDS = (
    "command lines of sampling scripts, each in quotes: the script's name and its arguments, without model, seed, plan "
    "and outdir (default: a task each)"
)
DATA = (
    "dataset of scripts/prepare_emoji.py: its captions replace --prompts, and the sampled images are also compared "
    "with its images (default: none; the images are compared with those of the plain run only)"
)
# Of the flag of each option: type of a value, metavar and help.
OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "steps": (step_count, "N", f"{STEPS} (default: %(default)s)"),
    "step_counts": (step_count, "N", "numbers of steps (default: {shown})"),
    "samplers": (sampler_and_steps, "SAMPLER:STEPS", "samplers and their numbers of steps (default: {shown})"),
    "repeats": (count, "N", "timed runs of each method (default: %(default)s)"),
    "commands": (str, "COMMAND", COMMANDS),
    "plans": (str, "PLAN", "plans, as --plan of txt2img.py (default: {shown})"),
    "databases": (str, "DIR", "databases of scripts/build_database.py (default: the one that ships)"),
    "knn": (count, "K", "neighbours that an image is made of (default: %(default)s)"),
    "knns": (count, "K", "numbers of neighbours (default: {shown})"),
    "sizes": (count, "N", "numbers of images in the database (default: {shown})"),
    "rows": (str, "YAML", "the methods to compare (default: evaluation/plots/pareto.yaml)"),
    "data": (str, "DIR", DATA),
}


def add_option(p: argparse.ArgumentParser, name: str, default: Any) -> None:
    """The flag of one of the OPTIONS; it takes several values if its default is a tuple."""
    kind, metavar, help = OPTIONS[name]
    several = default if isinstance(default, tuple) else ()
    shown = " ".join(":".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in several)
    more = {"nargs": "+"} if several else {}
    flag, help = f"--{name.replace('_', '-')}", help.replace("{shown}", shown)
    p.add_argument(flag, type=kind, default=default, metavar=metavar, help=help, **more)


def shared_arguments(p: argparse.ArgumentParser, model: Files = EMOJI64) -> None:
    """The arguments of every kind of figure; `model`: the default."""
    text = "folder for KIND.svg, KIND.png and KIND.json (default: %(default)s)"
    p.add_argument("--out", default="outputs/figures", metavar="DIR", help=text)
    text = "prompts, one per line, for a model that reads text (default: prompts.txt of the default model)"
    p.add_argument("--prompts", default=str(model[0].parent / "prompts.txt"), metavar="FILE", help=text)
    p.add_argument("--scale", type=finite, help="guidance scale, 1 = none (default: the model's, or 7.5)")
    seed_argument(p)
    model_arguments(p, model)
    p.set_defaults(outdir=None, default_model=model)


def parser() -> Parser:
    p = Parser(prog="figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    for name, kind in KINDS.items():
        one = kinds.add_parser(name, help=kind.summary, description=f"Draw the {name} figure: {kind.summary}.")
        if kind.count is not None:
            text = "number of images (default: %(default)s)"
            one.add_argument("--count", type=count, default=kind.count, metavar="N", help=text)
        shared_arguments(one, kind.model)
        for option, default in kind.options.items():
            add_option(one, option, default)
    every = kinds.add_parser(
        "all", help="all kinds of figures that need no database and no commands, with their defaults"
    )
    every.add_argument("--count", type=count, metavar="N", help="number of images (default: that of each kind)")
    every.add_argument("--without", nargs="+", choices=OF_ALL, default=[], metavar="KIND", help="kinds to leave out")
    shared_arguments(every)
    add_option(every, "steps", 50)
    return p


def run(args: argparse.Namespace) -> None:
    try:
        from evaluation.plots.experiment import Experiment, make_figure
    except ImportError as error:
        raise BadInput(f'packages: figures need {error.name}; pip install -e ".[eval]"') from error

    out = Path(args.out)
    check_outdir(out, "--out")
    setup = cli.setup.make_setup(settings_from(args, cli.settings.ModelSettings), args.default_model)
    prompts = cli.tasks.prompts_in(args.prompts, "prompts")
    names = [name for name in OF_ALL if name not in args.without] if args.kind == "all" else [args.kind]
    for name, kind in ((name, KINDS[name]) for name in names):
        number = 1 if kind.count is None else args.count or kind.count
        experiment = Experiment(setup, prompts, number, args.seed, args.scale)
        options = {option: getattr(args, option, default) for option, default in kind.options.items()}
        if kind.keeps:
            options["cache"] = out / f"{name}-rows"
        print(", ".join(make_figure(name, kind.module, experiment, out, options)))


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
