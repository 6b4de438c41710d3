"""Convert the weights of Stable Diffusion 1, 2 or XL between one file and a folder of the diffusers library.

    python scripts/convert.py FOLDER --to ldm --out model.safetensors
    python scripts/convert.py DiT-XL-2-256x256.pt --to ldm --vae VAE.safetensors --out model.safetensors
    python scripts/convert.py model.ckpt --config configs/CONFIG.yaml --to diffusers --out FOLDER

The folder contains unet/, vae/ and text_encoder/, of SDXL also text_encoder_2/ (of its refiner only that one), each
with its config.json. With --to diffusers it also gets scheduler/, which states the noise schedule and what the network
predicts. It gets no tokenizer, because a checkpoint has none. A published diffusion transformer (DiT) has no first
stage; --vae names the file of the one that is added.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.parser import Parser, run_command
from ldm.io.errors import BadInput, SettingError


def parser() -> Parser:
    p = Parser(prog="convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="diffusers folder, or checkpoint (.safetensors, .ckpt or .pt)")
    p.add_argument("--to", required=True, choices=("ldm", "diffusers"), help="the layout to write")
    p.add_argument("--out", required=True, metavar="PATH", help="file (.safetensors) or new folder to write")
    p.add_argument("--config", metavar="YAML", help="the model's config; only with --to diffusers, which needs it")
    p.add_argument(
        "--vae",
        metavar="FILE",
        help="only with --to ldm and a published DiT: the first stage of Stable Diffusion that goes with it",
    )
    p.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        help="only with --to diffusers: averaged (ema) or last (raw) weights of the UNet (default: auto = averaged if "
        "there are any)",
    )
    return p


def run(args: argparse.Namespace) -> None:
    from ldm.checkpoint.convert import checkpoint_to_folder, folder_to_checkpoint, joined_transformer

    if args.to == "diffusers":
        if args.vae is not None:
            raise SettingError("vae", "only with --to ldm")
        if args.config is None:
            raise SettingError("config", "needed with --to diffusers, to describe the model in its config.json files")
        parts = checkpoint_to_folder(args.source, args.config, args.out, args.weights or "auto")
        print(f"{args.out}: {', '.join(f'{part}/ {count} tensors' for part, count in parts.items())}")
        return
    if args.config is not None or args.weights is not None:
        raise BadInput("--config, --weights: only with --to diffusers")
    if args.vae is None:
        tensors = folder_to_checkpoint(args.source, args.out)
    else:
        tensors = joined_transformer(args.source, args.vae, args.out)
    print(f"{args.out}: {tensors} tensors")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
