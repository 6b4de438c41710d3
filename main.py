"""Train a model from a configuration file.

    python main.py --base configs/autoencoder/emoji64-kl-f8.yaml -t
    python main.py --resume logs/emoji64-kl-f8 -t

A configuration has the sections `model` (what is trained: `target`, `params`), `training` (how: a Lightning
module of `ldm.training` that takes the model), `data` (a Lightning data module) and `lightning` (arguments of
the trainer and of the checkpoints). Everything a run makes lies in its log folder: the configuration as used,
`last.ckpt`, metrics as CSV and for TensorBoard, and sample grids.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ldm.cli import BadInput, Parser, blame, command
from ldm.util import instantiate_from_config  # noqa: F401  (published scripts import it from here)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-b", "--base", nargs="+", metavar="CONFIG.yaml",
                        help="configuration files; later ones override earlier ones")
    parser.add_argument("-r", "--resume", metavar="LOGDIR", help="go on with the run of this folder")
    parser.add_argument("-t", "--train", action="store_true", help="train (without it: validate once)")
    parser.add_argument("-n", "--name", help="name of the run (default: that of the first configuration)")
    parser.add_argument("-l", "--logdir", default="logs", help="folder of the runs (default: %(default)s)")
    parser.add_argument("-s", "--seed", type=int, default=23,
                        help="seed of weights and data order (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE",
                        help="single settings, for example data.params.batch_size=8")
    args = parser.parse_args(argv)
    if bool(args.base) == bool(args.resume):
        parser.error("give either --base CONFIG.yaml (a new run) or --resume LOGDIR (an old one)")
    for path in args.base or [str(Path(args.resume) / "config.yaml")]:
        if not Path(path).is_file():
            parser.error(f"{'--base' if args.base else '--resume'}: no file {path}")
    return args


def run(args: argparse.Namespace) -> None:
    # Imported late so that --help and a wrong flag answer at once.
    import pytorch_lightning as pl
    from omegaconf import OmegaConf

    from ldm.training.run import fit

    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    logdir = Path(args.resume) if args.resume else Path(args.logdir) / (args.name or Path(args.base[0]).stem)
    files = [logdir / "config.yaml"] if args.resume else args.base
    if not args.resume and (logdir / "last.ckpt").exists():
        raise BadInput(f"--name: {logdir} holds a run already; go on with --resume {logdir} or choose another name")
    config = OmegaConf.merge(*map(OmegaConf.load, files), OmegaConf.from_dotlist(args.overrides))
    pl.seed_everything(args.seed, workers=True, verbose=False)
    with blame("--resume" if args.resume else "--base"):
        fit(config, logdir, train=args.train)


def main(argv: list[str] | None = None) -> int:
    return command("main.py", lambda: run(arguments(argv)), "stopped; go on with --resume LOGDIR")


if __name__ == "__main__":
    sys.exit(main())
