from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.data.captions import captions_below
from ldm.data.emoji import EmojiDataset
from ldm.data.emoji_set.concepts import Concept, check_listed, colourless, skin_tones
from ldm.data.emoji_set.dataset import choose_heldout, prepare, split_of, write_images
from ldm.data.emoji_set.drawings import chars_by_name, codes_by_name, concept_id, draw
from ldm.data.emoji_set.packages import RECIPES, Package, Recipe, Style
from ldm.data.emoji_set.phrases import phrase, telling
from ldm.io.errors import BadInput
from ldm.io.images import files_below
from ldm.training.data import CaptionShares, ImageBatches
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script

main = load_script("prepare_emoji").main

CONCEPTS = ROOT / "scripts/emoji_concepts.yaml"


@pytest.fixture
def folder(tmp_path):
    """Five images: tiers 1, 2, 1, 3, 4; the third is a held-out pair."""
    pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "pictures.npy", pictures)
    entries = [
        ("2764", "noto", 1, "train"),
        ("1F9A4", "noto", 2, "train"),
        ("2764", "openmoji", 1, "heldout_pair"),
        ("1F9D1", "noto", 3, "train"),
        ("1F9D1-1F3FD", "noto", 4, "train"),
    ]
    images = [
        {"id": i, "concept": concept, "style": style, "tier": tier, "split": split}
        for i, (concept, style, tier, split) in enumerate(entries)
    ]
    notes = [
        {"id": i, "image_id": r, "caption": c}
        for i, (r, c) in enumerate(
            [
                (0, "a red heart, noto style"),
                (1, "a dodo, noto style"),
                (0, "a heart, noto style"),
                (2, "a red heart, openmoji style"),
                (3, "a person, noto style"),
            ]
        )
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return tmp_path


def test_images_are_the_stored_bytes(folder):
    data, stored = EmojiDataset(folder), np.load(folder / "pictures.npy")
    assert len(data) == 3 and data[2].shape == (3, 64, 64) and data[2].dtype == torch.float32
    back = ((data[2] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(back, stored[3])
    torch.testing.assert_close(data.batch(np.array([2, 0])), torch.stack([data[2], data[0]]), rtol=0, atol=0)


def test_split_and_tier_select(folder):
    assert [i["id"] for i in EmojiDataset(folder, max_tier=1).images] == [0]
    assert [i["id"] for i in EmojiDataset(folder, max_tier=4).images] == [0, 1, 3, 4]
    assert [i["id"] for i in EmojiDataset(folder, split="heldout_pair").images] == [2]
    assert EmojiDataset(folder).captions(0) == ["a red heart, noto style", "a heart, noto style"]
    with pytest.raises(IndexError):
        EmojiDataset(folder)[3]


@pytest.mark.parametrize("kwargs, why", [({"split": "test"}, "heldout_pair"), ({"max_tier": 0}, "1, 2, 3, 4")])
def test_bad_arguments_say_what_is_accepted(folder, kwargs, why):
    with pytest.raises(ValueError, match=why):
        EmojiDataset(folder, **kwargs)


CAPTIONS, GROUPS = ["a red heart, noto style", "a love, noto style"], ["a heart, noto style"]


@pytest.mark.parametrize(
    "shares, drawn",
    [
        ({}, {"a red heart, noto style"}),
        ({"name": 0.0}, {"a love, noto style"}),
        ({"group": 1.0}, {"a heart, noto style"}),
        ({"style": 0.0}, {"a red heart"}),
        (
            {"name": 0.5, "group": 0.5, "style": 0.5},
            {f"{words}{style}" for words in ("a red heart", "a love", "a heart") for style in ("", ", noto style")},
        ),
    ],
)
def test_shares_of_captions(shares, drawn):
    torch.manual_seed(0)
    assert {CaptionShares(**shares).draw(CAPTIONS, GROUPS) for _ in range(200)} == drawn
    assert CaptionShares(**shares).draw(CAPTIONS[:1], []).startswith("a red heart")


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"style_share must lie in \[0, 1\]; got 1.5"):
        CaptionShares(style=1.5)


def test_flip_mirrors_half_of_the_images(folder):
    data = EmojiDataset(folder)
    torch.manual_seed(0)
    flipped = [
        bool((image == data[1].flip(-1)).all())
        for image in (ImageBatches(data, [1], flip=True)[0]["image"] for _ in range(100))
        if (image == data[1]).all() or (image == data[1].flip(-1)).all()
    ]
    assert len(flipped) == 100 and 30 < sum(flipped) < 70
    assert all((ImageBatches(data, [1])[0]["image"] == data[1]).all() for _ in range(20))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda f: (f / "pictures.npy").unlink(),
        lambda f: (f / "captions.json").write_text("{"),
        lambda f: (f / "pictures.npy").write_bytes((f / "pictures.npy").read_bytes()[:5000]),
        lambda f: (f / "pictures.npy").write_bytes(b""),
        lambda f: np.save(f / "pictures.npy", np.zeros((3, 64, 64, 3), np.uint8)),
        lambda f: np.save(f / "pictures.npy", np.zeros((5, 64, 64, 3), np.float32)),
    ],
)
def test_broken_dataset_names_the_command(folder, break_it):
    break_it(folder)
    with pytest.raises(ValueError, match="prepare_emoji.py --out") as error:
        EmojiDataset(folder)
    assert "\n" not in str(error.value)


