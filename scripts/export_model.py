"""Write the weights of a training run as a model file that sampling loads.

    python scripts/export_model.py logs/emoji64-kl-f8 --out logs/emoji64-kl-f8/model.safetensors --normalize
    python scripts/export_model.py logs/emoji64 --out models/ldm/emoji64/model.safetensors --dtype fp16

A diffusion model is written with its averaged weights in place; a first stage with --normalize is written so
that its latents have mean 0 and variance 1 over the training pictures. --part takes one part
out of a model, for example the first stage of a shipped model to go on training with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame

if TYPE_CHECKING:
    from torch import Tensor


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="log folder of main.py, or (with --part) a model file")
    parser.add_argument("--out", required=True, help="file to write (.safetensors)")
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp32", help="default: %(default)s")
    parser.add_argument("--normalize", action="store_true", help="first stage: fold the latents' statistics in")
    parser.add_argument("--part", metavar="NAME", help="one part of a model file, for example first_stage_model")
    return parser.parse_args(argv)


def weights_of(args: argparse.Namespace) -> dict[str, Tensor]:
    from ldm.checkpoint import load_config, read_checkpoint
    from ldm.training.export import normalized_first_stage, sampling_weights
    from ldm.training.state import LAST, read_state

    source = Path(args.source)
    if args.part:
        prefix = args.part + "."
        state = {k.removeprefix(prefix): v for k, v in read_checkpoint(source).items() if k.startswith(prefix)}
        if not state:
            raise BadInput(f"--part: {source} has no weights named {prefix}*")
        return state
    weights = sampling_weights(read_state(source / LAST)["state_dict"])
    if args.normalize:
        return normalized_first_stage(load_config(source / "config.yaml"), weights)
    return weights


def run(args: argparse.Namespace) -> None:
    import torch

    from ldm.checkpoint import save_weights

    with blame("source"):
        state = weights_of(args)
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    # The schedule's buffers, which have no dot in their names, stay exact: rounded, they would change every sample.
    state = {k: v.to(dtype) if v.is_floating_point() and "." in k else v for k, v in state.items()}
    with blame("--out"):
        save_weights(args.out, state)
    print(f"{args.out}: {len(state)} tensors, {Path(args.out).stat().st_size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    return command("export_model.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
