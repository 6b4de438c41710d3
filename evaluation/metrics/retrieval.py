"""Concept retrieval: whether the real images nearest to an image show the concept that the image should show.

`compute` measures the images of a finished run. Images are compared with real images by the cosine of their features;
`DEFINITION` says how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from evaluation.metrics.extractors import Extractor, load_extractor, network_fields
from evaluation.metrics.result import Result, share_interval
from evaluation.runs.generate import MANIFEST, SAMPLES
from evaluation.runs.images import batched, images_by_id, open_images
from ldm.checkpoint import fingerprint
from ldm.cli.arguments import EMOJI64
from ldm.cli.settings import ModelSettings, SamplingSettings
from ldm.cli.setup import ALONE, count_nodes, make_recipe, make_setup, model_files
from ldm.data.emoji import EmojiDataset
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256
from ldm.io.images import from_pil, open_image, to_pil
from ldm.models.diffusion.propagation.load import load_plan
from ldm.retrieval.embedders import Embedder, load_embedder
from ldm.sampling.engine import Engine, Task
from ldm.sampling.generate import generate, prompt_items, read_manifest
from ldm.sampling.task import Text

FEATURES = "efficientnet-lite0"
SPLITS = ("train", "heldout_pair", "heldout_concept")
RANKS = (1, 5)
# Stands in the protocols of results: with another text, older results could not be compared with new ones.
DEFINITION = (
    "A picture is a hit at k if one of the k real pictures nearest to it (cosine of standardised features) "
    "shows the same concept, in any style. Real set: every picture of tiers 1..real_tier, of all splits and "
    "styles; features are standardised over it. generated: one picture per caption; the real picture that "
    "the caption belongs to is in the real set. reconstructed: the first stage's copies of those pictures, "
    "whose originals are in the real set. real: the whole real set, each picture with itself left out."
)


def compute(run: str | Path, real: RealImages, *, rank: int = 5) -> Result:
    """Concept retrieval of the images of a finished run: `R@rank`, the share of images that are hits.

    Args:
        run: the folder of a run of evaluation/generate.py with captions of the dataset as prompts.
        real: images of the dataset, see `load_real_images`.
        rank: one of RANKS.

    Raises SettingError: `samples`: the run can't be read; `data`: the dataset can't.
    """
    run = Path(run)
    with fault_of("data"):
        entries, sha256 = images_by_id(real.data / "captions.json"), file_sha256(real.data / "pictures.npy")
    with fault_of("samples"):
        lines = read_manifest(run / MANIFEST)
        images = [open_image(run / line["file"]) for line in lines]
        made = open_images(run / SAMPLES).provenance
    found = share(real.retrieve(images, [entries[line["image_id"]] for line in lines], "samples").hits[rank])
    protocol = {
        "measure": f"R@{rank}",
        "definition": DEFINITION,
        "real_tier": real.tier,
        "n": len(lines),
        "real": sha256,
    }
    protocol |= {"prompts": made.get("protocol_sha256"), **network_fields(real.extractor)}
    return Result({f"R@{rank}": found["share"], f"R@{rank}_interval": found["interval"]}, protocol, made)


# The real images, and what is retrieved from them


@dataclass(frozen=True)
class RealImages:
    """Real images among which the nearest ones are found."""

    data: Path  # the folder of their dataset
    tier: int  # they are those of tiers 1 to this
    entries: Sequence[Mapping[str, Any]]  # the M images' entries in the dataset (concept, name, style, category, ...)
    features: Tensor  # (M, D), as the network gives them
    extractor: Extractor
    batch_size: int

    def retrieve(self, images: Sequence[Image.Image], entries: Sequence[Mapping[str, Any]], label: str) -> Retrieval:
        """Find the real images nearest to each of N images; `entries`: what each should show."""
        stacked = torch.stack([from_pil(image) for image in images])  # (N, 3, H, W)
        return self.nearest_to(features_of(stacked, self.extractor, self.batch_size, label), entries)

    def retrieve_each(self) -> Retrieval:
        """Find the real images nearest to each real image, itself left out."""
        return self.nearest_to(self.features, self.entries, range(len(self.entries)))

    def nearest_to(
        self, features: Tensor, entries: Sequence[Mapping[str, Any]], left_out: Sequence[int] | None = None
    ) -> Retrieval:
        """The same of images with these features (N, D), as the network gives them; `left_out`: see `nearest`."""
        asked, real = (standardise(of, self.features) for of in (features, self.features))
        found = nearest(asked, real, max(RANKS), left_out).numpy()  # (N, max(RANKS))
        concepts, names = (np.array([entry[field] for entry in self.entries])[found] for field in ("concept", "name"))
        wanted = [entry["concept"] for entry in entries]
        hits = {rank: hits_at(rank, concepts, wanted).tolist() for rank in RANKS}
        return Retrieval(entries, hits, names.tolist())


def load_real_images(
    data: str | Path, *, tier: int = 2, extractor: Extractor | str = FEATURES, batch_size: int = 50
) -> RealImages:
    """The real images of a dataset, with their features.

    Args:
        data: folder of a dataset of scripts/prepare_emoji.py.
        tier: images of tiers 1 to this.
        extractor: the network or its name.
        batch_size: images per batch; changes speed and memory only.

    Raises SettingError: `data`: no such dataset; `extractor`: no such network.
    """
    with fault_of("data"):
        parts = [EmojiDataset(data, split, tier) for split in SPLITS]  # all splits, so that each concept has images
    with fault_of("extractor"):
        network = load_extractor(extractor, device="cpu")
    images = torch.cat([part.batch(np.arange(len(part))) for part in parts])  # (M, 3, H, W)
    features = features_of(images, network, batch_size, "real images")
    return RealImages(Path(data), tier, [e for part in parts for e in part.images], features, network, batch_size)


@dataclass(frozen=True)
class Retrieval:
    """The real images nearest to each of N images."""

    entries: Sequence[Mapping[str, Any]]  # what each image should show
    hits: Mapping[int, Sequence[bool]]  # rank -> N booleans: whether one of the `rank` nearest shows the same concept
    found: Sequence[Sequence[str]]  # the names of the nearest real images of each image

    def summary(self) -> dict[str, Any]:
        """The shares of hits, in all and by category, as JSON values."""
        by_category: dict[str, list[bool]] = {}
        for entry, hit in zip(self.entries, self.hits[max(RANKS)], strict=True):
            by_category.setdefault(entry["category"], []).append(hit)
        categories = {name: {"n": len(hits)} | share(hits) for name, hits in sorted(by_category.items())}
        shares = {f"R@{rank}": share(hits) for rank, hits in self.hits.items()}
        return {"n": len(self.entries), **shares, f"R@{max(RANKS)} by category": categories}

    def each(self, captions: Sequence[str]) -> list[dict[str, Any]]:
        """The result of each image, which was sampled with that caption, as JSON values."""
        found = []
        for i, (caption, entry) in enumerate(zip(captions, self.entries, strict=True)):
            hits = {f"R@{rank}": hits[i] for rank, hits in self.hits.items()}
            named = {name: entry[name] for name in ("concept", "category")}
            found.append({"caption": caption, **named, **hits, "found": self.found[i]})
        return found


def features_of(images: Tensor, extractor: Extractor, batch_size: int, label: str) -> Tensor:
    """Features (N, D) of images (N, 3, H, W) in [-1, 1], with a progress bar."""
    parts = batched(images, len(images), batch_size, f"features: {label}")
    return torch.cat([extractor(torch.stack(part).to(extractor.device)).cpu() for part in parts])


# The arithmetic


def standardise(features: Tensor, reference: Tensor) -> Tensor:
    """Shift and scale each of the features (N, D) so that it has mean 0 and variance 1 over the reference (M, D); one
    that is constant there carries no information and becomes 0."""
    reference = reference.double()  # in float32 a constant need not equal its mean
    mean, std = reference.mean(0), reference.std(0, correction=0)  # (D,)
    return ((features - mean) / std).where(std > 0, 0.0).float()


def nearest(features: Tensor, real: Tensor, k: int, left_out: Sequence[int] | None = None) -> Tensor:
    """Indices (N, k) of the real images (M, D) of highest cosine similarity to features (N, D), the most similar first.
    `left_out`: for each of the N, the index of a real image that does not count.
    Raises ValueError: there are fewer than k real images to find."""
    found = len(real) - (left_out is not None)
    if not 1 <= k <= found:
        raise ValueError(f"k must be 1..{found}, the real images that can be found; got {k}")
    similarity = normalize(features) @ normalize(real).T  # (N, M)
    if left_out is not None:
        similarity[torch.arange(len(features)), torch.as_tensor(left_out)] = -math.inf
    return similarity.topk(k).indices


def hits_at(rank: int, found: np.ndarray, concepts: Sequence[str]) -> np.ndarray:
    """For each of N images, whether one of the first `rank` of the concepts `found`, (N, k), is its own, (N,) bool."""
    return (found[:, :rank] == np.asarray(concepts)[:, None]).any(1)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits with its binomial 95 % interval, as JSON values."""
    n, hit = len(hits), int(sum(hits))
    return {"share": round(hit / n, 4), "interval": [round(end, 4) for end in share_interval(hit, n)]}


