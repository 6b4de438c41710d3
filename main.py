"""Train a model from a configuration file.

    python main.py --base configs/autoencoder/emoji64-kl-f8.yaml -t
    python main.py --base configs/autoencoder/emoji64-kl-f8.yaml -t --steps 100 data.params.batch_size=8
    python main.py --resume logs/emoji64-kl-f8 -t
    python main.py --resume logs/emoji64-kl-f8/best.ckpt -t
    python main.py --base models/first_stage_models/kl-f8/config.yaml -t data.params.num_workers=4
    python main.py --base CONFIG.yaml -t --data.target=my_package.MyData --allow my_package

A configuration has four sections: `model` (the model to train: `target`, `params`), `training` (a Lightning module of
`ldm.training` that trains the model), `data` (a Lightning data module) and `lightning` (the trainer, the checkpoints
and the seed). Published configurations have no `training` section and are completed: the first lines say how. The log
folder of a run holds everything that the run writes: the configuration as used, the newest state (`last.ckpt`), the
best one by the model's `monitor` (`best.ckpt`), metrics as CSV and for TensorBoard, and image grids. A run that was
stopped or killed and then resumed ends with the same weights as a run that was never stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import pdb
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NoReturn

from ldm.cli.parser import Parser, run_command, torchrun_ranks, whole
from ldm.io.errors import BadInput, fault_of
from ldm.util import instantiate_from_config  # noqa: F401  (published scripts import it from here)

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
SWITCHES = ("-t", "--train", "--no-test", "--scale_lr", "-d", "--debug")  # published commands may give them a word
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # read when Lightning is imported
TAUGHT = {"crossattn": "delta.bin", "lora": "lora.safetensors", "tokens": "word.safetensors"}  # by what is trained
STATES = ("last.ckpt", "previous.ckpt", "best.ckpt")  # that a run keeps
# Flags of the published program that Lightning's trainer still has as arguments.
TRAINER_FLAGS = frozenset(
    """accelerator accumulate_grad_batches benchmark check_val_every_n_epoch detect_anomaly deterministic devices
    fast_dev_run gradient_clip_algorithm gradient_clip_val limit_train_batches limit_val_batches log_every_n_steps
    max_epochs max_steps max_time min_epochs min_steps num_nodes num_sanity_val_steps overfit_batches precision
    profiler strategy sync_batchnorm val_check_interval""".split()
)
SETTING = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")
# What Lightning warns of and what is meant to be: frozen parts of a model stay in evaluation mode; the data is in
# memory, where workers would only cost time; a small set has few batches. The rest is about PyTorch's own future.
AS_MEANT = (
    r".*in eval mode at the start of training",
    r".*does not have many workers",
    r".*smaller than the logging interval",
    r".*LeafSpec.* is deprecated",
    r"Total length of `list` across ranks is zero",
)


class TrainingParser(Parser):
    """Says where settings of the trainer go, which were flags of the published program."""

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
        if flag.removeprefix("--") in TRAINER_FLAGS:
            setting = f"lightning.trainer.{flag.removeprefix('--')}=VALUE"
            raise BadInput(f"{flag}: what the trainer does is a setting of the configuration here: {setting}")
        super().error(message)


def parser() -> Parser:
    p = TrainingParser(
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
    p.add_argument(
        "-r",
        "--resume",
        metavar="LOGDIR",
        help="resume the run in this folder, from its newest state or from the checkpoint that is named",
    )
    p.add_argument("-t", "--train", action="store_true", help="train (without it: validate once)")
    p.add_argument(
        "-n",
        "--name",
        help="name of the run (default: that of the first configuration file, or of its folder if it is config.yaml)",
    )
    p.add_argument("-f", "--postfix", default="", help="is added to the name")
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
        "--scale_lr",
        action="store_true",
        help="of a published configuration: multiply the learning rate with the images of a step, which the published "
        "code does unless told otherwise",
    )
    p.add_argument(
        "--gpus",
        metavar="IDS",
        help="GPUs to train on: their numbers (0,1 or 0,), or how many (2); same as lightning.trainer.devices",
    )
    p.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a package of your own from which the sections data and lightning.callbacks may name classes; its code is "
        "run",
    )
    p.add_argument("-d", "--debug", action="store_true", help="open Python's debugger where the training fails")
    p.add_argument("--no-test", action="store_true", help="for published commands: no test is run at the end anyway")
    p.add_argument("-p", "--project", help="for published commands: without effect, there too")
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change single settings, for example data.params.batch_size=8"
    )
    return p


def plain(argv: Sequence[str]) -> list[str]:
    """A command line without the words that published commands give to switches (-t True); --a.b=c is a.b=c."""
    out: list[str] = []
    for text in argv:
        word = text.lower()
        if out and out[-1] in SWITCHES and word in YES:
            continue
        if out and out[-1] in SWITCHES and word in NO:
            out.pop()
        else:
            out.append(text.lstrip("-") if SETTING.match(text.lstrip("-")) else text)
    return out


def of_gpus(text: str) -> list[str]:
    """The settings that --gpus stands for: "0,1" and "0," are numbers of GPUs, "2" is how many."""
    if not re.fullmatch(r"\d+(,\d+)*,?", text) or text == "0":
        raise BadInput(f"--gpus: expected numbers of GPUs such as 0,1 or 0, or how many, 1 or more; got {text!r}")
    devices = f"[{text.rstrip(',')}]" if "," in text else text
    return ["lightning.trainer.accelerator=gpu", f"lightning.trainer.devices={devices}"]


def folder_of(resumed: str) -> Path:
    """The folder of a run, from its path or from that of a checkpoint in it."""
    path = Path(resumed)
    if path.suffix == ".ckpt":
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def state_of(resumed: str | None) -> str:
    """The file of the state from which a run goes on, in its folder.

    Raises:
        BadInput: no such file is kept.
    """
    name = Path(resumed or "").name
    if not name.endswith(".ckpt") or name == STATES[0]:
        return STATES[0]
    if name not in STATES or not (folder_of(resumed) / name).is_file():
        raise BadInput(f"--resume: no file {folder_of(resumed) / name}; a run may keep {', '.join(STATES)}")
    return name


def name_of(given: str | None, file: Path) -> str:
    """The name of a run: the given one, or that of its configuration."""
    own = file.resolve().parent.name if file.stem == "config" else file.stem
    return given or own


def given_files(args: argparse.Namespace) -> tuple[str, list[Path], list[str]]:
    """The argument that names the configuration, its files, and the single settings.

    Raises:
        BadInput: files are not there, or a single setting is not written as KEY=VALUE.
    """
    # What follows --base is read as belonging to it.
    base = [text for text in args.base if not is_setting(text)]
    overrides = [text for text in args.base if is_setting(text)] + args.overrides
    if args.name and args.resume:
        raise BadInput("--name: a run that is resumed keeps its name; give either --name or --resume")
    if bool(base) == bool(args.resume):
        raise BadInput("give either --base CONFIG.yaml (a new run) or --resume LOGDIR (an old one)")
    name, files = ("base", [*map(Path, base)]) if base else ("resume", [folder_of(args.resume) / "config.yaml"])
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
    overrides += of_gpus(args.gpus) if args.gpus else []
    logdir = (
        folder_of(args.resume) if args.resume else Path(args.logdir) / (name_of(args.name, files[0]) + args.postfix)
    )
    if not args.resume and (logdir / "last.ckpt").exists():
        raise BadInput(f"--name: {logdir} holds a run already; go on with --resume {logdir} or choose another name")
    check_environment()
    with said_once():
        train(args, name, files, overrides, logdir)


def train(args: argparse.Namespace, name: str, files: list[Path], overrides: list[str], logdir: Path) -> None:
    """Train or validate in the log folder; `name` is the argument that names the configuration."""
    from ldm.training import configuration, run

    with fault_of(name):
        config = configuration.read_configuration(files, overrides, args.seed, args.steps, args.scale_lr, args.allow)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in AS_MEANT:
        warnings.filterwarnings("ignore", message)
    if args.allow:
        sys.path.insert(0, os.getcwd())  # where one's own package usually is
    with fault_of(name), debugged(args.debug):
        run.fit(config, logdir, train=args.train, allow=args.allow, resumed=state_of(args.resume))
    if args.train:
        what = str((config.training.get("params") or {}).get("what"))
        file = next((file for part, file in TAUGHT.items() if what.startswith(part)), "model.safetensors")
        print(f"for sampling: python scripts/export_model.py {logdir} --out {logdir}/{file}")


@contextmanager
def debugged(wanted: bool) -> Iterator[None]:
    """Open the debugger where an error comes up in the block, if it is wanted."""
    try:
        yield
    except Exception:
        if wanted:
            pdb.post_mortem()
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = plain(sys.argv[1:] if argv is None else argv)
    return run_command(parser(), run, given, "stopped; go on with --resume LOGDIR")


if __name__ == "__main__":
    sys.exit(main())
