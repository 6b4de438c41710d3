"""Seconds per image of scripts/txt2img.py, each run in a new process: the first image and further ones.

    python scripts/benchmark_images.py
    python scripts/benchmark_images.py --images 1 --rows off faster-diffusion faster-diffusion@1 auto:9
    python scripts/benchmark_images.py -- --config configs/CONFIG.yaml --ckpt MODEL.safetensors --steps 20

A row is PLAN or PLAN@PARALLEL, as --plan and --parallel of txt2img.py take them. The rows take turns, each time in a
new process, so that other programs on the machine slow down all of them alike. A process makes several batches of
images, one after the other. The first batch is what a user waits for who starts the script once; it includes all that
is done for the first time. The median of the other batches is the steady state. The time is that of sampling, from the
text to the image, without the start of Python and the loading of the model. The table shows medians over the processes,
and the time of the first row as a multiple of each other row's. All options after -- go to txt2img.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from ldm.cli.parser import Parser, check_output, count, profiling, run_command
from ldm.io.errors import BadInput
from ldm.io.files import atomic_write, parse_json_lines, read_text

SCRIPT = Path(__file__).resolve().with_name("txt2img.py")
ROWS = ["off", "faster-diffusion"]
# (seconds per image of the first batch, and of a further one) of each process
Times = list[tuple[float, float]]


def parser() -> Parser:
    p = Parser(prog="benchmark_images.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"see above (default: {' '.join(ROWS)})")
    p.add_argument(
        "--images",
        nargs="+",
        type=count,
        default=[1, 4, 16],
        metavar="N",
        help="images in a batch, one table for each number (default: 1 4 16)",
    )
    p.add_argument(
        "--further", type=count, default=3, metavar="N", help="batches of a process after its first (default: 3)"
    )
    p.add_argument("--repeats", type=count, default=5, metavar="N", help="processes of each row (default: 5)")
    p.add_argument("--json", metavar="FILE", help="write all times to this file, too")
    p.add_argument("options", nargs="*", metavar="-- OPTION", help="for txt2img.py")
    return p


def flags(row: str) -> list[str]:
    """A row as arguments of txt2img.py."""
    plan, _, parallel = row.partition("@")
    return ["--plan", plan, *(["--parallel", parallel] if parallel else [])]


def one_process(row: str, images: int, further: int, options: Sequence[str]) -> tuple[float, float]:
    """Seconds per image of the first batch of a new process, and the median of its further ones.

    Raises:
        BadInput: txt2img.py refuses the row or the options, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = [
            sys.executable,
            str(SCRIPT),
            *options,
            *flags(row),
            "--n_samples",
            str(images),
            "--n_iter",
            str(further + 1),
            "--outdir",
            folder,
            "--skip_grid",
        ]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise BadInput(f"--rows {row}: {said[-1]}")
        entries = parse_json_lines(read_text(Path(folder) / "manifest.jsonl"))
    seconds = [entry["seconds"] for _, entry in entries[::images]]  # the images of a batch say the same
    return seconds[0], statistics.median(seconds[1:])


def measure(rows: Sequence[str], images: int, further: int, repeats: int, options: Sequence[str]) -> dict[str, Times]:
    """All processes of every row, in turn."""
    times: dict[str, Times] = {row: [] for row in rows}
    for _ in range(repeats):
        for row in times:
            times[row].append(one_process(row, images, further, options))
    return times


def table(images: int, times: Mapping[str, Times]) -> str:
    """The medians of one batch size, and the first row's as multiples of the others'."""
    medians = {row: [statistics.median(column) for column in zip(*each, strict=True)] for row, each in times.items()}
    (base, plain), *others = medians.items()
    width = max(map(len, [*medians, *(f"{base} / {row}" for row, _ in others)])) + 2
    lines = [f"{f'images: {images}':{width}}{'first, s':>10}{'further, s':>12}"]
    lines += [f"{row:{width}}{first:>10.3f}{further:>12.3f}" for row, (first, further) in medians.items()]
    lines += [
        f"{f'{base} / {row}':{width}}{plain[0] / first:>10.2f}{plain[1] / further:>12.2f}"
        for row, (first, further) in others
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    check_output(args.json, "--json")
    about = profiling.timing.machine()
    print(
        f"{about['processor']}, {about['instructions']}, {about['threads']} threads, torch {about['torch']}; seconds "
        f"per image, medians of {args.repeats} processes; further: median of {args.further} batches"
    )
    results = {}
    for images in args.images:
        results[images] = measure(args.rows, images, args.further, args.repeats, args.options)
        print("\n" + table(images, results[images]), flush=True)
    if args.json:
        with atomic_write(args.json) as temporary:
            temporary.write_text(
                json.dumps(about | {"options": args.options, "seconds": results}, indent=1) + "\n", encoding="utf-8"
            )


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
