"""Folders and arrays of images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evaluation.runs.images import ImageArray, ImageError, ImageFolder, left_out_warnings, open_images
from tests.helpers.measures import N, draw


def test_an_array_is_a_folder(sets, tmp_path):
    levels = np.stack([np.array(draw(i)) for i in range(N)])
    np.savez(tmp_path / "a.npz", arr_0=levels, arr_1=np.arange(N))
    np.savez_compressed(tmp_path / "c.npz", arr_0=levels)
    np.save(tmp_path / "a.npy", levels)
    folder = list(open_images(sets / "plain"))
    for name in ("a.npz", "c.npz", "a.npy"):
        assert all(torch.equal(a, b) for a, b in zip(open_images(tmp_path / name), folder, strict=True))


def test_content_and_not_names_are_hashed(sets, tmp_path):
    for i, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        draw(1).save(tmp_path / name / f"{i}.png")
    assert (
        ImageFolder(tmp_path / "x").sha256()
        == ImageFolder(tmp_path / "y").sha256()
        != ImageFolder(sets / "plain").sha256()
    )


def test_how_images_were_made_is_found(sets, tmp_path):
    made = ImageFolder(sets / "fast").provenance
    assert made["plan"] == {"keys": [0, 4], "noise_weight": 0.0} and made["seeds"] == [7]
    assert (made["weights"], made["steps"], made["stated_by"]) == ("abc", 9, "settings in the images")
    assert ImageFolder(sets / "real").provenance["stated_by"] is None
    draw(0).save(tmp_path / "0.png")
    (tmp_path / "run.json").write_text(json.dumps({"plan": "p", "protocol_sha256": "q"}))
    assert ImageFolder(tmp_path).provenance == {
        "plan": "p",
        "seeds": None,
        "weights": None,
        "protocol_sha256": "q",
        "stated_by": "run.json",
    }
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ImageError, match="run.json: not a run card"):
        _ = ImageFolder(tmp_path).provenance


def test_array_is_read_piece_by_piece(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    images = ImageArray(tmp_path / "a.npz")
    assert next(iter(images)).shape == (3, 4, 4) and len(images.names) == 3


def test_files_that_a_folder_leaves_out_are_said(tmp_path):
    for suffix in ("png", "tif", "TIFF", "gif"):
        draw(0).save(tmp_path / f"a.{suffix}")
    for name in ("b.psd", "notes.txt", "run.json", ".hidden"):
        (tmp_path / name).touch()
    images = ImageFolder(tmp_path)
    assert len(images.names) == 4
    (warning,) = left_out_warnings(images)
    assert "2 of 6 files are left out" in warning and warning.endswith(" (b.psd, notes.txt)")
    for name in ("b.psd", "notes.txt"):
        (tmp_path / name).unlink()
    assert left_out_warnings(ImageFolder(tmp_path)) == []
