"""Figures of retrieval-augmented models, on the published architecture at a tiny width, with the encoder that ships."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn.functional import normalize

from evaluation.figures import main
from evaluation.plots import retrieval
from evaluation.plots.retrieval import neighbours_of
from ldm.retrieval.database import open_database
from tests.helpers.images import scene
from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import tiny_model

ROWS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and two databases: of images, and of the same in other colours."""
    place = tmp_path_factory.mktemp("rdm")
    tiny_model(
        place / "model",
        "configs/retrieval-augmented-diffusion/768x768.yaml",
        latent=4,
        unet_config__params={"context_dim": 192, "channel_mult": [1, 2], "attention_resolutions": [2, 1]},
        first_stage_config__params__ddconfig__ch_mult=[1, 1, 1],
    )
    with (place / "model" / "config.yaml").open("a") as config:
        config.write("sampling: {embedder: emoji, scale: 2.0}\n")
    for name, colours in (("plain", lambda image: image), ("inverted", ImageOps.invert)):
        (place / "pictures" / name).mkdir(parents=True)
        for number in range(ROWS):
            picture = colours(scene((32, 32), number).rotate(40 * number))
            picture.save(place / "pictures" / name / f"{number}.png")
        build = [str(place / "pictures" / name), "--out", str(place / name), "--embedder", "emoji"]
        assert load_script("build_database").main(build) == 0
    (place / "prompts.txt").write_text("a cat\na red heart\n")
    return place


def figure(place, out, kind, *more):
    model = [
        f"--{flag}={place / 'model' / file}"
        for flag, file in (("config", "config.yaml"), ("ckpt", "model.safetensors"))
    ]
    return main([kind, *more, "--steps=2", *model, f"--prompts={place / 'prompts.txt'}", f"--out={out}"])


def test_texts_and_neighbours_of_two_databases(place, tmp_path):
    bases = [str(place / "plain"), str(place / "inverted")]
    assert figure(place, tmp_path, "databases", "--databases", *bases, "--count=2", "--knn=2") == 0
    record = json.loads((tmp_path / "databases.json").read_text())
    of_each = [f"{name}: nearest made of 2 of it" for name in ("plain", "inverted")]
    assert " ".join(record["values"]["columns"]) == " ".join(["the text alone", *of_each])
    assert record["guidance"] == 2.0
    assert Image.open(tmp_path / "databases.png").width > 500


def test_without_flags_the_model_and_the_database_are_those_that_ship(tmp_path):
    assert main(["databases", "--count=1", "--steps=1", f"--out={tmp_path}"]) == 0
    record = json.loads((tmp_path / "databases.json").read_text())
    assert "Model emoji," in record["caption"] and "database" in " ".join(record["values"]["columns"])


def test_other_figures_are_of_the_texts_alone(place, tmp_path):
    assert figure(place, tmp_path, "expected", "--count=2") == 0
    assert len(json.loads((tmp_path / "expected.json").read_text())["values"]["psnr"]["step 0"]["images"]) == 2


def test_neighbours_are_other_rows_of_the_smaller_database(place):
    database, rows = open_database(place / "plain"), torch.arange(ROWS)
    own = normalize(database.embeddings(rows), dim=-1)
    for size in (ROWS, 4):
        contexts = neighbours_of(database, rows, 2, size).contexts  # (ROWS, 2, D)
        alike = torch.einsum("qkd,nd->qkn", contexts, own) > 0.9999
        assert not alike[rows, :, rows].any() and len(alike.any(1).any(0).nonzero()) <= size


def test_quality_by_neighbours_and_size(place, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "RESAMPLES", 3)
    asked = ["--databases", str(place / "plain"), "--count=4", "--knns", "2", "--sizes", "5"]
    assert figure(place, tmp_path, "neighbours", *asked) == 0
    values = json.loads((tmp_path / "neighbours.json").read_text())["values"]
    assert [*values] == ["2 neighbours, 6 images", "4 neighbours, 5 images"]
    assert all(0 <= of["precision"] <= 1 and of["fid_real"] > 0 for of in values.values())
    one, other = map(np.load, sorted((tmp_path / "neighbours-rows").iterdir()))
    assert one.shape == other.shape == (4, 16, 16, 3) and (one != other).any()
    assert figure(place, tmp_path, "neighbours", *asked, "--precision", "autocast") == 0
    assert len([*(tmp_path / "neighbours-rows").iterdir()]) == 4, "of another precision, other images"


@pytest.mark.parametrize(
    "kind, asked, wrong",
    [
        ("databases", ["--databases", "nowhere"], "--databases: nowhere: no such folder"),
        ("databases", ["--databases", "{}/plain", "--knn=7"], "--knn: expected 1..6, the rows of "),
        ("neighbours", ["--databases", "{}/plain", "{}/inverted"], "--databases: expected one, "),
        ("neighbours", ["--databases", "{}/plain", "--count=4", "--knns=6", "--sizes=5"], "--knns: k: expected 1..5, "),
    ],
)
def test_bad_input_is_one_line(kind, asked, wrong, place, tmp_path, capsys):
    count = ["--count=2"] if kind == "databases" else []
    assert figure(place, tmp_path / "out", kind, *(text.replace("{}", str(place)) for text in asked), *count) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"figures.py: error: {wrong}")