def test_images_that_are_not_numbered_by_their_places(folder):
    text = (folder / "captions.json").read_text()
    (folder / "captions.json").write_text(text.replace('"id": 0', '"id": 9', 1))
    with pytest.raises(ValueError, match="expected as many, with ids 0, 1, 2, ... in order"):
        EmojiDataset(folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Grinning Face", "a grinning face"),
        ("red heart", "a red heart"),
        ("eyes", "eyes"),
        ("grapes", "grapes"),
        ("slice of pizza", "a slice of pizza"),
        ("pair of socks", "a pair of socks"),
        ("bread", "bread"),
        ("loaf of bread", "a loaf of bread"),
        ("suv", "an suv"),
        ("cactus", "a cactus"),
        ("octopus", "an octopus"),
        ("unicorn", "a unicorn"),
        ("glass of milk", "a glass of milk"),
        ("x-ray", "an x-ray"),
        ("two hearts", "two hearts"),
        ("two-hump camel", "a two-hump camel"),
        ("T-Rex", "a t-rex"),
        ("woman’s hat", "a woman's hat"),
        ("face holding back tears", "a face holding back tears"),
        ("Christmas tree", "a christmas tree"),
    ],
)
def test_phrase(name, words):
    assert phrase(name) == words


def test_keywords_point_at_one_concept():
    found = telling(
        ["pepperoni", "cheese", "italian", "food"],
        "pizza",
        accepted={"pepperoni", "cheese", "food"},
        named={"cheese", "wedge", "pizza"},
        shared={"pepperoni": 1, "cheese": 1, "food": 90},
    )
    assert found == ["pepperoni"]


def test_spellings_of_a_code_point_agree():
    assert concept_id("2764-fe0f") == concept_id("2764") == "2764"


def test_icons_without_code_points_are_found_by_name():
    codes = {"robot": "1F916", "raisedfist": "270A", "pizza": "1F355"}
    icons = {
        "icons": dict.fromkeys(["robot-2", "robot", "pizza-1", "pizza-2", "brazil", "raised_fist"]),
        "aliases": {"fist": {"parent": "raised_fist"}},
    }
    assert chars_by_name(icons, codes) == {"1F916": "robot", "270A": "raised_fist", "1F355": "pizza-1"}


def test_dogside_is_the_dog_and_dog_is_its_face():
    codes = {"dog": "1F415", "dogface": "1F436", "dragon": "1F409"}
    icons = {"icons": dict.fromkeys(["dog", "dogside", "dragonside"])}
    assert chars_by_name(icons, codes) == {"1F436": "dog", "1F415": "dogside", "1F409": "dragonside"}


@pytest.mark.parametrize(
    "name, tier, open_caption",
    [
        ("red heart", 1, ("a heart",)),
        ("large orange diamond", 2, ("a large diamond",)),
        ("fox", 1, ()),
        ("man: red hair", 3, ()),
        ("orange", 2, ()),
    ],
)
def test_colour_is_left_open(name, tier, open_caption):
    assert colourless(name, tier) == open_caption


def test_a_group_that_no_emoji_has_is_said():
    listed = {"tier1": {}, "iconic": [], "extra": [], "dropped": [], "names": {}, "groups": {"hart": ["a heart"]}}
    with pytest.raises(BadInput, match="groups that no emoji has: hart"):
        check_listed(listed, set(), {"heart"})


def test_the_first_source_that_knows_a_name_counts():
    codes = codes_by_name(
        [{"1f436": "dog-face", "1f415": "dog"}],
        [
            {"name": "DOG FACE", "unified": "1F436", "short_names": ["dog"]},
            {"name": None, "unified": "2764-FE0F", "short_names": ["heart"]},
        ],
        [{"annotation": "red heart", "hexcode": "2764"}],
    )
    assert codes["dog"] == "1F415" and codes["dogface"] == "1F436" and codes["heart"] == codes["redheart"] == "2764"


