"""Print results side by side, if they were measured under one protocol."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from evaluation.metrics.command import shown
from evaluation.metrics.result import ResultError, comparable, read_result
from ldm.cli.parser import Parser, run_command
from ldm.io.errors import blame


def parser() -> Parser:
    p = Parser(prog="results.py", description=__doc__)
    p.add_argument("results", nargs="+", metavar="JSON", help="files that the measures wrote with --out")
    return p


def run(args: argparse.Namespace) -> None:
    with blame("JSON", (ResultError,)):
        results = {path: read_result(path) for path in args.results}
        comparable(results)
    # Where only some results state their prompts, their protocols differ and they have been refused.
    if any(result.protocol.get("prompts") is None for result in results.values()):
        unknown = "it is not known which prompts the images were made from; check that they are the same"
        print(f"warning: {unknown}", file=sys.stderr)
    for path, result in results.items():
        print(f"{path}  " + "  ".join(f"{name} {shown(value)}" for name, value in result.values.items()))


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
