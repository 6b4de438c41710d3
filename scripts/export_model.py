"""Write the weights of a training run as a model file that sampling loads.

    python scripts/export_model.py logs/emoji64-kl-f8 --out logs/emoji64-kl-f8/model.safetensors --normalize
    python scripts/export_model.py logs/emoji64 --out models/ldm/emoji64/model.safetensors --dtype fp16

The file of a diffusion model holds its averaged weights. Of a training that teaches a model something it holds what
txt2img.py takes as --lora, --embedding or --delta. With --normalize the latents of a first stage have mean 0
and variance 1 over the training images. --part writes one part of a model file, for example the first stage of a
shipped model, to continue its training.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from ldm.cli.parser import Parser, run_command

DTYPES = {"fp16": "float16", "fp32": "float32"}


def parser() -> Parser:
    p = Parser(prog="export_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="log folder of main.py, or a state in it (best.ckpt); with --part a model file")
    p.add_argument("--out", required=True, metavar="FILE", help="file to write: .safetensors; a delta is .bin or .ckpt")
    p.add_argument("--dtype", choices=DTYPES, default="fp32", help="precision of the weights (default: %(default)s)")
    p.add_argument("--normalize", action="store_true", help="normalize the latents of a first stage")
    p.add_argument("--part", metavar="NAME", help="one part of a model file, for example first_stage_model")
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.training.export import export

    count = export(args.source, args.out, args.part, args.normalize, DTYPES[args.dtype])
    print(f"{args.out}: {count} tensors, {Path(args.out).stat().st_size / 1e6:.1f} MB")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
