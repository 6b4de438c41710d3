"""The measures of a protocol: the columns that they fill, what their results depend on, and how they are computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evaluation.metrics import adm, clip_score, frechet, retrieval
from evaluation.metrics.extractors import EXTRACTORS, RECIPES, load_extractor, network_fields
from evaluation.metrics.result import Result
from evaluation.metrics.statistics import load_reference
from evaluation.protocols.protocol import Protocol
from evaluation.runs.images import open_images, reference_images
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256

PAPERS_NETWORK, PAPERS_SCORE = "inception-2015", "hessel-b32"
SPELT = {"efficientnet-lite0": "EfficientNet-lite0"}
OTHER_HEADS = {
    "fid": "Fréchet distance",
    "sfid": "spatial Fréchet distance",
    "inception_score": "class score",
    "precision": "precision",
    "recall": "recall",
}  # names of columns that are measured with another network
ADM = ("sfid", "inception_score", "precision", "recall")  # columns that only the ADM suite has
RESAMPLES = 100  # for intervals of Fréchet distances
REAL_TIER, RANK = 2, 5
BATCH = 50


@dataclass(frozen=True)
class Sources:
    """Where models, data and networks are; None = as the protocol says, or as is usual.

    config, ckpt: the model's files. data: the folder of the protocol's data.
    inception:    weights of the network of Fréchet distances. clip: folder of the CLIP model.
    device:       name of a device.
    """

    data: str | None = None
    config: str | None = None
    ckpt: str | None = None
    inception: str | None = None
    clip: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Measure:
    """One measure, ready to be computed.

    name:    names its result's file.
    columns: column -> name of its value in a result.
    depends: what results depend on beside the images, JSON values.
    least:   how many images it needs.
    compute: folder of a run -> result.
    """

    name: str
    columns: Mapping[str, str]
    depends: Mapping[str, Any]
    least: int
    compute: Callable[[Path], Result]


def measures_of(protocol: Protocol, data: Path, columns: Sequence[str], sources: Sources, cache: Path) -> list[Measure]:
    """The measures that fill these columns under a protocol.

    Args:
        data: the folder of the protocol's data.
        cache: folder that keeps statistics of reference images.

    Raises SettingError: `metrics`: the protocol does not say how to measure; `data`, `inception` or `clip`: what a
    measure needs is not there, or can't be used.
    """
    found = []
    if any(name in columns for name in ("fid", *ADM)):
        found.append(distance_measure(protocol, data, sources, cache, suite=any(name in columns for name in ADM)))
    if "clip_score" in columns:
        scored = "clip_score" in protocol.metrics
        found.append(score_measure(protocol, sources) if scored else retrieval_measure(protocol, data))
    return found


def distance_measure(protocol: Protocol, data: Path, sources: Sources, statistics: Path, suite: bool) -> Measure:
    """The Fréchet distance from the protocol's real images, or with `suite` all of the ADM suite."""
    name, resize = network_of(protocol)
    if not name:
        raise SettingError("metrics", "needs fid or adm, which say the network of Fréchet distances")
    for kind, given, accepted in (("extractor", name, EXTRACTORS), ("resize", resize, RECIPES)):
        if given not in accepted:
            raise SettingError("metrics", f"there is no {kind} {given!r}; accepted: {', '.join(accepted)}")
    need(protocol, data, protocol.metrics.get("reference", protocol.data.get("pictures")))
    with fault_of("inception"):
        extractor = load_extractor(name, sources.inception, resize, sources.device)
    with fault_of("data"):
        source = reference_images(protocol, data)
        if isinstance(source, Path) and source.suffix == ".npz":
            sha256 = file_sha256(source)
        else:
            sha256 = (open_images(source) if isinstance(source, Path) else source).sha256()

    @cache
    def reference() -> Any:
        with fault_of("data"):
            if suite:
                return adm.suite_reference(source, extractor, BATCH)
            return load_reference(source, extractor, batch_size=BATCH, cache=statistics)

    def compute(run: Path) -> Result:
        measure = adm.compute if suite else frechet.compute
        return measure(run / "samples", reference(), extractor=extractor, batch_size=BATCH, bootstrap=RESAMPLES)

    columns = {"fid": "fid_real"} | ({"sfid": "sfid_real", **{name: name for name in ADM[1:]}} if suite else {})
    depends = network_fields(extractor) | {"reference": sha256}
    return Measure("adm" if suite else "fid", columns, depends, adm.NEIGHBOURS + 1 if suite else 2, compute)


