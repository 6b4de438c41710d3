from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm.data.emoji import EmojiPictures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_emoji", ROOT / "scripts/prepare_emoji.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module      # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def folder(tmp_path):
    """Four pictures: tiers 1, 2, 1, 3; the third is a held-out pair."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    entries = [("2764", "noto", 1, "train"), ("1F9A4", "noto", 2, "train"),
               ("2764", "openmoji", 1, "heldout_pair"), ("1F9D1", "noto", 3, "train")]
    images = [{"id": i, "concept": concept, "style": style, "tier": tier, "split": split}
              for i, (concept, style, tier, split) in enumerate(entries)]
    notes = [{"id": i, "image_id": r, "caption": c} for i, (r, c) in enumerate([
        (0, "a red heart, noto style"), (1, "a dodo, noto style"), (0, "a heart, noto style"),
        (2, "a red heart, openmoji style"), (3, "a person, noto style")])]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return tmp_path


def test_pictures_are_the_stored_bytes(folder):
    data, stored = EmojiPictures(folder), np.load(folder / "pictures.npy")
    assert len(data) == 3 and data[2].shape == (3, 64, 64) and data[2].dtype == torch.float32
    back = ((data[2] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(back, stored[3])
    torch.testing.assert_close(data.batch(np.array([2, 0])), torch.stack([data[2], data[0]]), rtol=0, atol=0)


def test_split_and_tier_select(folder):
    assert [i["id"] for i in EmojiPictures(folder, max_tier=1).images] == [0]
    assert [i["id"] for i in EmojiPictures(folder, split="heldout_pair").images] == [2]
    assert EmojiPictures(folder).captions(0) == ["a red heart, noto style", "a heart, noto style"]
    with pytest.raises(IndexError):
        EmojiPictures(folder)[3]


@pytest.mark.parametrize("kwargs, why", [({"split": "test"}, "heldout_pair"), ({"max_tier": 0}, "1, 2, 3")])
def test_bad_arguments_say_what_is_accepted(folder, kwargs, why):
    with pytest.raises(ValueError, match=why):
        EmojiPictures(folder, **kwargs)


@pytest.mark.parametrize("break_it", [
    lambda f: (f / "pictures.npy").unlink(),
    lambda f: (f / "captions.json").write_text("{"),
    lambda f: (f / "pictures.npy").write_bytes((f / "pictures.npy").read_bytes()[:5000]),
    lambda f: (f / "pictures.npy").write_bytes(b""),
    lambda f: np.save(f / "pictures.npy", np.zeros((3, 64, 64, 3), np.uint8)),
    lambda f: np.save(f / "pictures.npy", np.zeros((4, 64, 64, 3), np.float32))])
def test_broken_dataset_names_the_command(folder, break_it):
    break_it(folder)
    with pytest.raises(ValueError, match="prepare_emoji.py --out") as error:
        EmojiPictures(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, words", [
    ("Grinning Face", "a grinning face"), ("red heart", "a red heart"), ("eyes", "eyes"),
    ("grapes", "grapes"), ("slice of pizza", "a slice of pizza"), ("pair of socks", "a pair of socks"),
    ("bread", "bread"), ("loaf of bread", "a loaf of bread"), ("suv", "an suv"), ("cactus", "a cactus"),
    ("octopus", "an octopus"), ("unicorn", "a unicorn"), ("glass of milk", "a glass of milk"),
    ("x-ray", "an x-ray"), ("two hearts", "two hearts"), ("two-hump camel", "a two-hump camel"),
    ("T-Rex", "a t-rex"), ("woman’s hat", "a woman's hat"),
    ("face holding back tears", "a face holding back tears"), ("Christmas tree", "a christmas tree")])
def test_phrase(prepare, name, words):
    assert prepare.phrase(name) == words


def test_keywords_point_at_one_concept(prepare):
    found = prepare.telling(["pepperoni", "cheese", "italian", "food"], "pizza",
                            accepted={"pepperoni", "cheese", "food"}, named={"cheese", "wedge", "pizza"},
                            shared={"pepperoni": 1, "cheese": 1, "food": 90})
    assert found == ["pepperoni"]


def test_spellings_of_a_code_point_agree(prepare):
    assert prepare.concept_id("2764-fe0f") == prepare.concept_id("2764") == "2764"


@pytest.fixture(scope="module")
def heldout(prepare):
    return yaml.safe_load(prepare.HELDOUT.read_text())


def test_committed_split(prepare, heldout):
    listed = yaml.safe_load(prepare.CONCEPTS.read_text())
    tier1 = {name for names in listed["tier1"].values() for name in names}
    assert 280 <= len(tier1) <= 320 and set(listed["iconic"]) <= tier1
    assert not tier1 & set(listed["dropped"])
    assert not set(heldout["concepts"].values()) & set(listed["iconic"])
    assert not set(heldout["concepts"]) & set(heldout["pairs"])
    styles = {s.name for s in prepare.STYLES}
    assert all(set(pair) < styles for pair in heldout["pairs"].values())


def test_held_out_never_trains(prepare, heldout):
    for concept in heldout["concepts"]:
        assert {prepare.split_of(concept, s.name, heldout) for s in prepare.STYLES} == {"heldout_concept"}
    for concept, held in heldout["pairs"].items():
        for style in (s.name for s in prepare.STYLES):
            assert (prepare.split_of(concept, style, heldout) == "train") == (style not in held)


def test_choice_is_by_hash_and_spares_the_iconic(prepare):
    concepts = [prepare.Concept(f"{i:X}", f"c{i}", "Objects", 1 + i % 3, ("x",)) for i in range(3000)]
    chosen = yaml.safe_load(prepare.choose_heldout(concepts, {c.name for c in concepts[:1500]}))
    assert chosen == yaml.safe_load(prepare.choose_heldout(concepts[::-1], {c.name for c in concepts[:1500]}))
    picked = [int(c, 16) for c in chosen["concepts"]]
    assert min(picked) >= 1500 and all(i % 3 < 2 for i in picked) and 30 < len(picked) < 90


def test_pictures_are_composited_on_white(prepare):
    pytest.importorskip("resvg_py")
    image = prepare.picture('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
                            '<rect x="2" y="2" width="4" height="4" fill="red"/></svg>')
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[2, 2], (255, 255, 255))
    np.testing.assert_array_equal(image[32, 32], (255, 0, 0))


def run(tmp_path, path):
    return subprocess.run([sys.executable, ROOT / "scripts/prepare_emoji.py", "--out", tmp_path / "out"],
                          env={"PATH": str(path)}, capture_output=True, text=True)


def test_without_the_package_for_svg_nothing_is_fetched(prepare, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert prepare.main(["--out", str(tmp_path / "out")]) == 2
    assert "resvg-py is needed" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_without_npm_one_line_and_exit_2(tmp_path):
    done = run(tmp_path, tmp_path)
    assert done.returncode == 2 and "npm is not installed" in done.stderr and done.stderr.count("\n") == 1


def test_failed_fetch_one_line_and_nothing_left(tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    done = run(tmp_path, tmp_path)
    assert done.returncode == 2 and "ENOTFOUND" in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["packages"]
