"""Time plans of one model side by side, with random weights: plain, the paper's, DeepCache, any combination.

    python scripts/benchmark.py --config configs/stable-diffusion/v1-inference.yaml --size 32 32 --steps 4
    python scripts/benchmark.py --config configs/stable-diffusion/v1-inference.yaml --against diffusers
    python scripts/benchmark.py --device cuda --json gpu.json

With --device cuda and nothing else it times Stable Diffusion v1.5 and XL in fp16 and bf16, 50 steps, 1 and 8 images at
a time, as they are and compiled: one table for each, the same on every GPU.

A row is PLAN, PLAN+PROPAGATE, PLAN@PARALLEL, or PLAN+PROPAGATE@PARALLEL, for example faster-diffusion, deepcache:3 or
uniform:4+linear@8. auto:9 needs a calibration of the model for that number of steps (emoji64 has one for 50). All rows
run in one process. They take turns, after one round that is not timed, so that other programs on the machine slow down
all of them alike. The time is that of the UNet and the solver, without text encoder and first stage. The peak of memory
is that of the tensors of a run, without the model; it is measured in the round that is not timed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from itertools import chain, product
from typing import Any

from ldm.cli.arguments import EMOJI64
from ldm.cli.parser import Parser, check_output, cli, count, profiling, run_command, side, step_count, whole
from ldm.io.errors import SettingError

ROWS = ["off", "faster-diffusion", "faster-diffusion@8", "deepcache:3"]
MOST_THREADS = 1024
DTYPES = ("fp32", "fp16", "bf16")
STABLE = EMOJI64[0].parents[3] / "configs" / "stable-diffusion"
# What is timed by default: on a CPU, and on a GPU.
USUAL: dict[str, dict[str, Any]] = {
    "cpu": {"config": [str(EMOJI64[0])], "dtype": ["fp32"], "batch": [1], "steps": 10, "rows": ROWS, "compile": False},
    "cuda": {
        "config": [str(STABLE / "v1-inference.yaml"), str(STABLE / "sd_xl_base.yaml")],
        "dtype": ["fp16", "bf16"],
        "batch": [1, 8],
        "steps": 50,
        "rows": ["off", "faster-diffusion", "faster-diffusion@8", "uniform:6+quadratic@8", "deepcache:3", "skip:3"],
        "compile": True,
    },
}


def parser() -> Parser:
    p = Parser(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--config", nargs="+", metavar="YAML", help="configs of models, one table for each (default: emoji64)"
    )
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help="precision, one table for each (default: fp32)")
    p.add_argument(
        "--size", nargs=2, type=side, metavar=("H", "W"), help="height and width of the latents (default: the config's)"
    )
    p.add_argument(
        "--tokens", type=count, metavar="N", help="tokens of the context (default: what the text encoder reads)"
    )
    p.add_argument(
        "--batch",
        nargs="+",
        type=count,
        metavar="N",
        help="images at a time, one table for each number; guidance doubles them (default: 1)",
    )
    p.add_argument("--steps", type=step_count, metavar="N", help="DDIM steps (default: 10)")
    p.add_argument("--rows", nargs="+", metavar="ROW", help=f"see above (default: {' '.join(ROWS)})")
    p.add_argument(
        "--against", choices=("diffusers",), help="also time the plain run of this library on the same weights"
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also time every row compiled by PyTorch; takes minutes (default: on a GPU)",
    )
    p.add_argument("--repeats", type=count, default=3, metavar="N", help="timed rounds (default: 3)")
    p.add_argument("--threads", type=whole(1, MOST_THREADS), metavar="N", help="CPU threads (default: PyTorch's)")
    p.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    return p


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines for one batch size."""
    height, width = result["size"]
    yield f"{result['config']}, latents {height} x {width}, {result['dtype']}"
    yield (
        f"batch {result['batch']:<20}{'s/image':>10}{'spread':>8}{'GMAC':>9}{'critical':>10}"
        f"{'saved/MACs':>12}{'peak MB':>9}"
    )
    yield from map(row_line, result["rows"])
    yield from (f"{name:<26}out of memory" for name in result["out_of_memory"])
    rate = result["matmul_flops"]
    yield f"{'float32' if result['dtype'] == 'fp32' else result['dtype']} matrix product: {rate / 1e9:.1f} GFLOP/s"
    if result["plain_flops"]:
        yield f"plain run: {result['plain_flops'] / 1e9:.1f} GFLOP/s, {result['plain_flops'] / rate:.0%} of that"
    if result["shares"]:
        yield "time of a plain step: " + ", ".join(f"{kind} {share:.1%}" for kind, share in result["shares"].items())
    if "compile_seconds" in result:
        yield f"compiling, with the first runs: {result['compile_seconds']:.0f} s"
    if "peer" in result:
        yield f"diffusers: {result['peer']}; largest difference of the latents {result['difference']:.1e}"
        seconds = {r["name"]: r["seconds"] for r in result["rows"]}
        for kind in ("", ", compiled"):
            if {"off" + kind, "diffusers" + kind} <= {*seconds}:
                yield f"plain / diffusers{kind}: {seconds['off' + kind] / seconds['diffusers' + kind]:.2f}"


def row_line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{row['seconds']:>10.3f}{row['spread']:>8.1%}"]
    for value, form in (
        (row["macs"] and row["macs"] / 1e9, ">9.1f"),
        (row["critical_path"] and row["critical_path"] / 1e9, ">10.1f"),
        (row["saved"], ">12.1%"),
        (row["peak"] and row["peak"] / 2**20, ">9.0f"),
    ):
        cells.append(f"{'':{form.split('.')[0]}}" if value is None else f"{value:{form}}")
    return f"{row['name']:<26}" + "".join(cells)


def run(args: argparse.Namespace) -> None:
    benchmark = profiling.benchmark
    check_output(args.json, "--json")
    device = cli.setup.find_device(args.device)
    if device.type not in USUAL:
        raise SettingError("device", f"{device} can't be timed; accepted: {', '.join(USUAL)}")
    for name, usual in USUAL[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    benchmarks = [
        benchmark.Benchmark(
            config,
            args.size,
            args.tokens,
            args.steps,
            args.rows,
            peer=args.against is not None,
            compiled=args.compile,
            repeats=args.repeats,
            threads=args.threads,
            device=device,
            dtype=dtype,
        )
        for config, dtype in product(args.config, args.dtype)
    ]
    tables = chain.from_iterable([benchmark.run_benchmark(one, args.batch) for one in benchmarks])
    about = benchmark.circumstances(benchmarks[0])
    about |= {"date": datetime.now(timezone.utc).isoformat(timespec="minutes"), "command": shlex.join(sys.argv)}
    print(
        f"{about.get('gpu', about['processor'])}, {about['threads']} threads, torch {about['torch']}; {args.steps} "
        f"DDIM steps, guided, random weights; median of {args.repeats}"
    )
    profiling.timing.tell(tables, lambda result: "\n" + "\n".join(table(result)), about, args.json)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