def score_measure(protocol: Protocol, sources: Sources) -> Measure:
    """The CLIP-score of the protocol's first variant."""
    variant = protocol.metrics["clip_score"][0]
    published = clip_score.find_variant(variant).model
    if sources.clip is None:
        raise SettingError(
            "clip", f"needed for CLIP-score: a folder with config.json and weights of {published}, from huggingface.co"
        )
    model = clip_score.load_variant(variant, sources.clip, device=sources.device)
    name = f"clip_score_{variant}"
    depends = {"measure": name, "features_sha256": file_sha256(model.weights)}

    def compute(run: Path) -> Result:
        return clip_score.compute(run / "samples", variant=variant, weights=model, batch_size=BATCH)

    return Measure("clip_score", {"clip_score": name}, depends, 1, compute)


def retrieval_measure(protocol: Protocol, data: Path) -> Measure:
    """Concept retrieval against the real images of tiers 1 and 2."""
    if "pictures" not in protocol.data:
        raise SettingError("metrics", "needs clip_score, or data with images in which concepts can be found")
    files = [protocol.data[name] for name in ("pictures", "file")]
    for file in files:
        need(protocol, data, file)
    extractor = load_extractor(retrieval.FEATURES, device="cpu")

    @cache
    def real() -> retrieval.RealImages:
        return retrieval.load_real_images(data, tier=REAL_TIER, extractor=extractor, batch_size=BATCH)

    def compute(run: Path) -> Result:
        return retrieval.compute(run, real(), rank=RANK)

    depends = network_fields(extractor) | {"real": file_sha256(*(data / file for file in files)), "tier": REAL_TIER}
    return Measure("retrieval", {"clip_score": f"R@{RANK}"}, depends, 1, compute)


def network_of(protocol: Protocol) -> tuple[str, str]:
    """The network of Fréchet distances and its resize; of a protocol that has none, two empty texts."""
    metrics = protocol.metrics
    extractor, _, resize = (metrics.get("adm") or metrics.get("fid") or [""])[0].partition("/")
    return extractor, resize


def heads(protocol: Protocol) -> dict[str, str]:
    """Columns that are another measure here than in the paper, with their names."""
    network, found = network_of(protocol)[0], {}
    scored = protocol.metrics.get("clip_score")
    if network not in ("", PAPERS_NETWORK):
        found = {name: f"{head} ({SPELT.get(network, network)})" for name, head in OTHER_HEADS.items()}
    if not scored:
        found["clip_score"] = f"concept retrieval R@{RANK}"
    elif scored[0] != PAPERS_SCORE:
        found["clip_score"] = f"CLIP-score ({scored[0]})"
    if found:
        found["ftc"] = f"distance × s / {'CLIP' if scored else f'R@{RANK}'}"
    return found


# The data

HOW_TO_GET = {
    "val2017": "val2017.zip of https://cocodataset.org/#download, unpacked there",
    "val2014": "val2014.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2017.json": "annotations_trainval2017.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2014.json": "annotations_trainval2014.zip of https://cocodataset.org/#download, unpacked there",
    "VIRTUAL_imagenet256_labeled.npz": "the reference batch of ImageNet 256 x 256 that is published with "
    "github.com/openai/guided-diffusion",
    "captions.json": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
    "pictures.npy": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
}


def need(protocol: Protocol, data: Path, name: str | None) -> None:
    """Check that a file or folder of the data is there.
    Raises SettingError: `data`: it is not there; the message says how to get it."""
    if name is not None and not (data / name).exists():
        how = HOW_TO_GET.get((data / name).name, "named by the protocol")
        raise SettingError("data", f"{data / name} is not there, which {protocol.name} needs: {how}")
