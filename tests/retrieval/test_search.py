"""Neighbours in a database: the published numbers, and laws of the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ldm.io.errors import SettingError
from ldm.retrieval import part, search
from ldm.retrieval.database import open_database
from ldm.retrieval.index import open_index, spread, train_index
from ldm.retrieval.search import ExactSearch
from tests.helpers.goldens import load_case


def write(folder, embeddings, parts=1, save=np.savez, first=1, **arrays):
    """A database in the published layout."""
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(embeddings)), parts), start=first):
        fields = {name: values[rows] for name, values in {"embedding": embeddings, **arrays}.items()}
        save(folder / f"{len(rows)}x{embeddings.shape[1]}-part_{number}.npz", **fields)
    return folder


def clusters(rows=300, width=8, seed=0):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((6, width))
    return (centres[random.integers(6, size=rows)] + 0.3 * random.standard_normal((rows, width))).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["mapped", "compressed"])
@pytest.mark.parametrize("name", ["rdm_retrieval", "rdm_retrieval_768"])
def test_golden(name, save, tmp_path, monkeypatch):
    monkeypatch.setattr(part, "CHUNK_BYTES", 1 << 13)  # several chunks a part
    case, tensors = load_case(name)
    arrays = {key.removeprefix("database."): value.numpy() for key, value in tensors.items() if "database." in key}
    database = open_database(write(tmp_path, arrays.pop("embedding"), case["parts"], save, **arrays))
    found = ExactSearch(database)(tensors["text"], case["k"])
    assert torch.equal(found.rows, tensors["nns"])
    torch.testing.assert_close(found.similarities, tensors["distances"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        normalize(database.embeddings(found.rows), dim=-1), tensors["nn_embeddings"], atol=1e-6, rtol=1e-5
    )
    for key, value in (("img_id", "img_ids"), ("patch_coords", "nn_patch_coords")):
        assert (database.field(key, found.rows) == tensors[value].numpy()).all()


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    embeddings = clusters(60)
    database = open_database(write(tmp_path, embeddings, 12))  # part_10 comes after part_9
    assert torch.equal(database.embeddings(torch.arange(60)), torch.from_numpy(embeddings))


def test_neither_chunks_nor_other_queries_nor_stored_lengths_change_what_is_found(tmp_path, monkeypatch):
    embeddings, queries = clusters(), torch.from_numpy(clusters(7, seed=1))
    database = open_database(write(tmp_path / "one", embeddings, 2))
    found = ExactSearch(database)(queries, 5)
    cosines = normalize(queries) @ normalize(torch.from_numpy(embeddings)).T
    assert torch.equal(found.rows, cosines.topk(5).indices)
    monkeypatch.setattr(part, "CHUNK_BYTES", 100)
    monkeypatch.setattr(search, "CHOSEN_FROM", 1)
    lengths = np.linalg.norm(embeddings, axis=1)
    for folder, arrays in (("two", {}), ("three", {"length": lengths})):
        other = ExactSearch(open_database(write(tmp_path / folder, embeddings, 3, **arrays)))
        assert torch.equal(other(queries, 5).rows, found.rows)
        assert torch.equal(other(17 * queries[2:3], 5).rows, found.rows[2:3])
    assert len(found.rows.unique()) > 5
    with_wrong_lengths = write(tmp_path / "four", embeddings, length=lengths**3)
    assert not torch.equal(ExactSearch(open_database(with_wrong_lengths))(queries, 5).rows, found.rows)


def test_a_bare_npy_file_and_half_precision_are_read(tmp_path):
    embeddings = clusters().astype(np.float16)
    np.save(tmp_path / "all.npy", embeddings)
    queries = torch.from_numpy(clusters(3, seed=2))
    found = ExactSearch(open_database(tmp_path))(queries, 4)
    true = normalize(queries) @ normalize(torch.from_numpy(embeddings).float()).T
    assert torch.equal(found.rows, true.topk(4).indices)


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_finds_what_the_exact_search_finds(kind, tmp_path):
    database = open_database(write(tmp_path / "db", clusters(), 3))
    *_, last = train_index(database, kind, tmp_path / "index", 0.9, 5)
    assert last.recall >= 0.9
    queries = torch.from_numpy(clusters()[:20]) + 0.05 * torch.randn(20, 8)
    true, found = ExactSearch(database)(queries, 5), open_index(tmp_path / "index", database)(queries, 5)
    assert (true.rows == found.rows).float().mean() > (0.8 if kind == "ivf" else 0.99)
    same = true.rows == found.rows
    torch.testing.assert_close(found.similarities[same], true.similarities[same])
    # More than the clusters hold that are looked through: none is made up.
    assert torch.equal(open_index(tmp_path / "index", database)(queries, 300).rows.sort().values[0], torch.arange(300))


def test_an_index_that_may_find_nothing_is_measured_too(tmp_path):
    database = open_database(write(tmp_path / "db", clusters(40)))
    (trial,) = train_index(database, "flat", tmp_path / "index", 0, 5)
    assert trial.recall == 1 and len(open_index(tmp_path / "index", database)(torch.ones(1, 8), 5).rows[0]) == 5


def test_rows_that_stand_for_all_are_rows_of_a_large_database_too():
    rows = spread(16_777_220, 100)  # whose last row float32 has no number for
    assert len(rows) == 100 and rows[0] == 0 and rows[-1] == 16_777_219


def test_an_index_that_is_older_than_its_database_is_refused(tmp_path):
    database = open_database(write(tmp_path / "db", clusters(), 3))
    [*train_index(database, "flat", tmp_path / "index", 0.9, 5)]
    write(tmp_path / "db", clusters(50, seed=3), first=4)
    with pytest.raises(ValueError, match="not of .* as it is now; .*train_searcher.py makes the index again"):
        open_index(tmp_path / "index", open_database(tmp_path / "db"))
    (tmp_path / "index" / "index.faiss").write_bytes(b"IxF")
    with pytest.raises(ValueError, match="index.faiss: a damaged index"):
        open_index(tmp_path / "index", database)
    with pytest.raises(ValueError, match="no index; .*without one the search is exact"):
        open_index(tmp_path / "nowhere", database)


def damaged(tmp_path, name):
    folder = write(tmp_path, clusters(30), 3, np.savez_compressed if name == "content" else np.savez)
    path = folder / "10x8-part_2.npz"
    if name == "missing":
        path.unlink()
    elif name == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif name == "content":
        data = bytearray(path.read_bytes())
        data[120] ^= 255
        path.write_bytes(bytes(data))
    elif name == "width":
        np.savez(path, embedding=np.ones((10, 9), np.float32))
    elif name == "array":
        np.savez(path, other=np.ones((10, 8), np.float32))
    elif name == "shape":
        np.savez(path, embedding=np.ones(8, np.float32))
    elif name == "NaN":
        np.savez(path, embedding=np.full((10, 8), np.nan, np.float32))
    elif name == "pickle":
        np.savez(path, embedding=np.array([{}, {}], dtype=object))
    return folder


@pytest.mark.parametrize(
    "name, why",
    [
        ("missing", "part 2 is missing; there are parts 1 to 3"),
        ("cut", "part_2.npz: File is not a zip file"),
        ("content", "part_2.npz: "),
        ("width", "part_2.npz: embeddings 9 wide; those of .*part_1.npz are 8"),
        ("array", "part_2.npz: has no array embedding"),
        ("shape", r"part_2.npz: embedding is float32 \(8,\); expected numbers \(rows, width\)"),
        ("NaN", "has embeddings that are not finite"),
        ("pickle", "part_2.npz: an array of object"),
    ],
)
def test_damaged_parts_are_named(name, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        ExactSearch(open_database(damaged(tmp_path, name)))(torch.ones(1, 8), 3)


@pytest.mark.parametrize(
    "queries, k, why",
    [
        (torch.ones(1, 9), 3, "database: .*: embeddings 8 wide; the queries are 9 wide"),
        (torch.ones(1, 8), 31, "knn: expected 1..30, the rows of .*; got 31"),
        (torch.full((1, 8), torch.nan), 3, "queries: expected finite embeddings"),
    ],
)
def test_queries_that_do_not_fit(queries, k, why, tmp_path):
    with pytest.raises(SettingError, match=why):
        ExactSearch(open_database(write(tmp_path, clusters(30))))(queries, k)


def test_a_folder_that_is_no_database(tmp_path):
    with pytest.raises(ValueError, match="no parts; expected files NAME-part_NUMBER.npz"):
        open_database(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder, nor .*; scripts/build_database.py makes one"):
        open_database("nowhere")
