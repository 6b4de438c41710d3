"""Choose the key timesteps of one model and sampler by measurement.

    python scripts/calibrate_plan.py --level skip --keys 10 --out my-plan.yaml
    python scripts/txt2img.py --plan my-plan.yaml --compare

Along plain runs of some prompts, or of classes of a class-conditional model, the script measures, at every step, what
the values of every earlier step would do to the latents in place of its own. From that it finds the key timesteps
with the least total error, for every level (encoder, deepcache, skip), some forecasters and every number of them, by
dynamic programming. Then it makes whole runs: for each --level and each number of --keys it compares the forecasters,
and moves single key timesteps as long as the final latents come closer to those of the plain run. With --out it
writes only that plan. Without --out it writes all key timesteps to the folder of the weights
(calibration/SAMPLER-STEPS-scaleSCALE.json), where --plan auto:K, skip:auto:K, deepcache:auto:K and auto:SHARE% of the
sampling scripts find them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from ldm.cli.arguments import EMOJI64, model_arguments, sampling_arguments, seed_argument
from ldm.cli.parser import Parser, check_output, cli, count, number, run_command, settings_from
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.propagation.plan import MEASURED

PROMPTS = EMOJI64[0].parent / "prompts.txt"


def parser() -> Parser:
    p = Parser(prog="calibrate_plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to find")
    size = what.add_mutually_exclusive_group()
    size.add_argument(
        "--keys",
        type=count,
        nargs="+",
        default=[9],
        metavar="K",
        help="number of key timesteps, or several (default: 9)",
    )
    size.add_argument(
        "--macs",
        type=number(float, 0, 1, "a number in 0..1"),
        metavar="SHARE",
        help="instead of --keys: as many key timesteps as this share of the plain run's MACs allows",
    )
    what.add_argument(
        "--level",
        nargs="+",
        choices=MEASURED,
        default=["encoder"],
        help="what runs at the other steps, one or more: encoder = the decoder, deepcache = the outermost blocks, "
        "skip = nothing; for each of them whole runs are made (default: encoder)",
    )
    what.add_argument(
        "--forecast",
        nargs="+",
        metavar="NAME",
        help="the forecasters to try at each --level, NAME[:AXIS], with skip NAME[:AXIS]:eps; see txt2img.py --help "
        "(default: quadratic, linear and hold, with skip quadratic in eps along log-SNR and along the timestep)",
    )
    what.add_argument(
        "--out",
        metavar="FILE.yaml",
        help="write only the plan, to this file (default: write all key timesteps, to the folder of the weights)",
    )
    what.add_argument(
        "--from-file",
        default=str(PROMPTS),
        metavar="FILE",
        help="text file with the prompts to measure with, one per line (default: those of emoji64); not read for a "
        "class-conditional model, of which classes are taken evenly",
    )
    what.add_argument(
        "--n_samples",
        type=count,
        default=8,
        metavar="N",
        help="images to measure with, one for each of the first prompts, or of as many classes (default: %(default)s)",
    )
    seed_argument(what)
    sampling_arguments(p)
    model_arguments(p, EMOJI64)
    p.set_defaults(plan="off", propagate=None, error_budget=None, parallel=None, tome=0.0)
    p.set_defaults(noise_weight=0.0, noise_below=500.0, noise_order="before")
    return p


def run(args: argparse.Namespace) -> None:
    check_output(args.out)
    if args.out and len(args.level) * (len(args.keys) if args.macs is None else 1) > 1:
        raise SettingError("out", "a plan file is of one --level and one number of --keys; got several")
    found = cli.calibrate.calibrate_model(
        settings_from(args, cli.settings.ModelSettings),
        settings_from(args, cli.settings.SamplingSettings),
        settings_from(args, cli.calibrate.CalibrationSettings),
        keep=args.out is None,
    )
    print("\n".join(map(str, found.found)))
    if args.out:
        with fault_of("out"):
            cli.calibrate.write_plan(args.out, found.found[0], found.calibration)
        print(f"plan: {args.out}")
        return
    with fault_of("ckpt", (OSError,)):
        found.calibration.save(found.file)
    print(f"calibration: {found.file}")


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
