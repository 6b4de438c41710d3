"""Concept retrieval: does a generated picture lie nearest to real pictures of the thing that was asked for?

For each of --count captions of the dataset one picture is made. Its features are compared with those of all
real pictures, and it counts as recognised at k if one of the k nearest shows the same concept, in any style.
ImageConcat the generated pictures: the real ones, each with itself left out, and what the model's first stage
makes of the pictures that the captions belong to.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metrics.retrieval import DEFINITION, RANKS, SPLITS, RealSet, Verdict, load_extractor
from ldm.cli.arguments import MOST, count, finite, step_count
from ldm.cli.parser import Parser, check_output, number, run_command, whole
from ldm.io.errors import BadInput, blame, did_you_mean
from ldm.util import PROJECT_ROOT

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from evaluation.metrics.extractors import Extractor
    from ldm.data.emoji import EmojiDataset
    from ldm.sampling.engine import Engine

MODEL = PROJECT_ROOT / "models" / "ldm" / "emoji64"
SHEET_COLUMNS = 20


# What is asked for


def spread(images: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Indices of `count` random pictures, or all if there are fewer, spread over concepts and styles.

    Concepts take turns in random order; each gives a picture in one of the styles used least so far.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    left: dict[str, list[int]] = {}
    for index in random.permutation(len(images)).tolist():
        left.setdefault(images[index]["concept"], []).append(index)
    used = {image["style"]: 0 for image in images}
    chosen: list[int] = []
    while any(left.values()):
        for indices in filter(None, left.values()):
            index = min(indices, key=lambda i: used[images[i]["style"]])  # ties: the first, at random
            indices.remove(index)
            used[images[index]["style"]] += 1
            chosen.append(index)
    return chosen[:count]


@dataclass(frozen=True)
class Asked:
    """What is to be pictured.

    captions: N names with their styles.
    entries:  the entries in the dataset of the pictures that they belong to.
    pictures: those, (N, 3, H, W) in [-1, 1].
    """

    captions: Sequence[str]
    entries: Sequence[Mapping[str, Any]]
    pictures: Tensor

    @staticmethod
    def of(data: EmojiDataset, count: int, seed: int) -> Asked:
        import numpy as np

        chosen = spread(data.images, count, seed)
        return Asked(
            [data.captions(i)[0] for i in chosen], [data.images[i] for i in chosen], data.batch(np.array(chosen))
        )


# What the model makes of it


def make_pictures(maker: Engine, captions: Sequence[str], seed: int, batch: int) -> list[Image.Image]:
    """One picture per caption; each has its own noise, whatever the batch."""
    from tqdm import tqdm

    from ldm.sampling.generate import generate, prompt_items

    steps = math.ceil(len(captions) / batch) * maker.plan.num_nodes
    with tqdm(total=steps, desc="generating", unit="step", disable=None) as bar:
        items = prompt_items(captions, 1, seed, by_position=True)
        make = partial(maker, on_node=bar.update)
        return [made.image for made in generate(items, make, {}, None, batch)]


def reconstruct(maker: Engine, pictures: Tensor, batch: int) -> list[Image.Image]:
    """Pictures (N, 3, H, W) through the model's first stage and back, without its noise."""
    import torch
    from tqdm import tqdm

    from ldm.io.images import to_pil

    model, images = maker.model, []
    for part in tqdm(pictures.split(batch), desc="reconstructing", unit="batch", disable=None):
        noise = torch.zeros(len(part), *maker.shape, device=model.device)  # the mode
        latents = model.get_first_stage_encoding(model.encode_first_stage(part.to(model.device)), noise)
        images += to_pil(model.decode_first_stage(latents))
    return images


# The command line


