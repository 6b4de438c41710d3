"""Make an index of a database, for millions of rows; it needs the faiss library (pip install -e ".[retrieval]").

Without an index the search compares a query with every row, which is exact and takes as long as reading the
embeddings once. The recall that is printed is the share of the true neighbours of 100 rows that the index finds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.parser import Parser, cli, number, run_command, whole


def parser() -> Parser:
    p = Parser(prog="train_searcher.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "-d",
        "--database",
        default="openimages",
        metavar="DIR",
        help="folder of the database, or its name in data/rdm/retrieval_databases (default: %(default)s)",
    )
    p.add_argument(
        "-t",
        "--target_path",
        metavar="DIR",
        help="folder of the index (default: data/rdm/searchers/NAME of the database)",
    )
    p.add_argument(
        "-k",
        "--knn",
        type=whole(1, 1000),
        default=20,
        metavar="N",
        help="number of neighbours for which the recall is measured, below the number of rows; the index "
        "finds any number (default: %(default)s)",
    )
    p.add_argument(
        "--kind",
        choices=("flat", "ivf", "ivf-pq"),
        default="ivf",
        help="flat = all rows in memory; ivf = only the nearest clusters of rows are looked through; ivf-pq = the same "
        "with compressed embeddings, and the candidates compared again (default: %(default)s)",
    )
    p.add_argument(
        "--recall",
        type=number(float, 0, 1, "a number in 0..1"),
        default=0.95,
        metavar="R",
        help="the recall to reach: more and more clusters are searched until it is reached (default: %(default)s)",
    )
    return p


def run(args: argparse.Namespace) -> None:
    cli.databases.train_searcher(args.database, args.target_path, args.kind, args.recall, args.knn)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
