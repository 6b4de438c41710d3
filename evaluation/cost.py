"""Count the multiply-accumulates (MACs) of a model's UNet, for each kind of step and for whole runs.

    python evaluation/cost.py --config configs/stable-diffusion/v1-inference.yaml --steps 50 20

There are two counts. "exact" counts both matrix products of attention; "paper" reproduces the numbers of Faster
Diffusion (arXiv 2312.09608), see `ldm.profiling.cost.count_macs`. The critical path is what must be computed one after
the other when all decoders that share features run at the same time. Only the config is read; no weights are needed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.parser import Parser, count, run_command, side, step_count
from ldm.io.errors import flags_named


def parser() -> Parser:
    p = Parser(prog="cost.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "the model's config, or the folder of a stage of DeepFloyd-IF"
    p.add_argument("--config", required=True, metavar="YAML", help=text)
    plans = ["off", "faster-diffusion"]
    text = f"plans, as the sampling scripts take them (default: {' '.join(plans)})"
    p.add_argument("--plan", nargs="+", default=plans, metavar="PLAN", help=text)
    text = "number of predictions of the network in a run (default: 50)"
    p.add_argument("--steps", nargs="+", type=step_count, default=[50], metavar="N", help=text)
    p.add_argument("--size", nargs=2, type=side, metavar=("H", "W"), help="size of the latents (default: the config's)")
    text = "batch size of the network; with guidance an image needs 2 (default: 2)"
    p.add_argument("--batch", type=count, default=2, help=text)
    text = "tokens of the context, for a UNet with cross-attention (default: those of the config's text encoder)"
    p.add_argument("--tokens", type=count, help=text)
    return p


def run(args: argparse.Namespace) -> None:
    from evaluation.table.cost import report

    with flags_named({"size": "--config, --size"}):
        print("\n".join(report(args.config, args.plan, args.steps, args.size, args.batch, args.tokens)))


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
