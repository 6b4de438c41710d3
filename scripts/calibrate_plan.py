"""Key steps for one model and sampler, chosen by measurement.

    python scripts/calibrate_plan.py --keys 9 --out my-plan.yaml
    python scripts/txt2img.py --plan my-plan.yaml --compare

Along plain runs of some prompts it measures what it costs, at every step, to decode the features of every earlier step,
and finds the key steps with the least total error (dynamic programming, exact). Then it tries what may reach the
decoder between them (--propagate of the sampling scripts) and keeps what comes nearest to the plain latents. With --out
the plan is written there, and nothing else. Without, the table is written beside the weights
(calibration/SAMPLER-STEPS.json), where --plan auto:K or auto:SHARE% of the sampling scripts use it for any number of
key steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.arguments import EMOJI64, count, model_arguments, sampling_arguments, seed_argument
from ldm.cli.inputs import prompts_in
from ldm.cli.parser import Parser, command, number
from ldm.cli.settings import count_nodes, make_recipe, run_facts
from ldm.cli.setup import check_outdir, check_output, make_setup
from ldm.io.errors import BadInput, blame

if TYPE_CHECKING:
    from ldm.models.diffusion.propagation.calibration import Calibration
    from ldm.models.diffusion.propagation.plan import Plan
    from ldm.sampling.engine import Engine

PROMPTS = EMOJI64[0].parent / "prompts.txt"


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="calibrate_plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to find")
    size = what.add_mutually_exclusive_group()
    size.add_argument("--keys", type=count, default=9, metavar="K", help="key steps (default: %(default)s)")
    size.add_argument(
        "--macs",
        type=number(float, 0, 1, "a number in 0..1"),
        metavar="SHARE",
        help="as many key steps as this share of the plain run's MACs allows",
    )
    what.add_argument(
        "--out",
        metavar="FILE.yaml",
        help="write the plan there, and nothing else (default: the table, beside the weights)",
    )
    what.add_argument(
        "--from-file",
        default=str(PROMPTS),
        metavar="FILE",
        help="prompts to measure with, one per line (default: those of emoji64)",
    )
    what.add_argument(
        "--n_samples",
        type=count,
        default=8,
        metavar="N",
        help="pictures to measure with, one of each of the first prompts (default: %(default)s)",
    )
    seed_argument(what)
    sampling_arguments(p)
    model_arguments(p, EMOJI64)
    p.set_defaults(
        outdir=None, plan="off", noise_weight=0.0, noise_below=500.0, noise_order="before", compare=False, tome=0.0
    )
    return p


def make_engine(args: argparse.Namespace) -> tuple[Engine, dict[str, Any], Path]:
    """The model ready for plain runs, what its runs are known by, and where its calibrations lie."""
    from ldm.models.diffusion.propagation.load import load_plan
    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Engine, Task

    setup = make_setup(args, EMOJI64)
    recipe = make_recipe(args, (setup.sizes.default,) * 2, setup)
    plan = load_plan("off", count_nodes(recipe, setup))
    model = setup.load(args.weights)
    facts = run_facts(setup, recipe.sampler)
    with blame("--config"):
        return Engine(model, setup.sizes, recipe, plan, Task(Text())), dict(facts.facts), facts.calibrations


def calibrate(args: argparse.Namespace, engine: Engine, made_for: dict[str, Any]) -> Calibration:
    """Measure picture by picture; the tables are the means."""
    import numpy as np
    from tqdm import tqdm

    from ldm.io.schema import parse
    from ldm.models.diffusion.propagation.calibration import Calibration, measure
    from ldm.sampling.generate import prompt_items

    prompts = prompts_in(args.from_file)[: args.n_samples]
    items = prompt_items(prompts, 1, args.seed, by_position=True)
    tables = []
    for item in tqdm(items, desc="measuring", unit="picture", disable=None):
        tables.append(measure(*engine.plain_run([item])))
    eps, features = (
        [[float(f"{v:.4g}") for v in np.mean(rows, axis=0)] for rows in zip(*table, strict=True)]
        for table in zip(*tables, strict=True)
    )
    unit = engine.unit
    how = {"prompts": len(prompts), "seed": args.seed, "scale": engine.recipe.scale, "eta": engine.recipe.eta}
    measured = {"num_nodes": engine.plan.num_nodes, "eps": eps, "features": features}
    return parse(Calibration, measured | {"encoder": unit.encode / unit.whole, "made_for": made_for, "how": how})


def try_propagations(engine: Engine, plan: Plan, items: Sequence[Any]) -> dict[str, float]:
    """Mean squared error of the final latents to the plain run's, by what reaches the decoder."""
    from dataclasses import replace

    from ldm.models.diffusion.loop import denoise
    from ldm.models.diffusion.propagation.plan import PROPAGATIONS

    def final(candidate: Plan) -> Any:
        *_, state = denoise(model, rule, replace(candidate, parallel=8), x)
        return state.x

    errors = {name: 0.0 for name, degree in PROPAGATIONS.items() if degree >= 0}
    for item in items:
        model, rule, x = engine.plain_run([item])
        plain = final(engine.plan)
        for name in errors:
            errors[name] += float((final(replace(plan, propagate=name)) - plain).square().mean()) / len(items)
    return errors


def run(args: argparse.Namespace) -> None:
    if args.eta:
        raise BadInput(f"--ddim_eta: a calibration is of deterministic runs; expected 0, got {args.eta:g}")
    check_output(args.out)
    engine, made_for, folder = make_engine(args)
    if args.out is None:
        check_outdir(folder, "--ckpt")

    from dataclasses import replace

    from ldm.profiling.plan_table import spans
    from ldm.sampling.generate import prompt_items

    with blame("--ckpt", (ValueError,)):  # predictions that are not finite
        calibration = calibrate(args, engine, made_for)
    with blame("--macs" if args.macs else "--keys"):
        plan = calibration.plan_within(args.macs) if args.macs else calibration.plan(args.keys)
    prompts = prompts_in(args.from_file)[: args.n_samples]
    with blame("--ckpt", (ValueError,)):
        errors = try_propagations(engine, plan, prompt_items(prompts, 1, args.seed, by_position=True))
    best = min(errors, key=errors.get)
    calibration, plan = calibration.model_copy(update={"propagate": best}), replace(plan, propagate=best)
    print(f"key steps of {plan.num_nodes}: {spans(plan.keys)}")
    print("mean squared error of the latents: " + ", ".join(f"{name} {error:.3g}" for name, error in errors.items()))
    if args.out:
        with blame("--out"):
            write_plan(args.out, plan, calibration)
        print(f"plan: {args.out}")
        return
    path = folder / f"{engine.recipe.sampler}-{args.steps}.json"
    with blame("--ckpt", (OSError,)):
        calibration.save(path)
    print(f"table: {path}")


def write_plan(path: str, plan: Plan, calibration: Calibration) -> None:
    """A plan file of `ldm.models.diffusion.propagation.load`, with how it was made."""
    import yaml

    from ldm.io.files import atomic_write

    how = ", ".join(f"{name} {value}" for name, value in calibration.how.items())
    text = yaml.safe_dump(
        {
            "source": "scripts/calibrate_plan.py",
            "note": f"least total error of its number of key steps ({how})",
            "steps": {plan.num_nodes: [*plan.keys]},
            "propagate": plan.propagate,
            "made_for": calibration.made_for,
        },
        sort_keys=False,
        default_flow_style=None,
        width=100,
    )
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("calibrate_plan.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
