"""Pictures from text, plain or with encoder propagation (Faster Diffusion)."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import BadInput, Parser, blame, command, number

# The library, and with it PyTorch, is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.generate import Item, Made
    from ldm.models.diffusion.plan import Plan
    from ldm.text2image import Recipe, Sizes, TextToImage

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_MODEL = ROOT / "models" / "ldm" / "emoji64"
PUBLISHED_SAMPLERS = {"plms": "plms", "dpm": "dpm-solver++"}
NOISE_WEIGHT = 0.003
CPU_POSITIONS = 16384   # latent positions in one decoder batch on a CPU, where memory soon outweighs speed


def parallel(text: str) -> int | None:
    return None if text == "auto" else number(int, 1, math.inf, "auto or a whole number >= 1")(text)


def parser() -> argparse.ArgumentParser:
    count = number(int, 1, math.inf, "a whole number >= 1")
    finite = number(float, -sys.float_info.max, sys.float_info.max, "a finite number")
    p = Parser(prog="txt2img.py", description=__doc__)

    what = p.add_argument_group("what to make")
    text = what.add_mutually_exclusive_group()
    text.add_argument("--prompt", default="a red heart, noto style",
                      help="the text to picture (default: %(default)s)")
    text.add_argument("--from-file", metavar="FILE", help="one prompt per line, each made n_iter times")
    what.add_argument("--repeat", type=count, default=1, metavar="N", help="use each prompt N times")
    what.add_argument("--n_samples", type=count, default=4, metavar="N",
                      help="pictures of the prompt in each iteration; the batch size (default: %(default)s)")
    what.add_argument("--n_iter", type=count, default=1, metavar="N",
                      help="iterations (default: %(default)s)")
    what.add_argument("--seed", type=number(int, 0, 2**32 - 1, "0..2^32-1"), default=42,
                      help="fixes each picture's noise, with the numbers of its prompt and sample "
                           "(default: %(default)s)")
    what.add_argument("--fixed_code", action="store_true",
                      help="begin every prompt and iteration from the same noise")
    what.add_argument("--H", type=count, help="height in pixels (default: the model's)")
    what.add_argument("--W", type=count, help="width in pixels (default: the model's)")

    how = p.add_argument_group("how to sample")
    how.add_argument("--steps", "--ddim_steps", dest="steps", type=count, default=50,
                     help="sampling steps (default: %(default)s)")
    how.add_argument("--ddim_eta", type=number(float, 0, 1, "a number in 0..1"), default=0.0,
                     help="0 = deterministic, 1 = ancestral sampling (default: %(default)s)")
    how.add_argument("--scale", type=finite, help="guidance scale, 1 = none (default: the model's, or 7.5)")
    sampler = how.add_mutually_exclusive_group()
    sampler.add_argument("--sampler", default="ddim", help="name of the solver (default: %(default)s)")
    sampler.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    sampler.add_argument("--dpm", action="store_true", help="the same as --sampler dpm-solver++")

    fast = p.add_argument_group("encoder propagation")
    fast.add_argument("--plan", default="faster-diffusion",
                      help="at which steps the UNet's encoder runs: off (all), faster-diffusion or another "
                           "name in configs/plans, uniform:N, a list such as 0,1,2,5, or FILE.yaml "
                           "(default: %(default)s)")
    fast.add_argument("--parallel", type=parallel, metavar="N|auto",
                      help="most decoder steps in one batch; changes speed and memory, not the pictures "
                           "(default: auto, all that share an encoder step; fewer large ones on a CPU)")
    fast.add_argument("--noise-weight", type=number(float, 0, sys.float_info.max, "a number >= 0"),
                      metavar="X",
                      help=f"prior noise injection; 0 = off (default: {NOISE_WEIGHT}, with --plan off 0)")
    fast.add_argument("--noise-below", type=finite, default=500.0, metavar="T",
                      help="inject at timesteps below T of the training's (default: %(default)s)")
    fast.add_argument("--noise-order", choices=("before", "after", "update"), default="before",
                      help="inject before the prediction, after it, or after the solver's step "
                           "(default: %(default)s)")
    fast.add_argument("--compare", action="store_true",
                      help="make each picture plain and accelerated and save them side by side")

    model = p.add_argument_group("the model (default: models/ldm/emoji64)")
    model.add_argument("--config", metavar="YAML", help="the model's config")
    model.add_argument("--ckpt", metavar="FILE", help="its weights, .safetensors or .ckpt")
    model.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto",
                       help="averaged or last weights of the UNet; auto = averaged if there are any")
    model.add_argument("--C", type=count, help="latent channels, to check the config (default: the model's)")
    model.add_argument("--f", type=count,
                       help="downsampling factor, to check the config (default: the model's)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    model.add_argument("--precision", choices=("full", "autocast"),
                       help="(default: autocast on cuda, else full)")

    out = p.add_argument_group("output")
    out.add_argument("--outdir", default="outputs/txt2img-samples", metavar="DIR",
                     help="gets samples/, manifest.jsonl, the grid; what is already there is not made again "
                          "(default: %(default)s)")
    out.add_argument("--n_rows", type=number(int, 0, math.inf, "a whole number >= 0"), default=0, metavar="N",
                     help="pictures in a row of the grid; 0 = n_samples")
    out.add_argument("--skip_grid", action="store_true", help="save no grid; needed for very many pictures")
    out.add_argument("--skip_save", action="store_true", help="save no single pictures")
    return p


# From arguments to what they name

def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [args.prompt]
    if args.from_file is not None:
        with blame("--from-file"):
            lines = Path(args.from_file).read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise BadInput(f"--from-file: {args.from_file} is empty; expected one prompt per line")
    return [prompt for prompt in prompts for _ in range(args.repeat)]


def list_items(args: argparse.Namespace) -> list[Item]:
    from ldm.generate import prompt_items

    # As published: a batch is n_samples pictures of the prompt, or n_samples lines of the file.
    per_iteration = 1 if args.from_file else args.n_samples
    return prompt_items(read_prompts(args), per_iteration * args.n_iter, args.seed,
                        share_start=per_iteration if args.fixed_code else None)


def find_device(name: str) -> torch.device:
    import torch

    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    present = [*gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name not in (*present, *(["cuda"] if gpus else [])):
        raise BadInput(f"--device: {name} is not there; on this machine: auto, {', '.join(present)}")
    return torch.device(name)


def model_files(args: argparse.Namespace) -> tuple[Path, Path]:
    if (args.config is None) != (args.ckpt is None):
        given, other = ("--config", "--ckpt") if args.ckpt is None else ("--ckpt", "--config")
        raise BadInput(f"{other}: needed together with {given}; without both the model is emoji64")
    config = Path(args.config or DEFAULT_MODEL / "config.yaml")
    ckpt = Path(args.ckpt or DEFAULT_MODEL / "model.safetensors")
    for flag, path in (("--config", config), ("--ckpt", ckpt)):
        if not path.is_file():
            raise BadInput(f"{flag}: {path}: no such file")
    return config, ckpt


def check_sizes(args: argparse.Namespace, sizes: Sizes) -> tuple[int, int]:
    """Height and width of the pictures."""
    for flag, given, real in (("--C", args.C, sizes.channels), ("--f", args.f, sizes.factor)):
        if given not in (None, real):
            raise BadInput(f"{flag}: this model's is {real}; got {given}")
    height, width = args.H or sizes.default, args.W or sizes.default
    for flag, value in (("--H", height), ("--W", width)):
        if value % sizes.multiple:
            raise BadInput(f"{flag}: must be a multiple of {sizes.multiple} for this model; got {value}")
    return height, width


def check_outdir(outdir: Path) -> None:
    """It must be possible to write there; nothing is left behind by finding out."""
    place = next(p for p in (outdir, *outdir.absolute().parents) if p.exists())
    if not place.is_dir():
        raise BadInput(f"--outdir: {place} is a file; expected a directory")
    try:
        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise BadInput(f"--outdir: can't write to {outdir}: {error.strerror}") from error


def sampler_name(args: argparse.Namespace) -> str:
    from ldm.models.diffusion.solvers import SOLVERS

    flag, name = "--sampler", args.sampler
    for published, meant in PUBLISHED_SAMPLERS.items():
        if getattr(args, published):
            flag, name = f"--{published}", meant
    if name not in SOLVERS:
        raise BadInput(f"{flag}: sampler {name!r} is not built yet; accepted: {', '.join(SOLVERS)}")
    return name


def make_recipe(args: argparse.Namespace, size: tuple[int, int], default_scale: float) -> Recipe:
    from ldm.text2image import Recipe

    weight = args.noise_weight
    if weight is None:
        weight = 0.0 if args.plan == "off" else NOISE_WEIGHT
    scale = default_scale if args.scale is None else args.scale
    return Recipe(*size, sampler_name(args), args.steps, args.ddim_eta, scale,
                  weight, args.noise_below, args.noise_order)


def make_plan(args: argparse.Namespace, nodes: int, positions: int, device: torch.device) -> Plan:
    """The run's plan; `positions` of all latents that the UNet gets at one node decide --parallel auto."""
    from ldm.models.diffusion.plan import load_plan

    most = nodes if device.type != "cpu" else max(1, CPU_POSITIONS // positions)
    with blame("--plan"):
        plan = load_plan(args.plan, nodes, args.parallel or most)
    if args.compare and len(plan.keys) == nodes:
        raise BadInput(f"--plan: {args.plan} skips no encoder, so --compare has nothing to compare; "
                       f"expected a plan such as faster-diffusion")
    return plan


# Making and showing

@dataclass
class Result:
    """What one method made, or found made by an earlier run.

    images: kept only where a grid or a comparison needs them.
    fresh, spent_macs: of what this run made.
    count, seconds, seconds_unet, macs: of all.
    """

    label: str
    images: list[Image.Image] = field(default_factory=list)
    fresh: int = 0
    count: int = 0
    seconds: float = 0.0
    seconds_unet: float = 0.0
    macs: int = 0
    spent_macs: int = 0

    def add(self, made: Made, keep: bool) -> None:
        self.images += [made.image] if keep else []
        self.fresh, self.count = self.fresh + made.fresh, self.count + 1
        self.spent_macs += made.run["unet_macs"] if made.fresh else 0
        self.seconds += made.run["seconds"]
        self.seconds_unet += made.run["seconds_unet"]
        self.macs += made.run["unet_macs"]

    def __str__(self) -> str:
        """The cost of one picture."""
        return (f"{self.seconds / self.count:.2f} s, {self.seconds_unet / self.count:.2f} s of it UNet, "
                f"{self.macs / self.count / 1e9:.2f} GMAC of the UNet")


def make_all(label: str, maker: TextToImage, items: Sequence[Item], settings: dict[str, Any],
             args: argparse.Namespace) -> Result:
    """All pictures of one method, with progress over images and steps."""
    from tqdm import tqdm

    from ldm.generate import generate

    result, nodes = Result(label), maker.plan.num_nodes
    with (tqdm(total=len(items), desc=label, unit="image", disable=None) as images,
          tqdm(total=nodes, desc="steps", unit="step", leave=False, disable=None) as steps):
        def on_node() -> None:
            if steps.n >= nodes:
                steps.reset()
            steps.update()

        maker.on_node = on_node
        outdir = None if args.skip_save else args.outdir
        for made in generate(items, maker, settings | maker.settings(), outdir, args.n_samples):
            result.add(made, keep=args.compare or not args.skip_grid)
            images.update()
    return result


def save_sheet(kind: str, sheet: Image.Image, items: Sequence[Item], settings: dict[str, Any],
               args: argparse.Namespace) -> Path:
    """Save a sheet of pictures under a name from all that it depends on; one that is there is kept."""
    from ldm.generate import digest
    from ldm.images import read_png, save_png

    settings = settings | {"sheet": kind, "items": [item.settings() for item in items]}
    path = Path(args.outdir) / f"{kind}-{args.seed}-{digest(settings)}.png"
    if (found := read_png(path)) is None or found[1] != settings:
        save_png(path, sheet, settings)
    return path


def report(results: Sequence[Result], items: Sequence[Item], settings: dict[str, Any],
           args: argparse.Namespace) -> None:
    """Save and announce what shows the pictures together, and say what each cost."""
    if args.compare:
        compare(*results, items, settings, args)
        return
    print(f"each picture: {results[0]}")
    if not args.skip_grid:
        from ldm.images import grid

        columns = args.n_rows or args.n_samples
        sheet = grid(results[0].images, columns)
        print(f"grid: {save_sheet('grid', sheet, items, settings | {'columns': columns}, args)}")


def compare(plain: Result, fast: Result, items: Sequence[Item], settings: dict[str, Any],
            args: argparse.Namespace) -> None:
    """Plain and accelerated pictures side by side, with cost and distance."""
    import torch

    from ldm.images import from_pil, psnr, side_by_side

    distance = psnr(*(torch.stack([from_pil(image) for image in r.images]) for r in (plain, fast)))
    columns = {f"{r.label}: {r.seconds / r.count:.2f} s": r.images for r in (plain, fast)}
    sheet = side_by_side(columns, [f"{d:.1f} dB  {i.prompt}" for d, i in zip(distance, items, strict=True)])
    path = save_sheet("compare", sheet, items, settings, args)
    for result in (plain, fast):
        print(f"{result.label}, each picture: {result}")
    print(f"plain / {fast.label}: time {plain.seconds / fast.seconds:.2f}, UNet time "
          f"{plain.seconds_unet / fast.seconds_unet:.2f}, UNet MACs {plain.macs / fast.macs:.2f}")
    print(f"PSNR between the two: mean {distance.mean():.1f} dB, lowest {distance.min():.1f} dB")
    print(f"side by side: {path}")


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to load.
    items = list_items(args)
    config_path, ckpt = model_files(args)
    check_outdir(Path(args.outdir))
    device = find_device(args.device)

    from ldm.checkpoint import CheckpointError, fingerprint, load_config, load_model
    from ldm.models.diffusion.plan import Plan
    from ldm.text2image import Sizes, TextToImage, num_nodes

    with blame("--config"):
        config = load_config(config_path)
        sizes = Sizes.of(config.model)
    height, width = check_sizes(args, sizes)
    recipe = make_recipe(args, (height, width), config.get("sampling", {}).get("scale", 7.5))
    with blame("--steps"):
        nodes = num_nodes(recipe, config.model.params.get("timesteps", 1000))
    latents = args.n_samples * (1 if recipe.scale == 1.0 else 2)
    plan = make_plan(args, nodes, latents * height * width // sizes.factor ** 2, device)
    # A config that does not build a model may fail in any way that a constructor can.
    with blame("--config", (ValueError, OSError, TypeError, KeyError)), blame("--ckpt", (CheckpointError,)):
        model = load_model(config_path, ckpt, device, args.weights)

    precision = args.precision or ("autocast" if device.type == "cuda" else "full")
    build = partial(TextToImage, model, sizes, autocast=precision == "autocast", warm_up=args.compare)
    settings = {"ckpt": f"{ckpt.parent.name}/{ckpt.name}", "weights": fingerprint(ckpt)[:16],
                "config": fingerprint(config_path)[:16], "averaged": args.weights}
    methods = {"accelerated" if args.compare else "pictures": (recipe, plan)}
    if args.compare:
        methods = {"plain": (replace(recipe, noise_weight=0.0), Plan(nodes, tuple(range(nodes)))), **methods}
    with blame("--config"):
        makers = {label: build(*method) for label, method in methods.items()}

    began = time.perf_counter()
    suspect = "--precision" if precision == "autocast" else "--ckpt"
    with blame("--outdir", (OSError,)), blame(suspect, (ValueError,)):
        results = [make_all(label, maker, items, settings, args) for label, maker in makers.items()]
        report(results, items, settings | {label: m.settings() for label, m in makers.items()}, args)
    fresh, count = (sum(getattr(r, name) for r in results) for name in ("fresh", "count"))
    where = "not saved" if args.skip_save else f"in {Path(args.outdir) / 'samples'}"
    print(f"{count} pictures ({fresh} made, {count - fresh} found) {where}; "
          f"spent {time.perf_counter() - began:.1f} s, {sum(r.spent_macs for r in results) / 1e9:.1f} GMAC")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("txt2img.py", lambda: run(parser().parse_args(argv)), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