def parser() -> Parser:
    p = Parser(prog="recognition.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", default="data/emoji64", metavar="DIR", help="dataset of scripts/prepare_emoji.py")
    p.add_argument("--config", default=str(MODEL / "config.yaml"), metavar="YAML", help="the model's config")
    p.add_argument("--ckpt", default=str(MODEL / "model.safetensors"), metavar="FILE", help="its weights")
    p.add_argument(
        "--count",
        type=whole(0, MOST),
        default=200,
        metavar="N",
        help="captions, or as many as the split has; 0 = only the real pictures, without a model",
    )
    p.add_argument("--split", choices=SPLITS, default="train", help="where the captions are from")
    p.add_argument(
        "--max-tier",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="captions of tiers 1 to this; 1 = the most concrete concepts",
    )
    p.add_argument(
        "--real-tier",
        type=int,
        choices=(1, 2, 3),
        default=2,
        help="real pictures of tiers 1 to this, at least --max-tier; the more, the harder",
    )
    p.add_argument("--steps", type=step_count, default=25, metavar="N", help="sampling steps")
    p.add_argument("--scale", type=finite, metavar="X", help="guidance scale, 1 = none; None: the model's, or 7.5")
    p.add_argument(
        "--plan",
        default="off",
        help="encoder propagation, as scripts/txt2img.py takes it, but without prior noise injection",
    )
    p.add_argument("--sampler", default="ddim", help="name of the solver")
    p.add_argument(
        "--batch-size", type=count, default=50, metavar="N", help="pictures at a time; changes speed and memory only"
    )
    p.add_argument(
        "--seed",
        type=number(int, 0, 2**32 - 1, "0..2^32-1"),
        default=0,
        metavar="N",
        help="fixes the choice of captions and each picture's noise",
    )
    p.add_argument("--out", metavar="JSON", help="write the results with all settings")
    p.add_argument("--pictures", metavar="PNG", help=f"write the generated pictures, {SHEET_COLUMNS} in a row")
    return p


def load_maker(args: argparse.Namespace, side: int) -> Engine:
    """The model, ready to make pictures of the dataset's size."""
    from ldm.checkpoint import CheckpointError, load_config, load_model
    from ldm.models.diffusion.propagation.load import load_plan
    from ldm.models.diffusion.solvers.registry import SOLVERS
    from ldm.sampling.conditions import Text
    from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes, usual_scale

    with blame("--config"):
        config = load_config(args.config)
        sizes = Sizes.of(config.model)
    if sizes.default != side:
        raise BadInput(f"--config: this model's pictures have {sizes.default} px; the dataset's have {side}")
    if args.sampler not in SOLVERS:
        raise BadInput(
            f"--sampler: {args.sampler!r} is not one of {', '.join(SOLVERS)}{did_you_mean(args.sampler, SOLVERS)}"
        )
    scale = usual_scale(config) if args.scale is None else args.scale
    recipe = Recipe(side, side, args.sampler, args.steps, scale=scale)
    with blame("--steps"):
        nodes = num_nodes(recipe, config.model.params.get("timesteps", 1000))
    with blame("--plan"):
        plan = load_plan(args.plan, nodes)
    # A config that does not build a model may fail in any way that a constructor can.
    with blame("--config", (ValueError, OSError, TypeError, KeyError)):
        with blame("--ckpt", (CheckpointError, FileNotFoundError)):
            model = load_model(args.config, args.ckpt)
        return Engine(model, sizes, recipe, plan, Task(Text()))


def load_data(args: argparse.Namespace) -> tuple[EmojiDataset, list[EmojiDataset]]:
    """What captions are from; and the real set, of all splits, so that each concept has its pictures there."""
    from ldm.data.emoji import EmojiDataset

    if args.real_tier < args.max_tier:
        raise BadInput(
            f"--real-tier: must be at least --max-tier {args.max_tier}, so that what is asked for "
            f"can be found; got {args.real_tier}"
        )
    with blame("--data"):
        asked = EmojiDataset(args.data, args.split, args.max_tier)
        real = [EmojiDataset(args.data, split, args.real_tier) for split in SPLITS]
    total = sum(map(len, real))
    if not len(asked) or total <= max(RANKS):
        raise BadInput(
            f"--data: tiers 1 to {args.max_tier} of {args.data} have {len(asked)} pictures in "
            f"{args.split}, the real set has {total}; needed are 1 and {max(RANKS) + 1}"
        )
    return asked, real


