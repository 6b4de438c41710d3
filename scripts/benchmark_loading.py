"""How long loading a model takes and how much memory, on checkpoints of its shapes filled with random numbers.

    python scripts/benchmark_loading.py --config configs/latent-diffusion/txt2img-1p4B-eval.yaml --dir /var/tmp

Each case loads in a fresh process. The peak is that of the resident memory of the whole process, after every weight
was read once (a mapped file takes no memory before that), against the weights as the model computes with them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame

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


@dataclass(frozen=True)
class Measured:
    """seconds: until the model is there; seconds_read: until each of its weights was read; the rest in bytes."""

    seconds: float
    seconds_read: float
    before: int
    peak: int
    weights: int


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="of the model to measure")
    parser.add_argument(
        "--dir",
        default=tempfile.gettempdir(),
        metavar="DIR",
        help="where to put the checkpoints, one at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--case",
        nargs="+",
        choices=CASES,
        default=list(CASES),
        help="kinds of files, as the model computes in fp32 (default: all)",
    )
    return parser.parse_args(argv)


def peak_resident() -> int:
    """The most memory that this process has held so far, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def make(config: str, path: Path, dtype: str) -> None:
    """Write a checkpoint of random weights in the config's shapes."""
    import torch
    from safetensors.torch import save_file

    from ldm.checkpoint import unmade_model

    torch.manual_seed(0)
    state = {
        key: torch.randn(value.shape).mul_(0.02).to(getattr(torch, dtype)) if value.is_meta else value
        for key, value in unmade_model(config).state_dict().items()
    }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)


def measure(config: str, path: Path) -> Measured:
    from ldm.checkpoint import load_model

    before, began = peak_resident(), time.perf_counter()
    model = load_model(config, path)
    seconds = time.perf_counter() - began
    tensors = model.state_dict().values()
    for tensor in tensors:
        tensor.sum()
    weights = sum(tensor.nbytes for tensor in tensors)
    return Measured(seconds, time.perf_counter() - began, before, peak_resident(), weights)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run(args: argparse.Namespace) -> list[str]:
    """Measure and print; the cases that took more memory than they may."""
    if not STATUS.exists():
        raise BadInput("this system: peak memory is read from /proc/self/status, which only Linux has")
    if not Path(args.dir).is_dir():
        raise BadInput(f"--dir: {args.dir}: no such directory")
    print("case              file GB   load s   + read s   before GB   peak GB   weights GB   peak / weights")
    missed = []
    for name in args.case:
        case = CASES[name]
        with tempfile.TemporaryDirectory(dir=args.dir) as folder, blame("--config"):
            path = Path(folder) / f"model{case.suffix}"
            in_fresh_process(make, args.config, path, case.dtype)
            size, got = path.stat().st_size, in_fresh_process(measure, args.config, path)
        ratio = got.peak / got.weights
        print(
            f"{name:16}{size / 1e9:9.2f}{got.seconds:9.2f}{got.seconds_read:11.2f}{got.before / 1e9:12.2f}"
            f"{got.peak / 1e9:10.2f}{got.weights / 1e9:13.2f}{ratio:10.2f} (at most {case.bar})",
            flush=True,
        )
        missed += [name] if ratio > case.bar else []
    return missed


def main(argv: list[str] | None = None) -> int:
    missed: list[str] = []
    code = command("benchmark_loading.py", lambda: missed.extend(run(arguments(argv))))
    return code or (1 if missed else 0)


if __name__ == "__main__":
    sys.exit(main())
