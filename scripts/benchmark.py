"""Time plans of one model side by side, with random weights: plain, the paper's, DeepCache, any combination.

    python scripts/benchmark.py --config configs/stable-diffusion/v1-inference.yaml --size 32 32 --steps 4
    python scripts/benchmark.py --config configs/stable-diffusion/v1-inference.yaml --against diffusers

A row is PLAN, PLAN+PROPAGATE, PLAN@PARALLEL or all of it: faster-diffusion, deepcache:3, uniform:4+linear@8; auto:9
needs the model's calibration for that number of steps (emoji64 has one for 50). All rows run in one process, in turn,
after one untimed round, so that what else the machine does meets all of them. Time is that of the UNet and the solver,
without text encoder and first stage. Peak memory is that of the run's tensors, beside the model; it is taken in the
untimed round.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import count, side, step_count
from ldm.cli.parser import Parser, command, whole
from ldm.cli.setup import check_output
from ldm.io.errors import blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from ldm.models.diffusion.propagation.plan import Plan
    from ldm.profiling.timing import Seconds
    from ldm.profiling.workload import Workload

EMOJI = Path(__file__).resolve().parents[1] / "models" / "ldm" / "emoji64" / "config.yaml"
ROWS = ["off", "faster-diffusion", "faster-diffusion@8", "deepcache:3"]
MOST_THREADS = 1024
MATRIX, PEER = "matrix product", "diffusers"
COMPILED = ", compiled"  # after the name of a row


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(EMOJI), metavar="YAML", help="of the model (default: emoji64)")
    parser.add_argument("--size", nargs=2, type=side, metavar=("H", "W"), help="of latents (default: the config's)")
    parser.add_argument(
        "--tokens", type=count, help="of the context, if there is one (default: what the config's encoder reads)"
    )
    parser.add_argument(
        "--batch",
        nargs="+",
        type=count,
        default=[1],
        metavar="N",
        help="pictures at a time; guidance doubles them (default: 1)",
    )
    parser.add_argument("--steps", type=step_count, default=10, help="of DDIM (default: 10)")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"(default: {' '.join(ROWS)})")
    parser.add_argument("--against", choices=(PEER,), help="the plain run by this library, on the same weights")
    parser.add_argument(
        "--compile", action="store_true", help="every row also compiled by PyTorch, which takes minutes"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="timed rounds (default: 3)")
    parser.add_argument("--threads", type=whole(1, MOST_THREADS), metavar="N", help="(default: PyTorch's)")
    parser.add_argument("--json", metavar="FILE", help="also write what was measured")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Row:
    """One line of the table; per picture.

    seconds, spread: of a run, and half the range as a share.
    macs, critical_path: of the UNet.
    saved: of the plain run's time, as a share of what the MACs say; None for the plain run.
    peak: bytes of its tensors.
    """

    name: str
    batch: int
    seconds: float
    spread: float
    macs: int | None
    critical_path: int | None
    saved: float | None
    peak: int


def read_row(text: str, steps: int, calibrations: Path) -> Plan:
    """The plan of a row's name; calibrations: the folder with the model's own, for `auto:K`."""
    from ldm.models.diffusion.propagation.load import RunFacts, load_plan
    from ldm.models.diffusion.propagation.plan import Plan

    name, _, parallel = text.partition("@")
    spec, _, propagate = name.partition("+")
    if parallel and not parallel.isdigit():
        raise ValueError(f"the number of decoder steps in a batch follows the @; got {text!r}")
    plan = load_plan(spec, steps, int(parallel or 1), propagate or None, RunFacts({"sampler": "ddim"}, calibrations))
    if not isinstance(plan, Plan):
        raise ValueError(f"{spec} decides during a run; its cost is not known before")
    return plan


def latent_size(args: argparse.Namespace, params: Mapping[str, Any]) -> tuple[int, int]:
    return tuple(args.size or [params["image_size"]] * 2)


def measure(args: argparse.Namespace, batch: int, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """All rows for one batch size, with what belongs to them."""

    from ldm.checkpoint import diffusion_params
    from ldm.models.diffusion.parallel.compiled import Compiled
    from ldm.modules.packed import pack
    from ldm.profiling.cost import context_tokens, unet_macs
    from ldm.profiling.diffusers_baseline import diffusers_peer
    from ldm.profiling.timing import alternate, matrix_product, peak_memory, seconds_of, shares
    from ldm.profiling.workload import Workload, random_network

    params = diffusion_params(args.config)
    size, network = latent_size(args, params), random_network(params)
    unet = diffusers_peer(params, network) if args.against else None
    tokens = context_tokens(params)
    tokens = tokens and (args.tokens or tokens)
    pack(network.diffusion_model, size, tokens)
    workload = Workload.of(params, network, size, batch, tokens, args.steps)
    unit = unet_macs(network.diffusion_model, size, 2, tokens)

    product, operations = matrix_product()
    calls = {MATRIX: product} | {name: lambda plan=plan: workload.run(plan) for name, plan in plans.items()}
    result: dict[str, Any] = {"batch": batch}
    if args.compile:
        other = replace(workload, network=Compiled(network))
        calls |= {name + COMPILED: lambda plan=plan: other.run(plan) for name, plan in plans.items()}
        plans = {**plans, **{name + COMPILED: plan for name, plan in plans.items()}}
        result["compile_seconds"] = sum(seconds_of(calls[name]) for name in plans if name.endswith(COMPILED))
    if unet is not None:
        others, facts = against(unet, workload, args.compile)
        calls, result = calls | others, result | facts
    peaks = {name: peak_memory(call) for name, call in calls.items()}
    taken = alternate(calls, args.repeats)
    rate = operations / taken.pop(MATRIX).median
    rows = [
        row(name, batch, seconds, plans.get(name), taken, unit, peaks[name], args.steps)
        for name, seconds in taken.items()
    ]
    one = plain_plan(1)
    single = Workload(params, network, workload.x, workload.context, 1)
    plain = 2 * batch * unit.plain(args.steps) / taken["off"].median if "off" in taken else None
    return result | {
        "matmul_flops": rate,
        "plain_flops": plain,
        "shares": shares(lambda: single.run(one)),
        "rows": [asdict(r) for r in rows],
    }


def against(unet: Any, workload: Workload, compile: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The plain run by diffusers, as it is fastest, and what to tell of it."""
    from ldm.profiling.diffusers_baseline import fastest
    from ldm.profiling.timing import seconds_of

    peer = fastest(unet, workload)
    difference = (peer.run(workload) - workload.run(plain_plan(workload.steps))).abs().max()
    calls, facts = {PEER: lambda: peer.run(workload)}, {"peer": peer.setting, "difference": float(difference)}
    if compile:
        compiled = peer.compiled()
        calls[PEER + COMPILED] = lambda: compiled.run(workload)
        facts["peer_compile_seconds"] = seconds_of(calls[PEER + COMPILED])
    return calls, facts


