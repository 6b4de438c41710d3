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
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser, command, stated_ranks, whole
from ldm.io.errors import BadInput, blame
from ldm.util import instantiate_from_config  # noqa: F401  (published scripts import it from here)

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-b",
        "--base",
        nargs="+",
        default=[],
        metavar="CONFIG.yaml",
        help="configuration files; later ones override earlier ones",
    )
    parser.add_argument("-r", "--resume", metavar="LOGDIR", help="resume the run in this folder")
    parser.add_argument("-t", "--train", action="store_true", help="train (without it: validate once)")
    parser.add_argument("-n", "--name", help="name of the run (default: that of the first configuration)")
    parser.add_argument("-l", "--logdir", default="logs", help="folder of the runs (default: %(default)s)")
    parser.add_argument(
        "-s",
        "--seed",
        type=whole(0, 2**32 - 1),
        help="seed of weights, data order and noise (default: the configuration's lightning.seed, or 23)",
    )
    parser.add_argument(
        "--steps",
        type=whole(1, 10**12),
        metavar="N",
        help="train N steps in all; the learning-rate schedule is shortened or stretched with them "
        "(default: the configuration's lightning.trainer.max_steps)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change single settings, for example data.params.batch_size=8"
    )
    args = parser.parse_intermixed_args(argv)
    # What follows --base is read as belonging to it.
    args.overrides = [text for text in args.base if is_setting(text)] + args.overrides
    args.base = [text for text in args.base if not is_setting(text)]
    if bool(args.base) == bool(args.resume):
        parser.error("give either --base CONFIG.yaml (a new run) or --resume LOGDIR (an old one)")
    flag, files = ("--base", args.base) if args.base else ("--resume", [str(Path(args.resume) / "config.yaml")])
    for path in files:
        with blame(flag, (OSError,)):  # a name that no file can have
            if not Path(path).is_file():
                parser.error(f"{flag}: no file {path}")
    for text in args.overrides:
        if not SETTING.match(text) or text.endswith("=???"):
            parser.error(f"expected KEY=VALUE with the whole name, for example data.params.batch_size=8; got {text!r}")
    return args


def is_setting(text: str) -> bool:
    return "=" in text and not Path(text).is_file()


def configuration(args: argparse.Namespace) -> DictConfig:
    """What the files and the command line say together."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from ldm.io.files import read_config
    from ldm.training.run import SEED, check, with_steps

    flag, files = ("--resume", [Path(args.resume) / "config.yaml"]) if args.resume else ("--base", args.base)
    config = OmegaConf.create()
    for path in files:
        with blame(flag):
            part = read_config(path)
            if not OmegaConf.is_dict(part):
                raise ValueError(f"{path}: expected sections and their settings; got a list")
            config = OmegaConf.merge(config, part)
    for text in args.overrides:
        with blame(text, (ValueError, OmegaConfBaseException, YAMLError)):
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([text]))
    with blame(flag, (ValueError, OmegaConfBaseException)):
        check(config)
        config.lightning.seed = args.seed if args.seed is not None else config.lightning.get("seed", SEED)
        return with_steps(config, args.steps) if args.steps else config


def run(args: argparse.Namespace) -> None:
    logdir = Path(args.resume) if args.resume else Path(args.logdir) / (args.name or Path(args.base[0]).stem)
    if not args.resume and (logdir / "last.ckpt").exists():
        raise BadInput(f"--name: {logdir} holds a run already; go on with --resume {logdir} or choose another name")
    stated_ranks()  # a number that can't be is refused
    for name in RANKS:
        if not os.environ.get(name, "0").isdecimal():
            raise BadInput(f"environment variable {name}: expected a whole number from 0 on; got {os.environ[name]!r}")
    config = configuration(args)
    # Imported late so that --help and a wrong flag answer at once.
    from ldm.training.run import fit

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in AS_MEANT:
        warnings.filterwarnings("ignore", message)
    with blame("--resume" if args.resume else "--base"):
        fit(config, logdir, train=args.train)
    if args.train:
        print(f"for sampling: python scripts/export_model.py {logdir} --out {logdir}/model.safetensors")


def main(argv: list[str] | None = None) -> int:
    return command("main.py", lambda: run(arguments(argv)), "stopped; go on with --resume LOGDIR")


if __name__ == "__main__":
    sys.exit(main())
