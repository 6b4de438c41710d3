"""The pictures that a protocol asks for, on one machine or many.

    python evaluation/generate.py --protocol emoji64 --plan faster-diffusion --out outputs/emoji64-fast

A picture depends on the protocol, its prompt, the number of its repeat, the model and the method. The same command
goes on after any stop; --verify reads everything again and says whether each picture is there, whole, once.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.protocols.protocol import Protocol, load_protocol, protocol_names
from evaluation.runs.processes import MOST_DEVICES, Process, join, shard
from ldm.cli.arguments import ROOT, count, model_arguments, propagation_arguments, step_count
from ldm.cli.parser import GO_ON, Parser, command, number, settings_from, whole
from ldm.io.errors import BadInput, SettingError, blame
from ldm.io.files import json_sha256

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image

    from evaluation.protocols.prompts import Prompt
    from evaluation.runs.folder import RunFolder
    from ldm.cli.setup import Setup
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.sampling.engine import Engine, Task
    from ldm.sampling.generate import Item

BATCH = 16
# Last digits depend on how much is computed at a time, and by how many threads: on a CPU both are fixed, so that files
# do not depend on them. Larger batches gain nothing there, nor do threads where there can be processes.
CPU_BATCH, CPU_LATENTS, CPU_THREADS = 8, 512, 1  # most pictures, most positions of their latents


# The command line


def parser() -> Parser:
    p = Parser(prog="generate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what to make")
    what.add_argument("--protocol", metavar="NAME", help=f"{', '.join(protocol_names())}; or FILE.yaml")
    what.add_argument("--data", metavar="DIR", help="folder of the protocol's data (default: the protocol's)")
    what.add_argument(
        "--count",
        type=count,
        metavar="N",
        help="only the first N of the protocol's prompts; another protocol, by its hash",
    )
    how = p.add_argument_group("how to sample (default: as the protocol says)")
    how.add_argument("--sampler", default="ddim", help="name of the solver")
    how.add_argument("--steps", type=step_count, default=50, metavar="N", help="sampling steps")
    how.add_argument("--eta", type=number(float, 0, 1, "a number in 0..1"), metavar="ETA", help="noise of ddim")
    propagation_arguments(p, "off", compare=False)
    model_arguments(p, note="default: the protocol's")
    where = p.add_argument_group("one machine or many")
    where.add_argument(
        "--devices",
        type=whole(1, MOST_DEVICES),
        metavar="N",
        help="processes on each machine, one device each (default: what torchrun or SLURM says, or 1)",
    )
    where.add_argument(
        "--num_nodes",
        type=whole(1, MOST_DEVICES),
        metavar="N",
        help="machines (default: what torchrun or SLURM says, or 1)",
    )
    where.add_argument(
        "--strategy",
        choices=("auto", "ddp"),
        default="auto",
        help="auto = ddp if there are several processes (default: auto)",
    )
    where.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="K/N", help="only part K of 1..N, for machines that never meet"
    )
    where.add_argument(
        "--batch_size",
        type=count,
        metavar="N",
        help=f"pictures at a time on a GPU, where it belongs to the run (default: the folder's, or "
        f"{BATCH}); on a CPU what is computed at a time follows from the size of the latents alone",
    )
    out = p.add_argument_group("output")
    out.add_argument("--out", "--outdir", dest="outdir", metavar="DIR", help="folder of the run")
    out.add_argument(
        "--npz",
        action="store_true",
        help="when all pictures are there write them into samples.npz, as the ADM suite reads them",
    )
    out.add_argument("--verify", action="store_true", help="make nothing; read the whole folder again and judge it")
    # What the protocol decides, or a run has no choice of.
    p.set_defaults(default_eta=0.0, guidance_interval=None, guidance_reuse=False)
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Protocol | None]:
    """The arguments, whose defaults are the protocol's; and the protocol."""
    p = parser()
    args = p.parse_args(argv)
    if args.outdir is None:
        raise BadInput("--out: needed: the folder of the run")
    if args.verify:
        return args, None
    if args.protocol is None:
        raise BadInput(f"--protocol: needed; accepted: {', '.join(protocol_names())}, or FILE.yaml")
    with blame("--protocol"):
        protocol = load_protocol(args.protocol)
    if args.count is not None:
        protocol = replace(protocol, select=replace(protocol.select, count=args.count))
    own = {name: value for name, value in protocol.defaults.items() if name not in ("config", "ckpt")}
    p.set_defaults(**own, **vars(protocol.sampling), scale=protocol.guidance)
    return p.parse_args(argv), protocol


# What to make, and with what


