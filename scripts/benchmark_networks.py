"""Time one prediction of networks at their published sizes against the diffusers library, with random weights.

    python scripts/benchmark_networks.py sd-v1 dit-xl-2-256 --repeats 5
    python scripts/benchmark_networks.py if-i-xl --unpacked          # 17 GB of weights, once

A prediction is that of one plain step with guidance: two latents. The two libraries take turns in one process, after
predictions that are not timed, and a ratio below 1 means that ours is faster. diffusers computes in the memory format
in which it is faster. What a run computes once for all steps (keys and values of the text) is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from ldm.cli.parser import Parser, check_output, count, profiling, run_command, side
from ldm.io.errors import BadInput, SettingError, fault_of

ROW = "{:<16}{:>10}  {:<14}{:>9}{:>14}{:>8}{:>12}"


def parser() -> Parser:
    p = Parser(prog="benchmark_networks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("networks", nargs="+", metavar="NETWORK", help="names; a wrong one lists all")
    p.add_argument("--size", nargs=2, type=side, metavar=("H", "W"), help="of the latents (default: the network's)")
    p.add_argument("--batch", type=count, default=2, metavar="N", help="latents (default: 2, one image with guidance)")
    p.add_argument("--repeats", type=count, default=3, metavar="N", help="timed predictions of each (default: 3)")
    p.add_argument(
        "--unpacked",
        action="store_true",
        help="our layers stay as PyTorch's, and compute on the weights of diffusers' network: half the memory, but "
        "slower than in a run",
    )
    p.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    return p


def line(found: Mapping[str, Any]) -> str:
    """The row of a network."""
    size, weights = " x ".join(map(str, found["size"])), f"{found['weights'] / 1e6:.1f}"
    times = (f"{found['ours']:.3f}", f"{found['theirs']:.3f}", f"{found['ratio']:.2f}")
    difference = f"{found['difference']:.1e}"
    return f"{ROW.format(found['name'], weights, size, *times, difference)}  {found['setting']}"


def compared(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What was found of each network, as JSON values."""
    networks = profiling.networks
    for name in args.networks:
        with fault_of("size"):
            twin = networks.NETWORKS[name]()
            found = networks.compare(name, twin, args.repeats, args.batch, args.size, not args.unpacked)
        yield asdict(found) | {"ratio": found.ratio}


def run(args: argparse.Namespace) -> None:
    try:
        networks = profiling.networks
    except ImportError as error:
        raise BadInput(f'packages: this needs {error.name}; pip install -e ".[benchmark]"') from error
    if unknown := [name for name in args.networks if name not in networks.NETWORKS]:
        raise SettingError("networks", f"expected {', '.join(networks.NETWORKS)}; got {unknown[0]!r}")
    check_output(args.json, "--json")
    asked = {"batch": args.batch, "repeats": args.repeats, "packed": not args.unpacked}
    about = profiling.timing.machine() | asked
    print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; float32, medians of {args.repeats}"
    )
    print(ROW.format("network", "M weights", "latents", "ours, s", "diffusers, s", "ratio", "difference"))
    profiling.timing.tell(compared(args), line, about, args.json)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
