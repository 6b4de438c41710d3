"""Concept retrieval."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evaluation.metrics.retrieval import (
    choose_queries,
    compute,
    hits_at,
    load_real_images,
    nearest,
    share,
    spread,
    standardise,
)
from ldm.data.emoji import EmojiDataset
from ldm.io.errors import SettingError
from tests.helpers.tiny_data import STYLES, write_data


def test_a_hit_is_the_concept_among_the_k_nearest_directions():
    real = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    concepts = ["apple", "pear", "pear", "apple"]
    asked = torch.tensor([[100.0, 1.0], [100.0, 1.0], [-0.01, 0.001]])  # the length does not count
    assert nearest(asked, real, 2).tolist() == [[0, 1], [0, 1], [3, 2]]
    found = np.array(concepts)[nearest(asked, real, 2)]
    assert hits_at(1, found, ["apple", "pear", "plum"]).tolist() == [True, False, False]
    assert hits_at(2, found, ["apple", "pear", "plum"]).tolist() == [True, True, False]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 5))
def test_an_image_left_out_is_one_that_is_not_there(seed, k):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(6, 4, generator=generator)
    found = nearest(real, real, k, left_out=range(6))
    for i in range(6):
        others = torch.tensor([j for j in range(6) if j != i])
        assert found[i].tolist() == others[nearest(real[i : i + 1], real[others], k)[0]].tolist()


def test_more_neighbours_than_real_images_is_an_error():
    real = torch.eye(3)
    with pytest.raises(ValueError, match=r"k must be 1\.\.3.*got 4"):
        nearest(real, real, 4)
    with pytest.raises(ValueError, match=r"k must be 1\.\.2.*got 3"):
        nearest(real, real, 3, left_out=range(3))


def test_standardise_scales_by_the_reference_alone():
    reference = torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.01]) + 7
    reference[:, 0] = 0.1  # constant
    over = standardise(reference, reference)
    torch.testing.assert_close(over.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(over.std(0, correction=0), torch.tensor([0.0, 1.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardise(reference[:2] + 5, reference)[:, 0], torch.zeros(2))
    torch.testing.assert_close(standardise(reference[:2], reference), over[:2])


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (60, 200, 0.2407, 0.3668), (200, 200, 0.9812, 1.0)],
)
def test_share_has_wilson_interval(hits, n, low, high):
    assert share([True] * hits + [False] * (n - hits)) == {"share": hits / n, "interval": [low, high]}


def entries(concepts: int) -> list[dict]:
    return [{"concept": f"c{c}", "style": style} for style in STYLES for c in range(concepts)]


@pytest.mark.parametrize("count", [1, 7, 10, 23])
def test_captions_are_spread_over_concepts_and_styles(count):
    images = entries(10)
    chosen = [images[i] for i in spread(images, count, seed=3)]
    assert len(chosen) == count
    for key, kinds in (("concept", 10), ("style", 5)):
        used = Counter(image[key] for image in chosen)
        assert max(used.values()) <= -(-count // kinds) + (key == "style")
    assert spread(images, count, seed=3) == spread(images, 50, seed=3)[:count]  # more only adds
    assert spread(images, 10, seed=3) != spread(images, 10, seed=4)


def test_a_small_split_is_taken_whole():
    assert sorted(spread(entries(2), 200, seed=0)) == list(range(10))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_images_of_the_right_concept_are_recognised(data, lite0):
    """All images of a model that draws what the captions say are; none of one that mixes up the concepts."""
    stored = np.load(data / "pictures.npy")
    real = load_real_images(data, extractor=lite0)
    queries = choose_queries(EmojiDataset(data, "train", 1), 19, seed=0)
    for shift, recognised in ((0, 1.0), (5, 0.0)):  # five images on is the next concept
        images = [Image.fromarray(stored[(entry["id"] + shift) % 20]) for entry in queries.entries]
        assert share(real.retrieve(images, queries.entries, "sampled").hits[1])["share"] == recognised


def test_a_finished_run_has_a_result(data, lite0, tmp_path):
    """The share is that of the images that show their concept: here all but the last."""
    stored, entries = np.load(data / "pictures.npy"), EmojiDataset(data, "train", 1).images[:5]
    (tmp_path / "samples").mkdir()
    lines = []
    for k, entry in enumerate(entries):
        image = stored[(entry["id"] + 5 * (k == 4)) % 20]
        Image.fromarray(image).save(tmp_path / "samples" / f"{k}.png")
        lines.append(json.dumps({"file": f"samples/{k}.png", "image_id": entry["id"]}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    result = compute(tmp_path, load_real_images(data, extractor=lite0), rank=1)
    assert result.values["R@1"] == 0.8 and result.values["R@1_interval"][0] < 0.8
    assert result.protocol["n"] == 5 and result.protocol["extractor"] == "efficientnet-lite0"
    with pytest.raises(SettingError, match="samples: "):
        compute(tmp_path / "nothing", load_real_images(data, extractor=lite0))