class Stopwatch:
    """Seconds by what they were spent on, each lap since the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 2), now


def settings_of(args: argparse.Namespace, extract: Extractor, maker: Engine | None) -> dict[str, Any]:
    """All that the results depend on, as JSON values; `sha256` names the contents of the files."""
    from ldm.checkpoint import fingerprint

    data = Path(args.data)
    files = {"pictures": data / "pictures.npy", "captions": data / "captions.json", "features": extract.weights}
    settings = {name: getattr(args, name) for name in ("data", "split", "max_tier", "real_tier", "count", "seed")}
    settings["features"] = extract.recipe
    if maker is not None:
        files |= {"config": Path(args.config), "ckpt": Path(args.ckpt)}
        settings |= {name: f"{files[name].parent.name}/{files[name].name}" for name in ("config", "ckpt")}
        settings["sampling"] = maker.settings() | {"plan": args.plan, "batch_size": args.batch_size}
    return settings | {"sha256": {name: fingerprint(path) for name, path in files.items()}}


def judge_model(
    maker: Engine, real: RealSet, asked: Asked, args: argparse.Namespace, watch: Stopwatch
) -> tuple[dict[str, Verdict], list[Image.Image]]:
    """Retrieval for the model's pictures and for its first stage's; and the pictures."""
    with blame("--ckpt", (ValueError,)):
        made = make_pictures(maker, asked.captions, args.seed, args.batch_size)
        watch.lap("generating")
        copies = reconstruct(maker, asked.pictures, args.batch_size)
        watch.lap("reconstructing")
    verdicts = {
        "generated": real.judge(made, asked.entries, "generated"),
        "reconstructed": real.judge(copies, asked.entries, "reconstructed"),
    }
    watch.lap("judging")
    return verdicts, made


def run(args: argparse.Namespace) -> None:
    # What is quick to check comes before what is slow to do.
    check_output(args.out)
    check_output(args.pictures, "--pictures")
    if args.pictures and not args.count:
        raise BadInput("--pictures: with --count 0 there are none")
    watch = Stopwatch()
    data, real_parts = load_data(args)
    extract = load_extractor()
    maker = load_maker(args, data[0].shape[-1]) if args.count else None
    settings = settings_of(args, extract, maker)
    watch.lap("loading")

    real = RealSet.of(real_parts, extract, args.batch_size)
    verdicts, details = {"real": real.judge_itself()}, []
    watch.lap("real")
    if maker is not None:
        asked = Asked.of(data, args.count, args.seed)
        of_model, made = judge_model(maker, real, asked, args, watch)
        if args.pictures:
            save_sheet(args.pictures, made, settings)
        verdicts = of_model | verdicts
        details = verdicts["generated"].pictures(asked.captions)

    concepts = len({entry["concept"] for entry in real.entries})
    publish(
        {
            "definition": DEFINITION,
            "settings": settings,
            "seconds": watch.seconds,
            "real_set": {"pictures": len(real.entries), "concepts": concepts},
            "results": {name: verdict.summary() for name, verdict in verdicts.items()},
            "pictures": details,
        },
        args.out,
    )


def save_sheet(path: str, images: Sequence[Image.Image], settings: Mapping[str, Any]) -> None:
    from ldm.io.images import grid, save_png

    with blame("--pictures", (OSError, ValueError)):
        save_png(path, grid(images, SHEET_COLUMNS), settings)


def publish(report: Mapping[str, Any], out: str | None) -> None:
    """Write the report, and say the main numbers."""
    from ldm.io.files import atomic_write

    if out is not None:
        with blame("--out", (OSError,)), atomic_write(out) as temporary:
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, result in report["results"].items():
        shares = (
            f"R@{k} {result[f'R@{k}']['share']:.3f} ({result[f'R@{k}']['interval'][0]:.3f} to "
            f"{result[f'R@{k}']['interval'][1]:.3f})"
            for k in RANKS
        )
        print(f"{name:13} n {result['n']:5}  {'  '.join(shares)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
