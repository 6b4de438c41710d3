"""How long loading a model takes and how much memory, on checkpoints of its shapes filled with random numbers.

    python scripts/benchmark_loading.py --config configs/latent-diffusion/txt2img-1p4B-eval.yaml --dir /var/tmp

Each case loads in a new process. The peak is the resident memory of the whole process after every weight was read
once, because a mapped file takes no memory before that. It is compared with the size of the weights as the model
computes with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ldm.cli.parser import Parser, profiling, run_command
from ldm.io.errors import BadInput, SettingError, fault_of

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Case:
    """A kind of file, and how much memory loading it may take, as a multiple of the weights."""

    suffix: str
    dtype: str
    bar: float


CASES = {
    "fp32.safetensors": Case(".safetensors", "float32", 1.25),
    "fp32.ckpt": Case(".ckpt", "float32", 1.6),
    "fp16.safetensors": Case(".safetensors", "float16", 1.25),
    "fp16.ckpt": Case(".ckpt", "float16", 1.6),
}


def parser() -> Parser:
    p = Parser(prog="benchmark_loading.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, metavar="YAML", help="the config of the model")
    p.add_argument(
        "--dir",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="folder for the checkpoints, which exist one at a time (default: %(default)s)",
    )
    p.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="kinds of files to load; the model computes in fp32 (default: all)",
    )
    return p


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a case took more memory than it may."""
    if not STATUS.exists():
        raise BadInput("this system: peak memory is read from /proc/self/status, which only Linux has")
    if not Path(args.dir).is_dir():
        raise SettingError("dir", f"{args.dir}: no such directory")
    print("case              file GB   load s   + read s   before GB   peak GB   weights GB   peak / weights")
    missed = False
    for name in args.case:
        case = CASES[name]
        with fault_of("config"):
            got = profiling.loading.measure_loading(args.config, case.suffix, case.dtype, args.dir)
        ratio = got.peak / got.weights
        print(
            f"{name:16}{got.file / 1e9:9.2f}{got.seconds:9.2f}{got.seconds_read:11.2f}{got.before / 1e9:12.2f}"
            f"{got.peak / 1e9:10.2f}{got.weights / 1e9:13.2f}{ratio:10.2f} (at most {case.bar})",
            flush=True,
        )
        missed |= ratio > case.bar
    return int(missed)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
