"""Train a model from a configuration file.

    python main.py --base configs/autoencoder/emoji64-kl-f8.yaml -t
    python main.py --base configs/autoencoder/emoji64-kl-f8.yaml -t --steps 100 data.params.batch_size=8
    python main.py --resume logs/emoji64-kl-f8 -t

A configuration has four sections: `model` (the model to train: `target`, `params`), `training` (a Lightning module of
`ldm.training` that trains the model), `data` (a Lightning data module) and `lightning` (the trainer, the checkpoints
and the seed). The log folder of a run holds everything that the run writes: the configuration as used, `last.ckpt`,
metrics as CSV and for TensorBoard, and image grids. A run that was stopped or killed and then resumed ends with the
same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from ldm.cli.parser import Parser, run_command, torchrun_ranks, whole
from ldm.io.errors import BadInput, fault_of
from ldm.util import instantiate_from_config  # noqa: F401  (published scripts import it from here)

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # read when Lightning is imported
SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")
# What Lightning warns of and what is meant to be: frozen parts of a model stay in evaluation mode; the data is in
# memory, where workers would only cost time; a small set has few batches. The rest is about PyTorch's own future.
AS_MEANT = (
    r".*in eval mode at the start of training",
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r".*LeafSpec.* is deprecated",
)


def parser() -> Parser:
    p = Parser(
        prog="main.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, intermixed=True
    )
    p.add_argument(
        "-b",
        "--base",
        nargs="+",
        default=[],
        metavar="CONFIG.yaml",
        help="configuration files of a new run; later ones override earlier ones",
    )
    p.add_argument("-r", "--resume", metavar="LOGDIR", help="resume the run in this folder")
    p.add_argument("-t", "--train", action="store_true", help="train (without it: validate once)")
    p.add_argument("-n", "--name", help="name of the run (default: that of the first configuration file)")
    p.add_argument("-l", "--logdir", default="logs", metavar="DIR", help="folder of the runs (default: %(default)s)")
    p.add_argument(
        "-s",
        "--seed",
        type=whole(0, 2**32 - 1),
        metavar="N",
        help="seed of weights, data order and noise (default: the configuration's lightning.seed, or 23)",
    )
    p.add_argument(
        "--steps",
        type=whole(1, 10**12),
        metavar="N",
        help="train N steps in all; the learning-rate schedule is stretched or shortened to match "
        "(default: the configuration's lightning.trainer.max_steps)",
    )
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change single settings, for example data.params.batch_size=8"
    )
    return p


def given_files(args: argparse.Namespace) -> tuple[str, list[Path], list[str]]:
    """The argument that names the configuration, its files, and the single settings.

    Raises:
        BadInput: files are not there, or a single setting is not written as KEY=VALUE.
    """
    # What follows --base is read as belonging to it.
    base = [text for text in args.base if not is_setting(text)]
    overrides = [text for text in args.base if is_setting(text)] + args.overrides
    if bool(base) == bool(args.resume):
        raise BadInput("give either --base CONFIG.yaml (a new run) or --resume LOGDIR (an old one)")
    name, files = ("base", [*map(Path, base)]) if base else ("resume", [Path(args.resume) / "config.yaml"])
    for path in files:
        with fault_of(name, (OSError,)):  # a name that no file can have
            if not path.is_file():
                raise BadInput(f"--{name}: no file {path}")
    for text in overrides:
        if not SETTING.match(text) or text.endswith("=???"):
            raise BadInput(
                f"expected KEY=VALUE with the whole name, for example data.params.batch_size=8; got {text!r}"
            )
    return name, files, overrides


def is_setting(text: str) -> bool:
    return "=" in text and not Path(text).is_file()


def check_environment() -> None:
    """Raise BadInput for numbers of processes that can't be, which Lightning reads without a check."""
    torchrun_ranks()
    for name in RANKS:
        if not os.environ.get(name, "0").isdecimal():
            raise BadInput(f"environment variable {name}: expected a whole number from 0 on; got {os.environ[name]!r}")


@contextmanager
def said_once() -> Iterator[None]:
    """What the block prints is printed by the first of the processes that train together; errors by each."""
    if all(int(os.environ.get(name, 0)) == 0 for name in RANKS):
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def run(args: argparse.Namespace) -> None:
    name, files, overrides = given_files(args)
    logdir = Path(args.resume) if args.resume else Path(args.logdir) / (args.name or files[0].stem)
    if not args.resume and (logdir / "last.ckpt").exists():
        raise BadInput(f"--name: {logdir} holds a run already; go on with --resume {logdir} or choose another name")
    check_environment()
    with said_once():
        train(args, name, files, overrides, logdir)


def train(args: argparse.Namespace, name: str, files: list[Path], overrides: list[str], logdir: Path) -> None:
    """Train or validate in the log folder; `name` is the argument that names the configuration."""
    from ldm.training.run import fit, read_configuration

    with fault_of(name):
        config = read_configuration(files, overrides, args.seed, args.steps)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in AS_MEANT:
        warnings.filterwarnings("ignore", message)
    with fault_of(name):
        fit(config, logdir, train=args.train)
    if args.train:
        print(f"for sampling: python scripts/export_model.py {logdir} --out {logdir}/model.safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv, "stopped; go on with --resume LOGDIR")


if __name__ == "__main__":
    sys.exit(main())