def plain_plan(steps: int) -> Plan:
    from ldm.models.diffusion.propagation.load import load_plan

    return load_plan("off", steps)


def row(
    name: str,
    batch: int,
    seconds: Seconds,
    plan: Plan | None,
    taken: Mapping[str, Seconds],
    unit: Any,
    peak: int,
    steps: int,
) -> Row:
    each, spread = seconds.median / batch, seconds.spread
    if plan is None:
        return Row(name, batch, each, spread, None, None, None, peak)
    share, saved = unit.run(plan) / unit.plain(steps), None
    plain = "off" + COMPILED if name.endswith(COMPILED) else "off"
    if plain in taken and share < 1:
        saved = (1 - seconds.median / taken[plain].median) / (1 - share)
    return Row(name, batch, each, spread, unit.run(plan), unit.critical_path(plan), saved, peak)


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines for one batch size."""
    yield (
        f"batch {result['batch']:<20}{'s/picture':>10}{'spread':>8}{'GMAC':>9}{'critical':>10}"
        f"{'saved/MACs':>12}{'peak MB':>9}"
    )
    for r in result["rows"]:
        cells = [f"{r['seconds']:>10.3f}{r['spread']:>8.1%}"]
        for value, form in (
            (r["macs"] and r["macs"] / 1e9, ">9.1f"),
            (r["critical_path"] and r["critical_path"] / 1e9, ">10.1f"),
            (r["saved"], ">12.1%"),
            (r["peak"] and r["peak"] / 2**20, ">9.0f"),
        ):
            cells.append(f"{'':{form.split('.')[0]}}" if value is None else f"{value:{form}}")
        yield f"{r['name']:<26}" + "".join(cells)
    rate = result["matmul_flops"]
    yield f"float32 matrix product: {rate / 1e9:.1f} GFLOP/s"
    if result["plain_flops"]:
        yield f"plain run: {result['plain_flops'] / 1e9:.1f} GFLOP/s, {result['plain_flops'] / rate:.0%} of that"
    yield "time of a plain step: " + ", ".join(f"{kind} {share:.1%}" for kind, share in result["shares"].items())
    if "compile_seconds" in result:
        yield f"compiling, with the first runs: {result['compile_seconds']:.0f} s"
    if "peer" in result:
        yield f"diffusers: {result['peer']}; largest difference of the latents {result['difference']:.1e}"
        seconds = {r["name"]: r["seconds"] for r in result["rows"]}
        for kind in ("", COMPILED):
            if {"off" + kind, PEER + kind} <= {*seconds}:
                yield f"plain / diffusers{kind}: {seconds['off' + kind] / seconds[PEER + kind]:.2f}"


def run(args: argparse.Namespace) -> None:
    import torch

    from ldm.checkpoint import diffusion_params
    from ldm.checkpoint.conversion import ConversionError
    from ldm.io.files import atomic_write
    from ldm.profiling.timing import machine

    with blame("--rows"):
        plans = {name: read_row(name, args.steps, Path(args.config).parent / "calibration") for name in args.rows}
    with blame("--config"):
        size = latent_size(args, diffusion_params(args.config))
    check_output(args.json, "--json")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    about = machine() | {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "config": args.config,
        "size": list(size),
        "steps": args.steps,
        "repeats": args.repeats,
        "command": shlex.join(sys.argv),
    }
    if args.compile:
        from ldm.models.diffusion.parallel.compiled import check_compiler

        with blame("--compile"):
            check_compiler()
    if args.against:
        with blame("--against", (ImportError,)):
            import diffusers
        about["diffusers"] = diffusers.__version__
    print(
        f"{about['processor']}, {about['threads']} threads, torch {about['torch']}; {args.config}, latents "
        f"{size[0]} x {size[1]}, {args.steps} DDIM steps, guided, float32, random weights; median of {args.repeats}"
    )
    results = []
    with blame("--config, --size", (ValueError, TypeError, KeyError)), blame("--against", (ConversionError,)):
        for batch in args.batch:
            results.append(measure(args, batch, plans))
            print("\n" + "\n".join(table(results[-1])), flush=True)
    if args.json:
        with blame("--json", (OSError,)), atomic_write(args.json) as temporary:
            temporary.write_text(json.dumps(about | {"results": results}, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    return command("benchmark.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
