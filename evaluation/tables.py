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
from functools import partial

from evaluation.table.spec import WORLDS, table_names
from ldm.cli.parser import GO_ON, MOST, Parser, count, run_command, settings_from, whole
from ldm.io.errors import fault_of

TIMED = 5


def parser() -> Parser:
    p = Parser(prog="tables.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("table", metavar="TABLE", help=f"the table: {', '.join(table_names())}; or FILE.yaml")
    p.add_argument("--world", choices=WORLDS, required=True, help="the models and the data, see above")
    rows = "make only these rows; the first row is 1 (default: all)"
    p.add_argument("--rows", metavar="N,N", type=row_numbers, help=rows)
    what = p.add_mutually_exclusive_group()
    gflops = "compute only the GFLOPs, from the config; needs no weights"
    what.add_argument("--gflops-only", action="store_true", help=gflops)
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
    for flag, metavar, what in (
        ("--data", "DIR", "folder with the data of the protocol (default: the one that it names)"),
        ("--config", "YAML", "the model's config (default: the protocol's)"),
        ("--ckpt", "FILE", "the model's weights (default: the protocol's)"),
        (
            "--inception",
            "PATH",
            "weights of the network for Fréchet distances (default: for inception-2015 those of torch.hub)",
        ),
        ("--clip", "DIR", "folder of CLIP ViT-B/32, for the CLIP-score"),
        ("--image-reward", "FILE", "ImageReward.pt, with vocab.txt beside it, for table15"),
        ("--pick-score", "DIR", "folder of PickScore_v1, for table15"),
    ):
        files.add_argument(flag, metavar=metavar, help=what)
    runs = "folder for images, results and tables (default: %(default)s)"
    files.add_argument("--runs", default="outputs/tables", metavar="DIR", help=runs)
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return p


def row_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected row numbers from 1, such as 1,2; got {text!r}")
    return [int(part) for part in parts]


def run(args: argparse.Namespace) -> None:
    from evaluation.table import row, spec

    with fault_of("table"):
        table = spec.load_table(args.table)
    how = {name: getattr(args, name) for name in ("count", "timed", "gflops_only", "show")}
    sources, say = settings_from(args, row.Sources), partial(print, file=sys.stderr)
    made = row.build_table(table, args.world, args.runs, sources, numbers=args.rows, say=say, **how)
    print(spec.markdown(made))
    with fault_of("runs", (OSError,)):
        print(", ".join(map(str, spec.write(made, args.runs))))


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