def test_a_skin_tone_is_held_out_with_its_concept():
    hand = Concept(
        "1F44B",
        "waving hand",
        "People & Body",
        2,
        ("a waving hand", "a hello"),
        "1F44B",
        ("a hand",),
        "hand-fingers-open",
    )
    emoji = [
        {
            "unified": "1F44B",
            "skin_variations": {"1F3FD": {"unified": "1F44B-1F3FD"}, "1F3FD-1F3FF": {"unified": "1F44B-1F3FD-1F3FF"}},
        }
    ]
    [toned] = skin_tones([hand], emoji)
    assert (toned.id, toned.tier, toned.base) == ("1F44B-1F3FD", 4, "1F44B")
    assert toned.phrases == ("a waving hand with medium skin tone",)
    assert toned.groups == ("a waving hand", "a hand")


@pytest.fixture(scope="module", params=[64, 128])
def recipe(request):
    return RECIPES[request.param]


@pytest.fixture(scope="module")
def heldout(recipe):
    return yaml.safe_load(recipe.heldout.read_text())


def test_committed_split(recipe, heldout):
    listed = yaml.safe_load(CONCEPTS.read_text())
    tier1 = {name for names in listed["tier1"].values() for name in names}
    assert 280 <= len(tier1) <= 320 and set(listed["iconic"]) <= tier1
    assert not tier1 & set(listed["dropped"])
    assert not set(heldout["concepts"].values()) & set(listed["iconic"])
    assert not set(heldout["concepts"]) & set(heldout["pairs"])
    styles = {s.name for s in recipe.styles}
    assert all(set(pair) < styles for pair in heldout["pairs"].values())


def test_held_out_never_trains(recipe, heldout):
    for concept in heldout["concepts"]:
        assert {split_of(concept, s.name, heldout) for s in recipe.styles} == {"heldout_concept"}
    for concept, held in heldout["pairs"].items():
        for style in (s.name for s in recipe.styles):
            assert (split_of(concept, style, heldout) == "train") == (style not in held)


def test_choice_is_by_hash_and_spares_the_iconic():
    concepts = [Concept(f"{i:X}", f"c{i}", "Objects", 1 + i % 3, ("x",), f"{i:X}", (), "tool") for i in range(3000)]
    iconic = {c.name for c in concepts[:1500]}
    text = choose_heldout(concepts, iconic, "emoji0", ["noto", "openmoji"])
    chosen = yaml.safe_load(text)
    assert chosen == yaml.safe_load(choose_heldout(concepts[::-1], iconic, "emoji0", ["noto", "openmoji"]))
    assert "training of emoji0" in text
    picked = [int(c, 16) for c in chosen["concepts"]]
    assert min(picked) >= 1500 and all(i % 3 < 2 for i in picked) and 30 < len(picked) < 90
    assert {s for styles in chosen["pairs"].values() for s in styles} == {"noto", "openmoji"}


SQUARE = '<rect x="2" y="2" width="4" height="4" fill="{}"/>'
EMOJI = [
    {
        "unified": code,
        "sort_order": i,
        "category": category,
        "subcategory": group,
        "name": name.upper(),
        "short_names": [name.replace(" ", "_")],
        "skin_variations": tones,
    }
    for i, (code, category, group, name, tones) in enumerate(
        [
            ("1F44B", "People & Body", "hand-fingers-open", "waving hand", {"1F3FF": {"unified": "1F44B-1F3FF"}}),
            ("1F525", "Travel & Places", "sky & weather", "fire", {}),
            ("1F1E7-1F1F7", "Flags", "country-flag", "flag brazil", {}),
        ]
    )
]


@pytest.fixture
def packages(tmp_path):
    """A recipe of two icon sets, one without code points, whose packages lie in the cache already."""
    cache, sets = tmp_path / "packages", {}
    for name, files in {
        "charted": {
            "icons.json": {
                "icons": {
                    n: {"body": SQUARE.format(c)}
                    for n, c in (("wave", "red"), ("wave-dark", "maroon"), ("fire", "orange"), ("br", "green"))
                },
                "width": 8,
                "height": 8,
                "aliases": {"flame": {"parent": "fire"}},
            },
            "chars.json": {"1f44b": "wave", "1f44b-1f3ff": "wave-dark", "1f525": "flame", "1f1e7-1f1f7": "br"},
        },
        "named": {"icons.json": {"icons": {"fire-2": {"body": SQUARE.format("blue")}}, "width": 8, "height": 8}},
        "google": {"emoji.json": EMOJI},
        "openmoji": {"openmoji.json": []},
        "lib": {"lib.json": {}},
    }.items():
        sets[name] = Package(name, "1", tuple(files))
        for file, content in files.items():
            (cache / sets[name].folder).mkdir(parents=True, exist_ok=True)
            (cache / sets[name].folder / file).write_text(json.dumps(content))
    listed = {
        "tier1": {"all": ["fire"]},
        "iconic": [],
        "extra": [],
        "dropped": [],
        "names": {},
        "keywords": [],
        "subcategories": ["hand-fingers-open"],
        "groups": {"hand-fingers-open": ["a hand"]},
    }
    (tmp_path / "concepts.yaml").write_text(yaml.safe_dump(listed))
    heldout = tmp_path / "emoji0/heldout.yaml"
    heldout.parent.mkdir()
    heldout.write_text(yaml.safe_dump({"concepts": {"1F44B": "waving hand"}, "pairs": {"1F525": ["two"]}}))
    styles = [Style(name, sets[s], "MIT", "", "") for name, s in (("one", "charted"), ("two", "named"))]
    return Recipe(128, tuple(styles), True, heldout, (sets["google"], sets["openmoji"], sets["lib"])), cache