def select_prompts(args: argparse.Namespace, protocol: Protocol) -> list[Prompt]:
    from evaluation.protocols.prompts import choose, read_prompts

    with blame("--data"):
        prompts = read_prompts(protocol, protocol.folder(args.data))
    with blame("--protocol" if args.count is None else "--count"):
        return choose(prompts, protocol.select)


def default_model(protocol: Protocol) -> tuple[Path, Path] | None:
    files = [protocol.defaults.get(name) for name in ("config", "ckpt")]
    return None if None in files else (ROOT / files[0], ROOT / files[1])


def task_of(protocol: Protocol, model: LatentDiffusion) -> Task:
    from ldm.sampling.conditions import Classes, Text
    from ldm.sampling.engine import Task

    if protocol.data["kind"] != "classes":
        return Task(Text())
    # Where a model has one class more than the data, that one stands for none.
    classes, known = protocol.data["classes"], getattr(model.cond_stage_model, "n_classes", None)
    if known is not None and known < classes:
        raise BadInput(f"--config: this model has {known} classes; {protocol.name} asks for {classes}")
    return Task(Classes(classes if known == classes + 1 and protocol.guidance != 1 else None))


def make_engine(args: argparse.Namespace, protocol: Protocol, setup: Setup, batch: int) -> Engine:
    """The model, ready to make the protocol's pictures."""
    from ldm.checkpoint import CheckpointError
    from ldm.cli.pipeline import check_network
    from ldm.cli.settings import CPU_POSITIONS, SamplingSettings, count_nodes, make_plan, make_recipe, run_facts
    from ldm.sampling.engine import Engine

    sizes, size = setup.sizes, (protocol.size,) * 2
    sampling = settings_from(args, SamplingSettings)
    recipe = make_recipe(sampling, size, setup.config)
    nodes = count_nodes(recipe, setup)
    positions = batch * (1 if recipe.scale == 1.0 else 2) * math.prod(side // sizes.factor for side in size)
    with blame("--ckpt", (CheckpointError,)):
        facts = run_facts(setup, recipe.sampler)
    plan = make_plan(sampling, nodes, facts)
    if args.parallel is None and setup.device.type == "cpu":  # not by free memory: last digits depend on it
        plan = replace(plan, parallel=max(1, CPU_POSITIONS // positions))
    model = setup.load()
    check_network(model, recipe, plan)
    with blame("--config", (ValueError, OSError, TypeError, KeyError)):
        engine = Engine(model, sizes, recipe, plan, task_of(protocol, model), setup.autocast)
    engine.pack()
    return engine


def run_card(
    args: argparse.Namespace, protocol: Protocol, prompts: Sequence[Prompt], setup: Setup, engine: Engine, batch: int
) -> dict[str, Any]:
    """All that the pictures depend on, as JSON values, and under what it runs."""
    from evaluation.runs.folder import prompts_sha256
    from ldm.checkpoint import fingerprint

    asked = protocol.asked() | {"prompts_sha256": prompts_sha256(prompts)}
    return {
        "name": protocol.name,
        "protocol_sha256": json_sha256(asked),
        "protocol": asked,
        "pictures": len(prompts) * protocol.repeats,
        "seeds": [protocol.seed],
        "plan": args.plan,
        "method": engine.settings(),
        "ckpt": f"{setup.ckpt.parent.name}/{setup.ckpt.name}",
        "weights": fingerprint(setup.ckpt),
        "config": fingerprint(setup.config_path),
        "averaged": args.weights,
        "captions_cut": captions_cut(prompts, engine),
        "device": setup.device.type,
        "batch": batch,
        "parallel": engine.plan.parallel,
        "metrics": dict(protocol.metrics),
        "versions": versions(setup),
    }


def captions_cut(prompts: Sequence[Prompt], engine: Engine) -> int:
    """How many prompts the model does not read to their end."""
    from ldm.sampling.conditions import prompts_cut

    return prompts_cut(engine.model, [prompt.inputs["prompt"] for prompt in prompts if "prompt" in prompt.inputs])


def versions(setup: Setup) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version()}
    for package in ("faster-diffusion-ldm", "torch", "numpy", "pillow", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    gpu = torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else ""
    return found | {"machine": gpu or platform.machine()}


def batch_size(args: argparse.Namespace, protocol: Protocol, setup: Setup) -> int:
    """On a CPU always the same; else as asked for, or of the run that is there, or else the usual one."""
    from evaluation.runs.folder import CARD, read_card

    if setup.device.type == "cpu":
        return min(CPU_BATCH, max(1, CPU_LATENTS // (protocol.size // setup.sizes.factor) ** 2))
    there = Path(args.outdir)
    return args.batch_size or (read_card(there)["batch"] if (there / CARD).is_file() else BATCH)


# The run


def begin(
    args: argparse.Namespace, protocol: Protocol, prompts: Sequence[Prompt], setup: Setup, process: Process
) -> tuple[RunFolder, Engine]:
    """The folder, new or gone on with, and the model."""
    from evaluation.runs.folder import RunFolder

    with blame("--out"):
        batch = batch_size(args, protocol, setup)
    engine = make_engine(args, protocol, setup, batch)
    with blame("--out"):
        card = run_card(args, protocol, prompts, setup, engine, batch)
        folder = RunFolder.open(Path(args.outdir), card, prompts, str(process))
    if card["captions_cut"] and not process.rank:
        print(f"{card['captions_cut']} of {len(prompts)} captions are longer than the model reads and cut off")
    if folder.card["versions"] != card["versions"] and not process.rank:
        print(f"begun with other versions, so last digits may differ: {folder.card['versions']}")
    return folder, engine


def make(folder: RunFolder, engine: Engine, process: Process) -> tuple[int, int, int]:
    """This process's share of the pictures: how many were made, how many were there, and how many were made again in
    the place of files that were damaged or changed."""
    from tqdm import tqdm

    from ldm.sampling.generate import fill

    fresh = found = again = 0
    items, batch = folder.items, folder.card["batch"]

    def full(part: Sequence[Item]) -> tuple[list[Image.Image], dict[str, Any]]:
        # The last batch is filled up where last digits would depend on it, see above.
        more = -len(part) % batch if folder.card["device"] == "cpu" else 0
        images, run = engine([*part, *[part[-1]] * more])
        return images[: len(part)], run

    share = sum(len(items[k : k + batch]) for k in range(process.rank * batch, len(items), process.world_size * batch))
    with tqdm(total=share, desc=str(process), unit="image", disable=True if process.rank else None) as bar:
        for made in fill(folder, items, full, batch, process.rank, process.world_size):
            fresh, found, again = fresh + made.fresh, found + (not made.fresh), again + made.replaced
            bar.update()
    return fresh, found, again


def verify(outdir: Path) -> None:
    from evaluation.runs.folder import RunFolder, some

    with blame("--verify"):
        folder = RunFolder(outdir)
        faults = folder.faults()
    if faults:
        raise BadInput(f"--verify: {outdir}: {some(faults)}")
    print(
        f"{len(folder.items)} pictures, each there, whole and once; {folder.card['name']}, "
        f"protocol {folder.card['protocol_sha256'][:16]}"
    )


def run(argv: Sequence[str] | None) -> None:
    args, protocol = parse(argv)
    if protocol is None:
        return verify(Path(args.outdir))
    # What is quick to check comes before other processes start, and before what is slow to load.
    prompts = select_prompts(args, protocol)
    from ldm.cli.devices import ALONE  # each process makes pictures of its own
    from ldm.cli.setup import ModelSettings, make_setup

    setup = make_setup(settings_from(args, ModelSettings), default_model(protocol), ALONE)
    if protocol.size % setup.sizes.multiple:
        raise BadInput(
            f"--protocol: its pictures have {protocol.size} px; this model's must be a multiple of "
            f"{setup.sizes.multiple}"
        )
    process = join(args)
    setup = replace(setup, device=process.device)

    import torch

    if setup.device.type == "cpu":
        torch.set_num_threads(CPU_THREADS)
    began = time.perf_counter()
    folder, engine = begin(args, protocol, prompts, setup, process)
    try:
        with blame("--precision" if engine.autocast else "--ckpt", (ValueError,)):
            fresh, found, again = make(folder, engine, process)
        complete = folder.finish()
        # Of several processes that find all there, those that made nothing leave it to the first.
        if complete and args.npz and (fresh or not process.rank):
            print(f"arrays: {folder.write_npz()}")
    except OSError as error:
        raise BadInput(
            f"--out: can't write to {folder.path}: {error.strerror or error}; what is there stays, and the "
            f"same command goes on from there"
        ) from error
    changed = f" ({again} of them in the place of files that were damaged or changed)" if again else ""
    print(
        f"{process}: {fresh} made{changed}, {found} found in {time.perf_counter() - began:.1f} s; {folder.path}: "
        f"{'complete' if complete else unfinished_state(folder)}"
    )


def unfinished_state(folder: RunFolder) -> str:
    """How far a run is that is not complete, in words."""
    from evaluation.runs.folder import some

    there, others = folder.there()
    state = f"{there} of {len(folder.items)} pictures there"
    return (
        f"{state}; not as they were made: {some(others)}; the part that made them makes them again" if others else state
    )


def named(argv: Sequence[str] | None) -> None:
    """Run; errors name the flags."""
    try:
        run(argv)
    except SettingError as error:
        raise BadInput(f"{parser().flag(error.setting)}: {error.problem}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("generate.py", lambda: named(argv), GO_ON)


if __name__ == "__main__":
    sys.exit(main())
