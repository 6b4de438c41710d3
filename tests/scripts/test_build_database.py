"""scripts/build_database.py and train_searcher.py end to end, on small images."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil

import numpy as np
import pytest
import torch

from ldm.retrieval import build, embedders
from ldm.retrieval.database import open_database
from ldm.retrieval.search import ExactSearch
from tests.helpers.embedder import Means
from tests.helpers.images import scene
from tests.helpers.scripts import load_script


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven images in two folders, one of them a copy of another; a broken file; captions and terms."""
    monkeypatch.setitem(embedders.EMBEDDERS, "means", Means)
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for number in range(6):
        scene((20 + number, 24), number).save(folder / ("b" if number > 2 else ".") / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "z.png")
    (folder / "broken.png").write_text("no picture")
    (folder / "4.txt").write_text("not of an image here")
    (folder / "1.txt").write_text("\n")
    (folder / "b" / "4.txt").write_text("a red scene\nsecond")
    (folder / "b" / "LICENSE.md").write_text("terms")
    return folder


@pytest.fixture
def make(folder, tmp_path):
    main = load_script("build_database").main
    return lambda *more, out="db": main([str(folder), "--out", str(tmp_path / out), "--embedder", "means", *more])


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".jsonl"}


def test_a_folder_becomes_a_database(make, folder, tmp_path, capsys):
    assert make("--rows", "4", "--thumbnails", "6") == 0
    printed = capsys.readouterr().out
    assert "warning: 1 images are left out, which can't be read (" in printed and "broken.png" in printed
    assert "6 rows of width 12 in 2 parts, 0 of an earlier run; 8 images in the folder, 1 of them copies" in printed
    database = open_database(tmp_path / "db")
    assert (len(database), database.width, database.card.embedder) == (6, 12, "means")
    with np.load(tmp_path / "db" / "4x12-part_1.npz") as part:  # as the published code reads it
        assert part["embedding"].shape == (4, 12) and part["img_id"].shape == (4,)
        assert part["patch_coords"].tolist()[1] == [0, 0, 21, 24]
    query = database.embeddings(torch.tensor([4]))
    found = ExactSearch(database)(query, 3)
    first, *_ = database.neighbours(found.rows[0], found.similarities[0])
    assert (first.row, first.image, first.caption, first.licence) == (4, "b/4.png", "a red scene", "b/LICENSE.md")
    assert first.similarity == pytest.approx(1)
    (unknown,) = database.neighbours(torch.tensor([0]), torch.tensor([0.5]))
    assert (unknown.image, unknown.caption, unknown.licence) == ("0.png", "", "")
    shutil.rmtree(folder)
    assert database.image(first, 6).size == (6, 6)  # its thumbnail


def test_images_are_shown_from_the_folder_without_thumbnails(make, folder, tmp_path):
    make()
    database = open_database(tmp_path / "db")
    (first,) = database.neighbours(torch.tensor([0]), torch.tensor([1.0]))
    assert database.image(first, 16).size == (16, 16)
    (folder / "0.png").unlink()
    assert database.image(first, 16) is None


