"""Concept retrieval: whether the real pictures nearest to a picture show the thing that it should show.

Features of pictures are compared with those of real pictures by their cosine; see `DEFINITION`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.io.errors import blame

# What needs PyTorch is imported where it is used: --help must answer at once.
if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from evaluation.metrics.extractors import Extractor
    from ldm.data.emoji import EmojiDataset

FEATURES = "efficientnet-lite0"
SPLITS = ("train", "heldout_pair", "heldout_concept")
RANKS = (1, 5)
DEFINITION = (
    "A picture is a hit at k if one of the k real pictures nearest to it (cosine of standardised features) "
    "shows the same concept, in any style. Real set: every picture of tiers 1..real_tier, of all splits and "
    "styles; features are standardised over it. generated: one picture per caption; the real picture that "
    "the caption belongs to is in the real set. reconstructed: the first stage's copies of those pictures, "
    "whose originals are in the real set. real: the whole real set, each picture with itself left out."
)


def standardise(features: Tensor, reference: Tensor) -> Tensor:
    """Shift and scale every feature, so that over the reference it has mean 0 and variance 1.

    A feature that is constant over the reference tells nothing and becomes 0.

    Args:
        features: (N, D). reference: (M, D).
    """
    reference = reference.double()  # in float32 a constant need not equal its mean
    mean, std = reference.mean(0), reference.std(0, correction=0)  # (D,)
    return ((features - mean) / std).where(std > 0, 0.0).float()


def nearest(features: Tensor, real: Tensor, k: int, left_out: Sequence[int] | None = None) -> Tensor:
    """Indices (N, k) of the real pictures of highest cosine similarity, the most similar first.

    Args:
        features: (N, D). real: (M, D).
        left_out: for each row of features the index of a real picture that does not count.

    Raises:
        ValueError: there are fewer than k real pictures to find.
    """
    import torch

    found = len(real) - (left_out is not None)
    if not 1 <= k <= found:
        raise ValueError(f"k must be 1..{found}, the real pictures that can be found; got {k}")
    similarity = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(real).T  # (N, M)
    if left_out is not None:
        similarity[torch.arange(len(features)), torch.as_tensor(left_out)] = -math.inf
    return similarity.topk(k).indices


def retrieval(
    features: Tensor,
    concepts: Sequence[str],
    real_features: Tensor,
    real_concepts: Sequence[str],
    k: int,
    left_out: Sequence[int] | None = None,
) -> np.ndarray:
    """For each picture whether one of its k nearest real pictures shows the same concept, (N,) bool.

    Args:
        features, real_features: (N, D) and (M, D), see `standardise`; compared by cosine.
        concepts, real_concepts: N and M of them.
        left_out: see `nearest`.
    """
    import numpy as np

    found = np.asarray(real_concepts)[nearest(features, real_features, k, left_out).numpy()]  # (N, k)
    return (found == np.asarray(concepts)[:, None]).any(1)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits with its binomial 95 % interval, as JSON values."""
    from evaluation.metrics.intervals import share_interval

    n, hit = len(hits), int(sum(hits))
    return {"share": round(hit / n, 4), "interval": [round(end, 4) for end in share_interval(hit, n)]}


@dataclass(frozen=True)
class RealSet:
    """What retrieval finds: real pictures with standardised features.

    entries: the M pictures' entries in the dataset (concept, name, style, category, ...).
    raw:      (M, D) features as the network gives them.
    extract:  the network.
    """

    entries: Sequence[Mapping[str, Any]]
    raw: Tensor
    extract: Extractor
    batch: int

    @staticmethod
    def of(parts: Sequence[EmojiDataset], extract: Extractor, batch: int) -> RealSet:
        import numpy as np
        import torch

        pictures = torch.cat([part.batch(np.arange(len(part))) for part in parts])  # (M, 3, H, W)
        entries = [entry for part in parts for entry in part.images]
        return RealSet(entries, features_of(pictures, extract, batch, "real pictures"), extract, batch)

    def judge(self, images: Sequence[Image.Image], entries: Sequence[Mapping[str, Any]], label: str) -> Verdict:
        """Retrieval for other pictures, `entries` saying what each should show."""
        import torch

        from ldm.io.images import from_pil

        pictures = torch.stack([from_pil(image) for image in images])  # (N, 3, H, W)
        raw = features_of(pictures, self.extract, self.batch, label)
        return self._verdict(standardise(raw, self.raw), entries)

    def judge_itself(self) -> Verdict:
        """Retrieval for the real pictures, each with itself left out."""
        return self._verdict(standardise(self.raw, self.raw), self.entries, range(len(self.entries)))

    def _verdict(
        self, features: Tensor, entries: Sequence[Mapping[str, Any]], left_out: Sequence[int] | None = None
    ) -> Verdict:
        real = standardise(self.raw, self.raw)
        concepts, real_concepts = ([entry["concept"] for entry in some] for some in (entries, self.entries))
        hits = {k: retrieval(features, concepts, real, real_concepts, k, left_out).tolist() for k in RANKS}
        found = nearest(features, real, max(RANKS), left_out).tolist()
        return Verdict(entries, hits, [[self.entries[i]["name"] for i in row] for row in found])


@dataclass(frozen=True)
class Verdict:
    """Retrieval of N pictures.

    entries: what each should show.
    hits:    k -> N of them.
    found:   the names of the real pictures nearest to each.
    """

    entries: Sequence[Mapping[str, Any]]
    hits: Mapping[int, Sequence[bool]]
    found: Sequence[Sequence[str]]

    def summary(self) -> dict[str, Any]:
        """Shares of hits, as JSON values."""
        k = max(RANKS)
        by_category: dict[str, list[bool]] = {}
        for entry, hit in zip(self.entries, self.hits[k], strict=True):
            by_category.setdefault(entry["category"], []).append(hit)
        return (
            {"n": len(self.entries)}
            | {f"R@{k}": share(hits) for k, hits in self.hits.items()}
            | {
                f"R@{k} by category": {
                    name: {"n": len(hits)} | share(hits) for name, hits in sorted(by_category.items())
                }
            }
        )

    def pictures(self, captions: Sequence[str]) -> list[dict[str, Any]]:
        """Each picture's result, as JSON values."""
        return [
            {
                "caption": caption,
                "concept": entry["concept"],
                "category": entry["category"],
                **{f"R@{k}": hits[i] for k, hits in self.hits.items()},
                "found": self.found[i],
            }
            for i, (caption, entry) in enumerate(zip(captions, self.entries, strict=True))
        ]


def features_of(pictures: Tensor, extract: Extractor, batch: int, label: str) -> Tensor:
    """Features (N, D) of pictures (N, 3, H, W) in [-1, 1], with progress."""
    import torch
    from tqdm import tqdm

    with tqdm(total=len(pictures), desc=f"features: {label}", unit="image", disable=None) as bar:
        features = []
        for part in pictures.split(batch):
            features.append(extract(part))
            bar.update(len(part))
    return torch.cat(features)


def load_extractor() -> Extractor:
    from evaluation.metrics.extractors import ModelError
    from evaluation.metrics.extractors import load_extractor as load

    with blame("features", (ModelError,)):
        return load(FEATURES, device="cpu")
