"""Measure the search in a database on random embeddings in clusters: its time, its memory, and an index beside it.

    python scripts/benchmark_retrieval.py --rows 1000000 --width 768 --dir /var/tmp

Reading once is what any search through all rows takes at least. Times are medians of five, with the file in memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial

from ldm.cli.parser import Parser, cli, run_command, whole


def parser() -> Parser:
    p = Parser(prog="benchmark_retrieval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--rows",
        type=whole(100, 10**8),
        default=100_000,
        metavar="N",
        help="rows of the database (default: %(default)s)",
    )
    p.add_argument(
        "--width", type=whole(4, 2**14), default=768, metavar="N", help="numbers in an embedding (default: %(default)s)"
    )
    p.add_argument(
        "--knn", type=whole(1, 1000), default=10, metavar="N", help="neighbours to find (default: %(default)s)"
    )
    p.add_argument(
        "--kind", choices=("flat", "ivf", "ivf-pq"), help="measure an index too, see train_searcher.py (default: none)"
    )
    p.add_argument(
        "--dir",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="folder for the embeddings; they are deleted afterwards (default: %(default)s)",
    )
    return p


def run(args: argparse.Namespace) -> None:
    cli.databases.benchmark_search(args.dir, args.rows, args.width, args.knn, args.kind)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
