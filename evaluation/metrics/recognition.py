"""Whether a model's images show what their captions say, by concept retrieval; see `evaluation.metrics.retrieval`.

Three sets of images are measured: those that the model samples, one per caption; what the model's first stage makes of
the real images that the captions belong to; and the real images themselves.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evaluation.metrics.extractors import Extractor, load_extractor
from evaluation.metrics.retrieval import (
    DEFINITION,
    FEATURES,
    RANKS,
    SPLITS,
    Retrieval,
    choose_queries,
    load_real_images,
)
from ldm.checkpoint import fingerprint
from ldm.cli.arguments import EMOJI64
from ldm.cli.settings import SamplingSettings, count_nodes, make_recipe
from ldm.cli.setup import ALONE, ModelSettings, make_setup
from ldm.data.emoji import EmojiDataset
from ldm.io.errors import SettingError, fault_of
from ldm.io.images import grid, save_png, to_pil
from ldm.models.diffusion.propagation.load import load_plan
from ldm.sampling.engine import Engine, Task
from ldm.sampling.generate import generate, prompt_items
from ldm.sampling.task import Text

OF_DATA = ("data", "split", "max_tier", "real_tier", "count", "seed")  # settings that choose captions and real images


@dataclass(frozen=True)
class Settings:
    """What is sampled, and what it is compared with.

    data:  folder of a dataset of scripts/prepare_emoji.py.
    split, max_tier: the captions are those of this split, of tiers 1 to max_tier; the real images are those of all
        splits, of tiers 1 to `real_tier`.
    count: number of captions, or as many as there are; 0 = only the real images, without a model.
    seed:  chooses the captions, and names the noise of each image.
    The other fields: see `ldm.cli.settings.SamplingSettings` and `ModelSettings`.
    """

    data: str = "data/emoji64"
    split: str = "train"
    max_tier: int = 1
    real_tier: int = 2
    count: int = 200
    seed: int = 0
    config: str = str(EMOJI64[0])
    ckpt: str = str(EMOJI64[1])
    sampler: str = "ddim"
    steps: int = 25
    scale: float | None = None
    plan: str = "off"
    batch_size: int = 50


@dataclass(frozen=True)
class Recognition:
    """What was found.

    settings:  everything that the results depend on, as JSON values; seconds: by what they were spent on.
    retrieval: of the sets of images, by name.
    real:      number of real images, and of their concepts.
    images:    the sampled ones, with their captions.
    """

    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    retrieval: Mapping[str, Retrieval]
    real: tuple[int, int]
    captions: Sequence[str] = ()
    images: Sequence[Image.Image] = ()

    def report(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        pictures, concepts = self.real
        return {
            "definition": DEFINITION,
            "settings": self.settings,
            "seconds": self.seconds,
            "real_set": {"pictures": pictures, "concepts": concepts},
            "results": {name: found.summary() for name, found in self.retrieval.items()},
            "pictures": self.retrieval["generated"].each(self.captions) if self.images else [],
        }

    def save_images(self, path: str | Path, columns: int) -> None:
        """Write the sampled images as a grid, a PNG file with the settings in it."""
        save_png(path, grid(self.images, columns), self.settings)


def compute(settings: Settings) -> Recognition:
    """Sample an image for each caption, and measure which of them are recognised.
    Raises SettingError: a setting can't be used; `extractor`: the feature network is not installed."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def spent_on(name: str) -> None:
        nonlocal last
        seconds[name], last = round(time.perf_counter() - last, 2), time.perf_counter()

    data = load_captions(settings)
    with fault_of("extractor"):
        extractor = load_extractor(FEATURES, device="cpu")
    engine = load_engine(settings, data[0].shape[-1]) if settings.count else None
    about = all_settings(settings, extractor, engine)
    spent_on("loading")
    real = load_real_images(settings.data, tier=settings.real_tier, extractor=extractor, batch_size=settings.batch_size)
    size = len(real.entries), len({entry["concept"] for entry in real.entries})
    found = {"real": real.retrieve_each()}
    spent_on("real")
    if engine is None:
        return Recognition(about, seconds, found, size)
    queries = choose_queries(data, settings.count, settings.seed)
    with fault_of("ckpt", (ValueError,)):
        images = sample(engine, queries.captions, settings.seed, settings.batch_size)
        spent_on("generating")
        copies = reconstruct(engine, queries.images, settings.batch_size)
        spent_on("reconstructing")
    found = {
        "generated": real.retrieve(images, queries.entries, "generated"),
        "reconstructed": real.retrieve(copies, queries.entries, "reconstructed"),
        **found,
    }
    spent_on("judging")
    return Recognition(about, seconds, found, size, queries.captions, images)


