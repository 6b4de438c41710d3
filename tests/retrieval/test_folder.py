"""The images of a folder with their neighbours, to train on."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.functional import normalize

from ldm.retrieval import embedders
from ldm.retrieval.build import BuildSettings, build
from ldm.retrieval.folder import NeighbourFolder
from tests.helpers.embedder import Means
from tests.helpers.images import scene


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Eight images, the last a copy of the first, and their database."""
    monkeypatch.setitem(embedders.EMBEDDERS, "means", Means)
    (tmp_path / "in").mkdir()
    for number in range(7):
        scene((24, 20 + number), number).save(tmp_path / "in" / f"{number}.png")
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "in" / "z.png")
    build(BuildSettings(tmp_path / "in", tmp_path / "db", "means", rows=3))
    return tmp_path


def test_an_image_has_its_nearest_others(place):
    data = NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=2)
    rows = normalize(data.database.embeddings(torch.arange(7)), dim=-1)
    expected = (rows @ rows.T).fill_diagonal_(-2).topk(2).indices
    assert len(data) == 8 and torch.equal(data.neighbours, torch.cat([expected, expected[:1]]))  # the copy
    example = data[3]
    assert example["image"].shape == (16, 16, 3)
    torch.testing.assert_close(example["nn_embeddings"], rows[expected[3]])


def test_images_with_one_embedding_are_not_their_own_neighbours(place):
    for number in range(4):
        scene((24, 20), 0).resize((48 + 24 * number, 40 + 20 * number), 0).save(place / "in" / f"same{number}.png")
    build(BuildSettings(place / "in", place / "db", "means", rows=3))
    data = NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=2)
    names = [path.name for path in data.paths]
    assert all(row not in found for row, found in zip(range(7), data.neighbours[:7].tolist(), strict=True)), names
    assert data.neighbours.shape == (12, 2)


def test_held_out_images_have_neighbours_too(place):
    data = NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=6, split="validation")
    assert len(data) == 1 and data[0]["nn_embeddings"].shape == (6, 12)


def test_images_that_are_not_in_the_database(place):
    scene((30, 30), 9).save(place / "in" / "new.png")
    with pytest.raises(ValueError, match="database: .* does not have .*new.png and 0 more of 9 images; scripts/build"):
        NeighbourFolder(str(place / "in"), 16, str(place / "db"))
    with pytest.raises(ValueError, match="k: expected 1..6, fewer than the database has rows; got 7"):
        (place / "in" / "new.png").unlink()
        NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=7)


def test_images_of_another_folder_are_not_taken_for_those_of_their_names(place):
    other = place / "other"
    other.mkdir()
    for number in range(3):
        shutil.copy(place / "in" / f"{2 - number}.png", other / f"{number}.png")
    data = NeighbourFolder(str(other), 16, str(place / "db"), k=2)
    own = NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=2)
    assert torch.equal(data.neighbours, own.neighbours[:3].flip(0))


def test_rows_without_a_description_are_counted_too(place):
    (place / "db" / "3x12-part_1.jsonl").unlink()
    with pytest.raises(ValueError, match="does not have .*0.png and 3 more of 8"):
        NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=2)
    for name in ("0", "1", "2", "z"):
        (place / "in" / f"{name}.png").unlink()
    data = NeighbourFolder(str(place / "in"), 16, str(place / "db"), k=2)
    assert all(row not in found for row, found in zip(range(3, 7), data.neighbours.tolist(), strict=True))