def test_a_dataset_from_icon_sets(packages, tmp_path, capsys):
    pytest.importorskip("resvg_py")
    recipe, cache = packages
    captions = prepare(recipe, tmp_path / "out", cache, tmp_path / "concepts.yaml")
    assert [(i["concept"], i["style"], i["tier"], i["split"]) for i in captions["images"]] == [
        ("1F525", "one", 1, "train"),
        ("1F44B", "one", 2, "heldout_concept"),
        ("1F44B-1F3FF", "one", 4, "heldout_concept"),
        ("1F525", "two", 1, "heldout_pair"),
    ]
    assert [(n["kind"], n["caption"]) for n in captions["annotations"]] == [
        ("name", "fire, one style"),
        ("name", "a waving hand, one style"),
        ("group", "a hand, one style"),
        ("name", "a waving hand with dark skin tone, one style"),
        ("group", "a waving hand, one style"),
        ("group", "a hand, one style"),
        ("name", "fire, two style"),
    ]
    images = np.load(tmp_path / "out/pictures.npy")
    assert images.shape == (4, 128, 128, 3)
    assert [tuple(p[64, 64]) for p in images] == [(255, 165, 0), (255, 0, 0), (128, 0, 0), (0, 0, 255)]
    data = EmojiDataset(tmp_path / "out", split="heldout_concept", max_tier=4)
    assert data.captions(0) == ["a waving hand, one style"] and data.groups(0) == ["a hand, one style"]
    assert main(["--size", "128", "--out", str(tmp_path / "out"), "--images", str(tmp_path / "files")]) == 0
    paths = files_below(tmp_path / "files" / "one")
    assert [Image.open(path).getpixel((64, 64)) for path in paths] == [(128, 0, 0), (255, 0, 0), (255, 165, 0)]
    assert captions_below(tmp_path / "files" / "one", paths)[paths[2]] == ["fire, one style"]
    assert (tmp_path / "files" / "one" / "LICENSE").read_text().startswith("MIT\n")
    only = ["--out", str(tmp_path / "out"), "--images", str(tmp_path / "fire"), "--only"]
    assert main([*only, "fire"]) == 0
    found = captions_below(tmp_path / "fire", files_below(tmp_path / "fire"))
    assert [*found.values()] == [["fire, one style"], ["fire, two style"]]
    capsys.readouterr()
    assert main([*only, "fires"]) == 2
    assert (
        "--only: 'fires' is no split or concept in" in (said := capsys.readouterr().err)
        and "did you mean fire?" in said
    )
    assert main(["--only", "fire"]) == 2 and "--only: goes with --images" in capsys.readouterr().err
    assert main([*only[:3], str(tmp_path / "plain"), "--max-tier", "3"]) == 0
    assert {path.stem for path in files_below(tmp_path / "plain")} == {"1F44B", "1F525"}  # without the skin tone
    assert main([*only, "waving hand: dark skin tone", "--max-tier", "3"]) == 2
    assert "--images: no image of" in capsys.readouterr().err


def test_images_are_written_as_numpy_saves_them(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "expected.npy", images)
    write_images(tmp_path / "pictures.npy", list(images))
    assert (tmp_path / "pictures.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_images_are_composited_on_white():
    pytest.importorskip("resvg_py")
    image = draw(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">'
        '<rect x="2" y="2" width="4" height="4" fill="red"/></svg>',
        64,
    )
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[2, 2], (255, 255, 255))
    np.testing.assert_array_equal(image[32, 32], (255, 0, 0))


def run(tmp_path, path):
    return subprocess.run(
        [sys.executable, ROOT / "scripts/prepare_emoji.py", "--out", tmp_path / "out"],
        env={"PATH": str(path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_without_the_package_for_svg_nothing_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "resvg-py is needed" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--out", "--cache", "--images"])
def test_a_folder_that_can_not_be_is_said_before_anything_is_fetched(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setenv("PATH", "")  # nothing can be
    (tmp_path / "file").touch()
    for place in ("n" * 5000, str(tmp_path / "file")):
        assert main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), flag, place]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"prepare_emoji.py: error: {flag}: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


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
