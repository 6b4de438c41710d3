"""Make the paper's tables, and print our numbers beside the paper's.

    python evaluation/tables.py table1 --world emoji
    python evaluation/tables.py table1 --world coco --data COCO --clip CLIP-VIT-B-32
    python evaluation/tables.py table1 --world coco --gflops-only

World coco: the published models on the paper's data. World emoji: the model that ships. There the Fréchet distance of
EfficientNet-lite0's features from the dataset replaces FID, and concept retrieval R@5 replaces the CLIP-score. So only
changes against the plain row can be compared with the paper's. Finished rows are kept in --runs: the same command
continues a stopped table, and tables share the rows that they have in common.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from evaluation.table.spec import WORLDS, load_table, table_names
from ldm.cli.parser import GO_ON, MOST, Parser, count, run_command, settings_from, whole
from ldm.io.errors import fault_of, flags_named

TIMED = 5


def parser() -> Parser:
    p = Parser(prog="tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", metavar="TABLE", help=f"the table: {', '.join(table_names())}; or FILE.yaml")
    p.add_argument("--world", choices=WORLDS, required=True, help="the models and the data, see above")
    p.add_argument(
        "--rows", metavar="N,N", type=row_numbers, help="make only these rows; the first row is 1 (default: all)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument(
        "--gflops-only", action="store_true", help="compute only the GFLOPs, from the config; needs no weights"
    )
    what.add_argument("--show", action="store_true", help="make nothing; print what has been made before")
    p.add_argument("--count", type=count, metavar="N", help="number of images per row (default: as the protocol says)")
    p.add_argument(
        "--timed",
        type=whole(0, MOST),
        default=TIMED,
        metavar="N",
        help="number of images per row that are timed, one at a time; 0 = none (default: %(default)s)",
    )
    files = p.add_argument_group("files")
    files.add_argument(
        "--data", metavar="DIR", help="folder with the data of the protocol (default: the one that it names)"
    )
    files.add_argument("--config", metavar="YAML", help="the model's config (default: the protocol's)")
    files.add_argument("--ckpt", metavar="FILE", help="the model's weights (default: the protocol's)")
    files.add_argument(
        "--inception",
        metavar="PATH",
        help="weights of the network for Fréchet distances (default: for inception-2015 those of torch.hub)",
    )
    files.add_argument("--clip", metavar="DIR", help="folder of CLIP ViT-B/32, for the CLIP-score")
    files.add_argument("--image-reward", metavar="FILE", help="ImageReward.pt, with vocab.txt beside it, for table15")
    files.add_argument("--pick-score", metavar="DIR", help="folder of PickScore_v1, for table15")
    files.add_argument(
        "--runs",
        default="outputs/tables",
        metavar="DIR",
        help="folder for images, results and tables (default: %(default)s)",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return p


def row_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected row numbers from 1, such as 1,2; got {text!r}")
    return [int(part) for part in parts]


def run(args: argparse.Namespace) -> None:
    from evaluation.table import build, render

    with fault_of("TABLE"):
        spec = load_table(args.table)
    flags = {name: f"--{name.replace('_', '-')}" for name in ("gflops_only", "image_reward", "pick_score")}
    with flags_named({"table": "TABLE", **flags}):
        table = build.build_table(
            spec,
            args.world,
            args.runs,
            settings_from(args, build.Sources),
            numbers=args.rows,
            count=args.count,
            timed=args.timed,
            gflops_only=args.gflops_only,
            show=args.show,
            say=partial(print, file=sys.stderr),
        )
    print(render.markdown(table))
    with fault_of("runs", (OSError,)):
        print(", ".join(map(str, render.write(table, args.runs))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv, GO_ON)


if __name__ == "__main__":
    sys.exit(main())
