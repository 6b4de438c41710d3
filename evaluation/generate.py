"""Make the images of a protocol, on one machine or many.

    python evaluation/generate.py --protocol emoji64 --plan faster-diffusion --out outputs/emoji64-fast

An image depends on the protocol, its prompt, the number of its repeat, the model and the method. The same command
continues a stopped run. --verify reads the whole folder again and checks that every image exists once and is complete.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.protocols.protocol import Method, Protocol, load_protocol, protocol_names
from ldm.cli.arguments import model_arguments, node_arguments, propagation_arguments
from ldm.cli.parser import GO_ON, MOST, Parser, check_outdir, count, number, run_command, settings_from, whole
from ldm.cli.settings import ModelSettings
from ldm.io.errors import BadInput, fault_of, flags_named

if TYPE_CHECKING:
    from evaluation.runs.generate import Run

MOST_DEVICES = 1024  # of a machine; as many machines


def parser() -> Parser:
    p = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--protocol", metavar="NAME", help=f"the protocol: {', '.join(protocol_names())}; or FILE.yaml")
    text = "folder with the data of the protocol (default: the one that it names)"
    what.add_argument("--data", metavar="DIR", help=text)
    text = "use only the first N prompts of the protocol; this is another protocol, with another hash"
    what.add_argument("--count", type=count, metavar="N", help=text)
    how = p.add_argument_group("how to sample (default: as the protocol says)")
    how.add_argument("--sampler", help="name of the solver")
    node_arguments(how, ("--steps",), None, "(default: the protocol's)")
    text = "noise of the ddim sampler: 0 = deterministic, 1 = ancestral sampling"
    how.add_argument("--eta", type=number(float, 0, 1, "a number in 0..1"), metavar="ETA", help=text)
    propagation_arguments(p, "off", below=None, order=None, compare=False)
    model_arguments(p, note="default: the protocol's")
    where = p.add_argument_group("one machine or many")
    usual = "(default: as torchrun or SLURM says, or 1)"
    for flag, text in {
        "--devices": f"number of processes on each machine, one device each {usual}",
        "--num_nodes": f"number of machines {usual}",
    }.items():
        where.add_argument(flag, type=whole(1, MOST_DEVICES), metavar="N", help=text)
    text = "auto = ddp if there are several processes (default: auto)"
    where.add_argument("--strategy", choices=("auto", "ddp"), default="auto", help=text)
    text = "make only part K of N parts, for machines that are not connected"
    where.add_argument("--shard", type=shard, default=(0, 1), metavar="K/N", help=text)
    text = (
        "images at a time on a GPU (default: as in the folder, or 16); on a CPU the size of the latents determines it"
    )
    where.add_argument("--batch_size", type=count, metavar="N", help=text)
    out = p.add_argument_group("output")
    out.add_argument("--out", "--outdir", metavar="DIR", help="folder of the run")
    text = "when all images are made, also write them to samples.npz, the format of the ADM suite"
    out.add_argument("--npz", action="store_true", help=text)
    out.add_argument("--verify", action="store_true", help="make no images; read the whole folder and check it")
    return p


def shard(text: str) -> tuple[int, int]:
    """argparse type of --shard: 2/8 -> (1, 8)."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= MOST):
        raise argparse.ArgumentTypeError(f"expected K/N, part K of 1..N, and N at most {MOST}; got {text!r}")
    return int(part) - 1, int(parts)


def asked(args: argparse.Namespace) -> tuple[Protocol, Method]:
    """What to make, and how."""
    if args.protocol is None:
        raise BadInput(f"--protocol: needed; accepted: {', '.join(protocol_names())}, or FILE.yaml")
    with fault_of("protocol"):
        protocol = load_protocol(args.protocol).first(args.count)
    return protocol, protocol.method(**{field.name: getattr(args, field.name) for field in fields(Method)})


def verify(outdir: Path) -> None:
    from evaluation.runs.generate import RunFolder, some

    with fault_of("verify"):
        folder = RunFolder(outdir)
        faults = folder.faults()
    if faults:
        raise BadInput(f"--verify: {outdir}: {some(faults)}")
    print(
        f"{len(folder.items)} images, each there, whole and once; {folder.card['name']}, "
        f"protocol {folder.card['protocol_sha256'][:16]}"
    )


def run(args: argparse.Namespace) -> None:
    if args.out is None:
        raise BadInput("--out: needed: the folder of the run")
    if args.verify:
        return verify(Path(args.out))
    protocol, method = asked(args)

    from evaluation.runs import generate, models, processes

    # What is quick to check comes before other processes start, and before what is slow to load.
    with flags_named({"count": "--protocol"}) if args.count is None else nullcontext():
        prompts = generate.chosen_prompts(protocol, args.data)
    check_outdir(Path(args.out), "--out")
    files = models.model_files(settings_from(args, ModelSettings), protocol)
    request = generate.prepare(protocol, method, files, prompts, args.data)
    process = processes.join(args.device, args.devices, args.num_nodes, args.strategy, args.shard)
    began = time.perf_counter()
    done = generate.make(request, Path(args.out), process, args.batch_size)
    report(done, str(process), process.rank == 0, args.npz, time.perf_counter() - began)


def report(done: Run, process: str, first: bool, npz: bool, seconds: float) -> None:
    """Say what was made; `first`: this is the first of the run's processes."""
    if first:
        print("\n".join(done.notes), end="\n" if done.notes else "")
    # Of several processes that find all images there, those that made none leave it to the first.
    if done.complete and npz and (done.made or first):
        with fault_of("npz", (OSError,)):
            print(f"arrays: {done.folder.write_npz()}")
    replaced = f" ({done.replaced} of them in place of files that were damaged or changed)" if done.replaced else ""
    print(
        f"{process}: {done.made} made{replaced}, {done.found} found in {seconds:.1f} s; {done.folder.path}: "
        f"{'complete' if done.complete else done.folder.unfinished()}"
    )


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
