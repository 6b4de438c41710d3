"""What this machine can run, which published models are here, and whether a config and a checkpoint belong together.

    python scripts/doctor.py
    python scripts/doctor.py --config configs/stable-diffusion/v2-inference.yaml --ckpt model.ckpt

Each FAULT comes with a hint how to fix it. The exit code is 1 if there is a FAULT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ldm.cli.installation import Finding, packages
from ldm.cli.parser import Parser, cli, run_command
from ldm.io.errors import SettingError


def parser() -> Parser:
    p = Parser(prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", metavar="YAML", help="a model's config, to be compared with a checkpoint")
    p.add_argument(
        "--ckpt",
        metavar="FILE",
        help="the checkpoint, or diffusers folder, or alone that of a stage of DeepFloyd-IF; "
        "without --config or --ckpt the script looks for the file that fits",
    )
    p.add_argument(
        "--verify", action="store_true", help="read the published models that are here and check their SHA-256"
    )
    return p


def shown(findings: Iterable[Finding]) -> bool:
    """Print what is found; whether there is a fault."""
    fault = False
    for finding in findings:
        print(finding, flush=True)
        fault |= finding.kind == "FAULT"
    return fault


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 if there is a fault."""
    pair = args.config is not None or args.ckpt is not None
    if args.verify and pair:
        raise SettingError("verify", "not with --config or --ckpt; it is for the published models that are here")
    # What is said of the packages does not need them.
    fault = False if pair else shown(packages())

    if args.config is None and args.ckpt is not None and cli.examine.is_stage(Path(args.ckpt)):
        return int(shown(cli.examine.examine_stage(Path(args.ckpt))))
    if pair:
        return int(shown(cli.examine.examine(*cli.setup.model_files(args.config, args.ckpt))))
    return int(shown(cli.examine.machine(args.verify)) or fault)


main = partial(run_command, parser(), run)

if __name__ == "__main__":
    sys.exit(main())
