"""What a run of a model's UNet costs in multiply-accumulates (MACs), per kind of node and in all.

    python evaluation/cost.py --config configs/stable-diffusion/v1-inference.yaml --steps 50 20

Two counts: "exact" has both matrix products of attention; "paper" is how the numbers of Faster Diffusion
(arXiv 2312.09608) come out, see `ldm.profiling.cost.count_macs`. The critical path is what has to be computed one
after the other when all decoders that share features run at the same time. Nothing is computed, and no weights are
needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import count, side, step_count
from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame
from ldm.io.files import PROJECT_ROOT

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from ldm.models.diffusion.propagation.plan import Plan
    from ldm.profiling.cost import Macs

SD_V1 = PROJECT_ROOT / "configs" / "stable-diffusion" / "v1-inference.yaml"
# Tables 1 and 5, "GFLOPs/image" of Stable Diffusion v1.5, by steps and number of key steps.
PUBLISHED = {(50, 50): 37050, (50, 9): 27350, (20, 20): 14821, (20, 7): 11743, (50, 25): 31011, (50, 5): 26370}
PUBLISHED_SIZE, PUBLISHED_BATCH = [64, 64], 2
AGREES = 0.001


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="of the model")
    parser.add_argument(
        "--plan",
        nargs="+",
        default=["off", "faster-diffusion"],
        metavar="PLAN",
        help="as of the sampling scripts (default: off faster-diffusion)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=step_count,
        default=[50],
        metavar="N",
        help="network evaluations of a run (default: 50)",
    )
    parser.add_argument("--size", nargs=2, type=side, metavar=("H", "W"), help="of the latents (default: the config's)")
    parser.add_argument(
        "--batch", type=count, default=2, help="latents per evaluation; guidance makes 2 of one picture (default: 2)"
    )
    parser.add_argument(
        "--tokens",
        type=count,
        help="of the context, for a UNet that takes one (default: what the config's encoder reads)",
    )
    return parser.parse_args(argv)


def read_unet(path: str | Path) -> tuple[dict[str, Any], int, int | None]:
    """The UNet's config, the side of the latents that the model was trained with, and the tokens of its context."""
    from ldm.checkpoint import diffusion_params
    from ldm.profiling.cost import context_tokens

    params = diffusion_params(path)
    return params["unet_config"], params.get("image_size", 0), context_tokens(params)


def counts(unet: Mapping[str, Any], size: Sequence[int], batch: int, tokens: int | None) -> dict[str, Macs]:
    """Of one evaluation, by convention."""
    from ldm.profiling.cost import CONVENTIONS, unet_macs

    return {name: unet_macs(unet, size, batch, tokens, convention=name) for name in CONVENTIONS}


def published(unet: Mapping[str, Any], size: Sequence[int], batch: int, plan: Plan) -> int | None:
    """The paper's GMACs for this run, if it has such a row."""
    from ldm.models.diffusion.propagation.plan import Compute

    same = (unet, list(size), batch) == (read_unet(SD_V1)[0], PUBLISHED_SIZE, PUBLISHED_BATCH)
    known = same and not plan.refresh and Compute.SHALLOW not in plan.computes()
    return PUBLISHED.get((plan.num_nodes, len(plan.keys))) if known else None


def node_table(units: Mapping[str, Macs], plans: Mapping[str, Plan]) -> Iterator[str]:
    """Lines: what one evaluation costs at each kind of node that the plans have, and what of it is computed once."""
    yield f"{'one evaluation, GMAC':<34}" + "".join(f"{name:>12}" for name in units)
    seen = set()
    for plan in plans.values():
        for work in dict.fromkeys(plan.computes()):
            depth = plan.branch or plan.refresh if work.value != "full" else 0
            label = f"{work.value} node" + (f", {depth} outer blocks" if depth else "")
            if label not in seen:
                seen.add(label)
                yield f"{label:<34}" + "".join(f"{unit.node(work, plan) / 1e9:>12.2f}" for unit in units.values())
    if any(unit.once for unit in units.values()):
        yield f"{'keys and values of the text, once':<34}" + "".join(
            f"{unit.once / 1e9:>12.2f}" for unit in units.values()
        )
    yield f"{'of a decoder, once a key timestep':<34}" + "".join(
        f"{unit.shared / 1e9:>12.2f}" for unit in units.values()
    )


def run_table(units: Mapping[str, Macs], plans: Mapping[str, Plan], paper: Mapping[str, int | None]) -> Iterator[str]:
    """Lines: what whole runs cost, with the paper's number beside where there is one."""
    yield (
        f"{'run, GMAC':<26}{'keys':>5}"
        + "".join(f"{name:>12}{'share':>8}" for name in units)
        + f"{'critical path':>15}{'in the paper':>14}"
    )
    for label, plan in plans.items():
        cells = "".join(
            f"{unit.run(plan) / 1e9:>12.1f}{unit.run(plan) / unit.plain(plan.num_nodes):>8.1%}"
            for unit in units.values()
        )
        line = f"{label:<26}{len(plan.keys):>5}{cells}{units['exact'].critical_path(plan) / 1e9:>15.1f}"
        if paper[label] is None:
            yield line
        else:
            off = units["paper"].run(plan) / 1e9 / paper[label] - 1
            yield f"{line}{paper[label]:>14}  {off:+.2%}" + ("" if abs(off) < AGREES else " DIFFERS")


def run(args: argparse.Namespace) -> None:
    from ldm.models.diffusion.propagation.load import load_plan
    from ldm.models.diffusion.propagation.plan import Plan

    plans: dict[str, Plan] = {}
    with blame("--plan"):
        for steps in args.steps:
            for spec in args.plan:
                plan = load_plan(spec, steps)
                if not isinstance(plan, Plan):
                    raise BadInput(f"--plan: {spec} decides during a run; its cost is not known before")
                plans[f"{spec}, {steps} steps"] = plan
    with blame("--config"):
        unet, side, tokens = read_unet(args.config)
    size, tokens = args.size or [side, side], tokens and (args.tokens or tokens)
    with blame("--config, --size", (ValueError, TypeError, KeyError)):
        units = counts(unet, size, args.batch, tokens)
    print(
        f"{args.config}: UNet on {args.batch} latents of {size[0]} x {size[1]}"
        + (f", {tokens} tokens\n" if tokens else "\n")
    )
    print("\n".join(node_table(units, plans)), end="\n\n")
    paper = {label: published(unet, size, args.batch, plan) for label, plan in plans.items()}
    print("\n".join(run_table(units, plans, paper)))
    print(
        "\nshare: of a run with every node in full. Critical path: exact count. Every decoder counts in full, also the "
        "part that\nis computed once for all nodes with the same features."
    )


def main(argv: list[str] | None = None) -> int:
    return command("cost.py", lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