# Captions as prompts


@dataclass(frozen=True)
class Queries:
    """Captions that images are sampled with, and the real images that they belong to."""

    captions: Sequence[str]  # N names with their styles
    entries: Sequence[Mapping[str, Any]]  # of those images in the dataset
    images: Tensor  # (N, 3, H, W) in [-1, 1]


def choose_queries(data: EmojiDataset, count: int, seed: int) -> Queries:
    """`count` captions at random, or all if there are fewer, see `spread`."""
    chosen = spread(data.images, count, seed)
    captions, entries = [data.captions(i)[0] for i in chosen], [data.images[i] for i in chosen]
    return Queries(captions, entries, data.batch(np.array(chosen)))


def spread(entries: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
    """Indices of `count` random entries, or of all if there are fewer, spread evenly over concepts and styles.

    Concepts take turns in random order; each gives an entry of one of the styles that were used least so far.
    """
    random = np.random.default_rng(seed)
    left: dict[str, list[int]] = {}
    for index in random.permutation(len(entries)).tolist():
        left.setdefault(entries[index]["concept"], []).append(index)
    used = {entry["style"]: 0 for entry in entries}
    chosen: list[int] = []
    while any(left.values()):
        for indices in filter(None, left.values()):
            index = min(indices, key=lambda i: used[entries[i]["style"]])  # ties: the first, at random
            indices.remove(index)
            used[entries[index]["style"]] += 1
            chosen.append(index)
    return chosen[:count]


# Whether a model's images show what their captions say. Three sets of images are measured: those that the model
# samples, one per caption; what its first stage makes of the real images that the captions belong to; the real ones.

OF_DATA = ("data", "split", "max_tier", "real_tier", "count", "seed")  # settings that choose captions and real images


@dataclass(frozen=True)
class Settings:
    """What is sampled, and what it is compared with, as the flags of evaluation/recognition.py say; see also
    `ldm.cli.settings.SamplingSettings` and `ModelSettings`."""

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


def recognise(settings: Settings) -> tuple[dict[str, Any], list[Image.Image]]:
    """Sample an image for each caption, and measure which of them are recognised: everything that was found and all
    that it depends on, as JSON values; and the sampled images.
    Raises SettingError: a setting can't be used; `extractor`: the feature network is not installed."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def spent_on(name: str) -> None:
        nonlocal last
        seconds[name], last = round(time.perf_counter() - last, 2), time.perf_counter()

    data = load_captions(settings)
    with fault_of("extractor"):
        extractor = load_extractor(FEATURES, device="cpu")
        encoder = load_embedder("emoji") if settings.count else None
    if settings.count:
        config, ckpt = model_files(settings.config, settings.ckpt)
        settings = replace(settings, config=str(config), ckpt=str(ckpt))
    engine = load_engine(settings, data[0].shape[-1]) if settings.count else None
    about = all_settings(settings, extractor, engine, encoder)
    spent_on("loading")
    size = settings.batch_size
    real = load_real_images(settings.data, tier=settings.real_tier, extractor=extractor, batch_size=size)
    found, images, captions = {"real": real.retrieve_each()}, [], []
    spent_on("real")
    if engine is not None:
        queries = choose_queries(data, settings.count, settings.seed)
        captions, entries = queries.captions, queries.entries
        with fault_of("ckpt", (ValueError,)):
            images = sample(engine, captions, settings.seed, size)
            spent_on("generating")
            copies = reconstruct(engine, queries.images, size)
            spent_on("reconstructing")
        of_model = {"generated": images, "reconstructed": copies}
        found = {name: real.retrieve(made, entries, name) for name, made in of_model.items()} | found
        spent_on("judging")
    results = {name: retrieval.summary() for name, retrieval in found.items()}
    if images:
        results["generated"]["score"] = fit_to(encoder, images, captions, found["generated"].hits[max(RANKS)])
    report = {
        "definition": DEFINITION,
        "settings": about,
        "seconds": seconds,
        "real_set": {"pictures": len(real.entries), "concepts": len({entry["concept"] for entry in real.entries})},
        "results": results,
        "pictures": found["generated"].each(captions) if images else [],
    }
    return report, images


@torch.no_grad()
def fit_to(
    encoder: Embedder, images: Sequence[Image.Image], captions: Sequence[str], hits: Sequence[bool]
) -> dict[str, float | None]:
    """How well N images fit their captions: the mean of 100 cos of their embeddings, as cos100 of clip_score.py has it,
    and its correlation with the hits; None where hits or cosines are all the same."""
    seen = torch.cat([encoder.images(encoder.prepared(image)[None]) for image in images])  # (N, D)
    scores = (100 * (seen * encoder.texts(captions)).sum(1)).double().numpy()  # (N,)
    vary = scores.std() > 0 and 0 < sum(hits) < len(hits)
    correlation = round(float(np.corrcoef(scores, hits)[0, 1]), 3) if vary else None
    return {"mean": round(float(scores.mean()), 3), "correlation": correlation}


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
    tier = settings.max_tier
    if settings.real_tier < tier:
        least = f"at least {tier}, the tier of the captions, so that each concept has real images"
        raise SettingError("real_tier", f"must be {least}; got {settings.real_tier}")
    with fault_of("data"):
        data = EmojiDataset(settings.data, settings.split, tier)
        total = sum(len(EmojiDataset(settings.data, split, settings.real_tier)) for split in SPLITS)
        if not len(data) or total <= max(RANKS):
            there = f"tiers 1 to {tier} of {settings.data} have {len(data)} images in {settings.split}"
            raise ValueError(f"{there}, the real set has {total}; needed are 1 and {max(RANKS) + 1}")
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


def all_settings(
    settings: Settings, extractor: Extractor, engine: Engine | None, encoder: Embedder | None
) -> dict[str, Any]:
    """Everything that the results depend on, as JSON values; `sha256` names the contents of the files."""
    data = Path(settings.data)
    files = {"pictures": data / "pictures.npy", "captions": data / "captions.json", "features": extractor.weights}
    about = {name: value for name, value in asdict(settings).items() if name in OF_DATA}
    about["features"] = extractor.recipe
    if engine is not None:
        files |= {"config": Path(settings.config), "ckpt": Path(settings.ckpt), "encoder": encoder.weights_file}
        about |= {name: f"{files[name].parent.name}/{files[name].name}" for name in ("config", "ckpt")}
        about["sampling"] = engine.settings() | {"plan": settings.plan, "batch_size": settings.batch_size}
    return about | {"sha256": {name: fingerprint(path) for name, path in files.items()}}
