"""Convert the weights of Stable Diffusion 1 or 2 between a CompVis checkpoint and a folder of the diffusers library.

    python scripts/convert.py FOLDER --to ldm --out model.safetensors
    python scripts/convert.py model.ckpt --config configs/CONFIG.yaml --to diffusers --out FOLDER

The folder has unet/, vae/ and text_encoder/, each with its config.json. One that is written also has scheduler/, for
the noise schedule and what the network predicts; a tokenizer is not part of a checkpoint, so there is none.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="diffusers folder, or checkpoint (.safetensors or .ckpt)")
    parser.add_argument("--to", required=True, choices=("ldm", "diffusers"), help="the layout to write")
    parser.add_argument("--out", required=True, help="file (.safetensors) or new folder to write")
    parser.add_argument("--config", metavar="YAML", help="the model's config; for diffusers, whose folder describes it")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        help="for diffusers: averaged or last weights of the UNet (default: auto, averaged if there are any)",
    )
    return parser.parse_args(argv)


def to_ldm(args: argparse.Namespace) -> None:
    from ldm.checkpoint import read_checkpoint, save_weights

    if args.config is not None or args.weights is not None:
        raise BadInput("--config, --weights: only with --to diffusers; a folder describes itself and has no averages")
    with blame("source"):
        if not Path(args.source).is_dir():
            raise BadInput(f"source: {args.source}: no such folder; --to ldm converts a diffusers folder")
        state = read_checkpoint(args.source)
    with blame("--out"):
        save_weights(args.out, state)
    print(f"{args.out}: {len(state)} tensors")


def to_diffusers(args: argparse.Namespace) -> None:
    from ldm.checkpoint import diffusion_params, load_state
    from ldm.checkpoint.conversion import diffusers_configs, is_openclip
    from ldm.checkpoint.conversion import to_diffusers as parts_of

    if args.config is None:
        raise BadInput("--config: needed with --to diffusers, to describe the model in its config.json files")
    with blame("--out"):
        if Path(args.out).exists():
            raise BadInput(f"--out: {args.out} exists; expected a folder to make")
    with blame("--config"):
        params = diffusion_params(args.config)
    with blame("source"):
        state = load_state(args.source, args.weights or "auto")
        parts = parts_of(state)
    with blame("--config", (ValueError, KeyError, TypeError)):
        configs = diffusers_configs(params, parts, is_openclip(state))
    with blame("--out"):
        write_folder(Path(args.out), parts, configs)
    print(f"{args.out}: {', '.join(f'{part}/ {len(weights)} tensors' for part, weights in parts.items())}")


def write_folder(folder: Path, parts: dict[str, dict[str, Any]], configs: dict[str, dict[str, Any]]) -> None:
    """The folder appears whole or not at all."""
    from ldm.checkpoint import PART_FILES, save_weights
    from ldm.io.files import clean, unfinished

    folder.parent.mkdir(parents=True, exist_ok=True)
    clean(folder.parent)
    with unfinished(folder.parent) as place:
        temporary = place / folder.name
        for name, config in configs.items():
            file = "scheduler_config.json" if name == "scheduler" else "config.json"
            (temporary / name).mkdir(parents=True)
            (temporary / name / file).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for part, weights in parts.items():
            save_weights(temporary / part / PART_FILES[part][0], weights)
        temporary.rename(folder)


def run(args: argparse.Namespace) -> None:
    (to_ldm if args.to == "ldm" else to_diffusers)(args)


def main(argv: list[str] | None = None) -> int:
    return command("convert.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
