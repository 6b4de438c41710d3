"""Time one prediction of networks at their published sizes against the diffusers library, with random weights.

    python scripts/benchmark_networks.py sd-v1 dit-xl-2-256 --repeats 5
    python scripts/benchmark_networks.py sd-xl sd-xl-refiner --apart --loading /var/tmp

A prediction is that of one plain step with guidance: two latents. The two libraries take turns in one process, after
predictions that are not timed, and a ratio below 1 means that ours is faster. With --apart each has a process of its
own, one after the other: the memory holds the weights of one. diffusers computes in the memory format in which it is
faster. What a run computes once for all steps (keys and values of the text) is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli.parser import Parser, check_output, count, profiling, run_command, side
from ldm.io.errors import BadInput, SettingError, fault_of

ROW = "{:<16}{:>10}  {:<14}{:>9}{:>14}{:>8}{:>12}"


def parser() -> Parser:
    p = Parser(prog="benchmark_networks.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "networks",
        nargs="+",
        metavar="NETWORK",
        help="names (a wrong one lists all), or folders of stages of DeepFloyd-IF, of which unet/config.json is read",
    )
    p.add_argument("--size", nargs=2, type=side, metavar=("H", "W"), help="of the latents (default: the network's)")
    p.add_argument("--batch", type=count, default=2, metavar="N", help="latents (default: 2, one image with guidance)")
    p.add_argument("--repeats", type=count, default=3, metavar="N", help="timed predictions of each (default: 3)")
    p.add_argument(
        "--apart",
        action="store_true",
        help="each library in a process of its own, where the memory does not hold the weights of both",
    )
    p.add_argument(
        "--loading",
        metavar="DIR",
        help="also load each network of ours in a new process, from a file of random weights in this folder, and print "
        "the peak of its memory as a multiple of the weights; exit code 1 if one takes more than 1.25",
    )
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
    difference, loading = f"{found['difference']:.1e}", found["loading"]
    peak = "" if loading is None else f"; loading: {loading:.2f} of the weights"
    return f"{ROW.format(found['name'], weights, size, *times, difference)}  {found['setting']}{peak}"


def compared(args: argparse.Namespace, makers: Mapping[str, Callable[[], Any]]) -> Iterator[dict[str, Any]]:
    """What was found of each network, as JSON values."""
    networks = profiling.networks
    work = networks.Work(args.repeats, args.batch, args.size, not args.unpacked)
    for name, make in makers.items():
        with fault_of("size"):
            found = networks.compare_apart(name, make, work) if args.apart else networks.compare(name, make(), work)
        loading = None
        if args.loading:
            with fault_of("loading", (OSError,)):
                taken = networks.measure_loading(make, args.loading)
            loading = taken.peak / taken.weights
        yield asdict(found) | {"ratio": found.ratio, "loading": loading}


def makers_of(names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """What makes each network."""
    networks, found = profiling.networks, {}
    for name in names:
        with fault_of("networks"):
            make = networks.described(name)
        if make is None:
            raise SettingError("networks", f"expected {', '.join(networks.NETWORKS)}, or a folder; got {name!r}")
        found[name] = make
    return found


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if loading took more memory than it may."""
    try:
        networks = profiling.networks
    except ImportError as error:
        raise BadInput(f'packages: this needs {error.name}; pip install -e ".[benchmark]"') from error
    makers = makers_of(args.networks)
    check_output(args.json, "--json")
    if args.loading and not Path(args.loading).is_dir():
        raise SettingError("loading", f"{args.loading}: no such directory")
    asked = {"batch": args.batch, "repeats": args.repeats, "packed": not args.unpacked, "apart": args.apart}
    about = profiling.timing.machine() | asked
    print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; float32, medians of {args.repeats}"
    )
    print(ROW.format("network", "M weights", "latents", "ours, s", "diffusers, s", "ratio", "difference"))
    found = profiling.timing.tell(compared(args, makers), line, about, args.json)
    return int(any((one["loading"] or 0) > networks.MOST_MEMORY for one in found))


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