def test_a_stopped_build_goes_on_and_ends_the_same(make, tmp_path, monkeypatch, capsys):
    make("--rows", "2", out="whole")
    whole = files(tmp_path / "whole")
    write, calls = build.write_part, []

    def stopped(*arguments):
        calls.append(arguments[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(build, "write_part", stopped)
    assert make("--rows", "2") == 130
    with pytest.raises(ValueError, match="not finished; the same command"):
        open_database(tmp_path / "db")
    monkeypatch.setattr(build, "write_part", write)
    capsys.readouterr()
    assert make("--rows", "2") == 0
    assert "2 of an earlier run" in capsys.readouterr().out
    assert files(tmp_path / "db") == whole and len(whole) == 3


def test_new_images_are_added_and_lost_ones_stay(make, folder, tmp_path, capsys):
    make("--rows", "4")
    before = open_database(tmp_path / "db").fingerprint
    scene((30, 30), 9).save(folder / "new.png")
    (folder / "1.png").unlink()
    capsys.readouterr()
    make("--rows", "4")
    printed = capsys.readouterr().out
    assert "1 rows are of images that are no longer in the folder, or were changed; they stay" in printed
    assert "7 rows" in printed and open_database(tmp_path / "db").fingerprint != before
    (tmp_path / "db" / "2x12-part_2.npz").unlink()
    with pytest.raises(ValueError, match="2x12-part_2.npz is missing, which database.json lists"):
        open_database(tmp_path / "db")


def test_processes_change_nothing(make, tmp_path, monkeypatch):
    forked = multiprocessing.get_context("fork")  # copies of this one, without the seconds of importing PyTorch
    monkeypatch.setattr(build.multiprocessing, "get_context", lambda _: forked)
    assert make("--rows", "3", out="one") == 0 and make("--rows", "3", "--processes", "2", out="two") == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    one, two = (open_database(tmp_path / out).embeddings(torch.arange(6)) for out in ("one", "two"))
    assert torch.equal(one, two) and one.std() > 0.1


def test_the_embedder_that_comes_with_a_package(folder, tmp_path):
    build = [str(folder), "--out", str(tmp_path / "db"), "--embedder", "efficientnet-lite0"]
    assert load_script("build_database").main(build) == 0
    database = open_database(tmp_path / "db")
    embeddings = database.embeddings(torch.arange(6))
    assert database.width == 1280 and (embeddings >= 0).all() and embeddings.std(0).max() > 0.1


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["nowhere"], "FOLDER: nowhere: no such folder; expected one with images"),
        (["--embedder", "clib"], "--embedder: there is no embedder 'clib'; accepted: .*; did you mean clip?"),
        (["--embedder", "clip:nowhere"], "--embedder: clip: nowhere/model.safetensors: no such file; download"),
        (["--rows", "0"], "--rows: expected a whole number in 1..1000000; got '0'"),
    ],
)
def test_bad_arguments(arguments, why, folder, tmp_path, capsys):
    given = [*([str(folder)] if arguments[0] != "nowhere" else []), *arguments, "--out", str(tmp_path / "db")]
    assert load_script("build_database").main(given) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and not (tmp_path / "db").exists()
    assert re.search(why, error), error


def test_a_database_of_another_embedder_or_folder_is_refused(make, folder, tmp_path, capsys):
    make()
    (tmp_path / "other").mkdir()
    scene((20, 20)).save(tmp_path / "other" / "a.png")
    main = load_script("build_database").main
    capsys.readouterr()
    assert main([str(folder), "--out", str(tmp_path / "db")]) == 2
    assert "--out: " in (error := capsys.readouterr().err) and "embedder is means; got emoji" in error
    assert main([str(tmp_path / "other"), "--out", str(tmp_path / "db"), "--embedder", "means"]) == 2
    assert "its folder is " in capsys.readouterr().err
    (tmp_path / "db" / "database.json").unlink()
    assert make() == 2
    assert "has parts but no database.json" in capsys.readouterr().err
    (tmp_path / "db" / "database.json").write_text(json.dumps({"embedder": "means"}))
    assert make() == 2
    assert "database.json" in capsys.readouterr().err


def test_an_index_is_made_and_tells_its_recall(make, tmp_path, capsys):
    make()
    main, database = load_script("train_searcher").main, str(tmp_path / "db")
    target = ["-t", str(tmp_path / "index")]
    assert main(["-d", database, *target, "--kind", "flat", "-k", "3"]) == 0
    assert "flat, recall@3 1.0000 against the exact search" in capsys.readouterr().out
    assert main(["-d", database, *target, "-k", "6"]) == 2
    output = capsys.readouterr()
    assert "--knn: expected fewer than the database has rows, 6; got 6" in output.err and output.out == ""
    assert main(["-d", "nowhere", *target]) == 2
    assert "--database: nowhere: no such folder" in capsys.readouterr().err
    assert main(["-d", database, *target, "-k", "3", "--kind", "ivf-pq"]) == 2
    assert "--kind: ivf-pq needs 9984 rows at least; the database has 6" in capsys.readouterr().err


def test_the_benchmark_measures(tmp_path, capsys):
    main = load_script("benchmark_retrieval").main
    arguments = ["--rows", "400", "--width", "16", "--knn", "3", "--kind", "ivf", "--dir", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "400 rows of width 16" in printed and "x reading" in printed and "ivf, one query" in printed
    assert not [*tmp_path.iterdir()]
    for more, why in (
        (["--knn", "400"], "--knn: expected fewer than the database has rows, 400; got 400"),
        (["--kind", "ivf-pq"], "--kind: ivf-pq needs 9984 rows at least; the database has 400"),
        (["--dir", "nowhere"], "--dir: nowhere: no such directory"),
    ):
        assert main([*arguments, *more]) == 2
        output = capsys.readouterr()
        assert why in output.err and output.out == ""  # before the work