def sample(engine: Engine, captions: Sequence[str], seed: int, batch_size: int) -> list[Image.Image]:
    """An image for each caption; each has its own noise, whatever the batch."""
    items = prompt_items(captions, 1, seed, by_position=True)
    steps = math.ceil(len(items) / batch_size) * engine.plan.num_nodes
    with tqdm(total=steps, desc="generating", unit="step", disable=None) as bar:
        sampled = generate(items, partial(engine, on_node=bar.update), {}, None, batch_size)
        return [made.image for made in sampled]


def reconstruct(engine: Engine, images: Tensor, batch_size: int) -> list[Image.Image]:
    """Images (N, 3, H, W) in [-1, 1], encoded and decoded by the model's first stage, without its noise."""
    model, copies = engine.model, []
    for part in tqdm(images.split(batch_size), desc="reconstructing", unit="batch", disable=None):
        noise = torch.zeros(len(part), *engine.shape, device=model.device)  # the mode
        latents = model.get_first_stage_encoding(model.encode_first_stage(part.to(model.device)), noise)
        copies += to_pil(model.decode_first_stage(latents))
    return copies


def load_captions(settings: Settings) -> EmojiDataset:
    """The captions to choose from, with their images.
    Raises SettingError: `real_tier`: below max_tier; `data`: no such dataset, or too few images in it."""
    if settings.real_tier < settings.max_tier:
        tiers = f"{settings.max_tier}, the tier of the captions, so that each concept has real images"
        raise SettingError("real_tier", f"must be at least {tiers}; got {settings.real_tier}")
    with fault_of("data"):
        data = EmojiDataset(settings.data, settings.split, settings.max_tier)
        total = sum(len(EmojiDataset(settings.data, split, settings.real_tier)) for split in SPLITS)
        if not len(data) or total <= max(RANKS):
            raise ValueError(
                f"tiers 1 to {settings.max_tier} of {settings.data} have {len(data)} images in {settings.split}, the "
                f"real set has {total}; needed are 1 and {max(RANKS) + 1}"
            )
    return data


def load_engine(settings: Settings, side: int) -> Engine:
    """The model, ready to sample images of `side` pixels in each direction.
    Raises SettingError: the model's files or the sampling settings can't be used."""
    setup = make_setup(ModelSettings(settings.config, settings.ckpt, device="cpu"), processes=ALONE)
    if setup.sizes.default != side:
        raise SettingError("config", f"this model's images have {setup.sizes.default} px; the dataset's have {side}")
    sampling = SamplingSettings(settings.sampler, settings.steps, scale=settings.scale, noise_weight=0.0)
    recipe = make_recipe(sampling, (side, side), setup.config)
    nodes = count_nodes(recipe, setup)
    with fault_of("plan"):
        plan = load_plan(settings.plan, nodes)
    model = setup.load()
    with fault_of("config"):
        return Engine(model, setup.sizes, recipe, plan, Task(Text()))


def all_settings(settings: Settings, extractor: Extractor, engine: Engine | None) -> dict[str, Any]:
    """Everything that the results depend on, as JSON values; `sha256` names the contents of the files."""
    data = Path(settings.data)
    files = {"pictures": data / "pictures.npy", "captions": data / "captions.json", "features": extractor.weights}
    about = {name: value for name, value in asdict(settings).items() if name in OF_DATA}
    about["features"] = extractor.recipe
    if engine is not None:
        files |= {"config": Path(settings.config), "ckpt": Path(settings.ckpt)}
        about |= {name: f"{files[name].parent.name}/{files[name].name}" for name in ("config", "ckpt")}
        about["sampling"] = engine.settings() | {"plan": settings.plan, "batch_size": settings.batch_size}
    return about | {"sha256": {name: fingerprint(path) for name, path in files.items()}}
