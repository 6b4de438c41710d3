"""Protocols, and which prompts they ask for."""

from __future__ import annotations

import json
import random
from datetime import date
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation.protocols.protocol import (
    Prompt,
    Select,
    choose,
    coco_prompts,
    load_protocol,
    protocol_names,
    read_prompts,
)
from evaluation.runs.images import ImageError, ImageFolder, prompts_of
from ldm.io.files import json_sha256
from tests.helpers.coco import captions, write_coco, write_protocol

HASHES = {  # of what each shipped protocol asks for: another number here is another protocol
    "coco2014-30k": "305fa56e3666",
    "coco2017-10k": "e4888c973695",
    "coco2017-10k-edges": "0d10a0db0e76",
    "coco2017-10k-frames": "4b530bccbb04",
    "coco2017-10k-scribble": "f73b6bb48146",
    "coco2017-10k-if": "7551d511921c",
    "coco2017-10k-sdxl": "3bff2029c72f",
    "coco2017-10k-videofusion": "72c01b87d570",
    "coco2017-5k": "2e9afe2b7b38",
    "emoji128": "99a9a88375c2",
    "emoji128-all": "65774e49d2b7",
    "emoji128-class": "0cdb7dc8f4e7",
    "emoji128-class-g6": "6edd2ab3a82c",
    "emoji128-heldout": "910a7a4daf82",
    "emoji64": "58412a7a9c68",
    "emoji64-edges": "aaf8c4152696",
    "emoji64-frames": "60c6600ea71a",
    "emoji64-heldout": "db72777dcaaa",
    "emoji64-lora": "cc9d1291251b",
    "emoji64-prompts": "1801f1fcaa5f",
    "imagenet256-50k": "ac3bc32613c3",
    "imagenet256-50k-dit": "ac3bc32613c3",
    "imagenet256-50k-g6": "47bef17e1c6f",
    "imagenet256-50k-rdm": "028805dbe401",
    "imagenet512-50k-dit": "6f66139f0e80",
}


# Protocols


def test_the_shipped_protocols_ask_for_what_they_always_did():
    assert {name: json_sha256(load_protocol(name).asked())[:12] for name in protocol_names()} == HASHES


def test_what_is_compared_is_not_what_is_asked(tmp_path):
    """Sampler, steps, metrics and words change no hash; guidance, size and selection do."""

    def asked(**changes):
        return json_sha256(load_protocol(str(write_protocol(tmp_path / "p.yaml", **changes))).asked())

    same = [
        asked(),
        asked(sampling__steps=7),
        asked(sampling__sampler="plms"),
        asked(about="x"),
        asked(metrics={"fid": ["a/b"]}),
        asked(defaults={"data": "x"}),
        asked(guidance=3),
    ]
    other = [
        asked(guidance=3.5),
        asked(size=32),
        asked(seed=1),
        asked(repeats=2),
        asked(select__count=39),
        asked(select__seed=1),
        asked(data__where={"split": "train"}),
    ]
    assert len(set(same)) == 1 and len({*same, *other}) == 1 + len(other)


def test_the_forks_two_rows_differ_in_guidance_alone():
    plain, fast = (load_protocol(name).asked() for name in ("imagenet256-50k", "imagenet256-50k-g6"))
    assert (plain.pop("guidance"), fast.pop("guidance")) == (1.5, 6.0) and plain == fast
    protocol = load_protocol("imagenet256-50k")
    assert len(choose(read_prompts(protocol, None), protocol.select)) * protocol.repeats == 50_000


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"size": 0}, "size should be greater than or equal to 1; got 0"),
        ({"size": "big"}, "size should be a valid integer; got 'big'"),
        ({"guidance": "high"}, "guidance should be a valid number; got 'high'"),
        ({"colour": 1}, "has 'colour'; accepted: .*guidance"),
        ({"data": {"kind": "films"}}, "data: Input tag 'films' .* expected tags: 'captions', 'prompts', 'classes'"),
        ({"data": {"file": "x"}}, "data: Unable to extract tag using discriminator 'kind'; got {'file': 'x'}"),
        ({"data": {"kind": "prompts"}}, "data.prompts.file is missing"),
        ({"data__split": "val"}, "data.captions.split is not a name that is accepted here"),
        ({"select__captions": "best"}, "select.captions should be 'drawn' or 'first'; got 'best'"),
        ({"select__count": 0}, "select.count should be greater than or equal to 1"),
        ({"select__most": 1}, "select has 'most'"),
        ({"sampling__steps": 0}, "sampling.steps should be greater than"),
        ({"repeats": True}, "repeats should be a valid integer; got True"),
        ({"seed": -1}, "seed should be greater than or equal to 0"),
        ({"defaults": {"colour": 1}}, "defaults.colour is not a name that is accepted here"),
        ({"select": 3}, "select should be a mapping; got 3"),
        ({"data__file": 3}, "data.captions.file should be a valid string; got 3"),
        ({"metrics": 3}, "metrics should be a mapping"),
        ({"metrics": ["fid"]}, "metrics should be a mapping"),
        ({"data": 3}, "data should be a valid dictionary"),
        ({"defaults": {"data": 3}}, "defaults.data should be a valid string; got 3"),
        ({"defaults": {"config": 3}}, "defaults.config should be a valid string; got 3"),
        (
            {"defaults": {"noise_order": "never"}},
            "defaults.noise_order should be 'before', 'after' or 'update'; got 'never'",
        ),
        ({"defaults": {"noise_below": "low"}}, "defaults.noise_below should be a valid number; got 'low'"),
        ({"guidance": True}, "guidance should be a valid number; got True"),
        ({"control": "edges"}, r"defaults.control_model: control edges needs one file; got none"),
        (
            {"control": "scribble", "defaults": {"control_model": ["x"]}},
            "defaults.hed: control scribble needs one file; got none",
        ),
        ({"control": "edges", "data": {"kind": "prompts", "file": "x"}}, "control: follows the images of captions"),
        ({"control": "edges", "video": "whole"}, "control: no control network is known for networks of videos"),
        ({"video": True, "data": {"kind": "classes", "classes": 3}}, "video: expected data of kind captions"),
        ({"guidance": float("nan")}, "guidance should be a finite number"),
        ({"sampling__sampler": 3}, "sampling.sampler should be a valid string; got 3"),
        ({"sampling__eta": "much"}, "sampling.eta should be a valid number; got 'much'"),
        *(
            ({"data__where": where}, "data.captions.where.* should be .*; got ")
            for where in (["train"], {1: 2}, {"height": [20, date(2020, 1, 1)]}, {"height": None})
        ),
        ({"size": 10**9}, "size should be less than or equal to 16384; got 1000000000"),
        ({"metrics__fid": "inception-2015/clean"}, "metrics.fid should be a valid list; got 'inception"),
        ({"metrics__fid": ["inception-2015"]}, "metrics.fid.0 should match pattern"),
        ({"metrics__clip_score": []}, "metrics.clip_score should have at least 1 item"),
        ({"metrics__kid": []}, "metrics.kid is not a name that is accepted here"),
        ({"metrics__reference": 3}, "metrics.reference should be a valid string; got 3"),
    ],
    ids=str,
)
def test_files_that_are_no_protocol_say_why(tmp_path, changes, why):
    path = write_protocol(tmp_path / "p.yaml", **changes)
    with pytest.raises(ValueError, match=f"p.yaml: not a protocol: {why}"):
        load_protocol(str(path))


def test_names_that_are_no_protocol(tmp_path):
    with pytest.raises(ValueError, match="unknown protocol 'coco'; accepted: coco2014-30k, .*FILE.yaml"):
        load_protocol("coco")
    with pytest.raises(ValueError, match="nowhere.yaml: cannot be read"):
        load_protocol("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="the file should be a mapping"):
        load_protocol(str(tmp_path / "list.yaml"))


# Prompts of measured images


def test_images_of_one_name_in_two_folders_have_their_own_prompts(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / name)
    (tmp_path / "p.json").write_text('{"b/0.png": "two", "a/0.png": "one"}')
    assert prompts_of(ImageFolder(tmp_path / "set"), tmp_path / "p.json") == ["one", "two"]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("p.json", '{"x/0.png": "one", "y/0.png": "two"}', "x/0.png, y/0.png: by name fits several, such as a/0.png"),
        ("p.json", '{"0.png": "one"}', "0.png: by name fits several"),
        ("p.json", '{"a/0.png": "one", "a/0.png": "two"}', "a/0.png is there twice"),
        ("p.jsonl", '{"file": "a/0.png", "prompt": "x"}\n{"file": "a/0.png", "prompt": "y"}', "a/0.png is there twice"),
    ],
)
def test_prompts_that_could_be_of_several_images_are_refused(tmp_path, name, content, why):
    for part in "ab":
        (tmp_path / "set" / part).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / part / "0.png")
    (tmp_path / name).write_text(content)
    with pytest.raises(ImageError, match=f"{name}: .*{why}"):
        prompts_of(ImageFolder(tmp_path / "set"), tmp_path / name)


# Selection

PROMPTS = list(coco_prompts(captions(12), {}))


@given(count=st.integers(1, 24), seed=st.integers(0, 5), order=st.randoms(use_true_random=False))
def test_the_rule_depends_on_ids_alone_and_begins_alike(count, seed, order: random.Random):
    select = Select(count=24, per_image=2, seed=seed)
    shuffled = order.sample(PROMPTS, len(PROMPTS))
    chosen = choose(PROMPTS, select)
    assert choose(shuffled, select.model_copy(update={"count": count})) == chosen[:count]
    # Each image gives one caption before any gives two.
    assert len({prompt.image for prompt in chosen[:12]}) == 12 == len({prompt.image for prompt in chosen[12:]})


def test_the_rule_is_the_one_that_is_written_down():
    images = sorted({p.image for p in PROMPTS}, key=lambda i: sha256(f"7/{i}".encode()).hexdigest())
    first = [
        min((p for p in PROMPTS if p.image == i), key=lambda p: sha256(f"7/{i}/{p.id}".encode()).hexdigest())
        for i in images
    ]
    assert choose(PROMPTS, Select(count=12, seed=7)) == first
    assert [p.id for p in choose(PROMPTS, Select(captions="first", seed=7))] == [
        min(p.id for p in PROMPTS if p.image == i) for i in images
    ]
    assert choose(PROMPTS, Select(count=12, seed=8)) != first


def test_captions_of_chosen_images_with_their_white_space_mended():
    content = captions(4)
    for image in content["images"]:
        image["split"] = "train" if image["id"] > 890 else "val"
    assert {p.image for p in coco_prompts(content, {"split": "train"})} == {900, 893}
    assert len(list(coco_prompts(content, {"split": ["train", "val"]}))) == 8
    assert PROMPTS[1] == Prompt(4989, 900, {"prompt": "a red green 0", "image_id": 900})


@pytest.mark.parametrize(
    "select, why",
    [
        (Select(count=25, per_image=2), "25 prompts are asked for, at most 2 of an image; there are 24 such"),
        (
            Select(count=13),
            r"13 prompts are asked for, at most 1 of an image; there are 12 such \(of 24 prompts of 12 images\)",
        ),
    ],
)
def test_more_prompts_than_there_are(select, why):
    with pytest.raises(ValueError, match=why):
        choose(PROMPTS, select)


def test_an_empty_selection():
    with pytest.raises(ValueError, match="there are no prompts to choose from"):
        choose([], Select())


def test_lists_of_prompts(tmp_path):
    (tmp_path / "list.txt").write_text("a red heart\n\n  an owl \n")
    (tmp_path / "list.jsonl").write_text('{"prompt": "a red heart", "id": 9}\n\n{"caption": "an owl"}\n')
    found = {}
    for name in ("list.txt", "list.jsonl"):
        path = write_protocol(tmp_path / "p.yaml", data={"kind": "prompts", "file": name})
        found[name] = [(p.id, p.inputs["prompt"]) for p in read_prompts(load_protocol(str(path)), tmp_path)]
    assert found == {"list.txt": [(0, "a red heart"), (2, "an owl")], "list.jsonl": [(9, "a red heart"), (2, "an owl")]}


@pytest.mark.parametrize(
    "text, why",
    [
        ('{"prompt": "an owl"}\n{"prompt":}\n', "line 2, column 11: not JSON"),
        ("\n", "has no prompts that p could take"),
    ],
)
def test_lists_that_are_broken_say_where(tmp_path, text, why):
    (tmp_path / "list.jsonl").write_text(text)
    protocol = write_protocol(tmp_path / "p.yaml", data={"kind": "prompts", "file": "list.jsonl"})
    with pytest.raises(ValueError, match=f"list.jsonl: {why}"):
        read_prompts(load_protocol(str(protocol)), tmp_path)


def broken(change):
    content = captions(3)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "not JSON"),
        ("[]", "it should be a mapping; got"),
        ("{}", "images is missing"),
        (broken(lambda c: c.pop("annotations")), "annotations is missing"),
        (broken(lambda c: c["annotations"][4].pop("caption")), r"annotations\.4\.caption is missing"),
        (broken(lambda c: c["annotations"][2].pop("id")), r"annotations\.2\.id is missing"),
        (broken(lambda c: c["images"][1].pop("id")), r"images\.1\.id is missing"),
        (broken(lambda c: c["annotations"][0].update(image_id=5)), r"annotations\.0 is of image 5, which is not among"),
        (
            broken(lambda c: c["annotations"][0].update(caption=" \n")),
            r"annotations\.0\.caption should have at least 1 character",
        ),
        (
            broken(lambda c: c["annotations"][0].update(caption=7)),
            r"annotations\.0\.caption should be a valid string; got 7",
        ),
        (
            broken(lambda c: c["annotations"][0].update(id="x")),
            r"annotations\.0\.id should be a valid integer; got 'x'",
        ),
        (broken(lambda c: c["annotations"][0].update(id=c["annotations"][1]["id"])), "has two prompts of one id"),
    ],
    ids=lambda value: value[:30] if "[" in value else value,
)
def test_annotations_that_are_broken_say_where(tmp_path, text, why):
    folder = write_coco(tmp_path / "coco", 1)
    (folder / "annotations" / "captions_val2017.json").write_text(text)
    protocol = load_protocol(str(write_protocol(tmp_path / "p.yaml")))
    with pytest.raises(ValueError, match=f"captions_val2017.json: .*{why}"):
        read_prompts(protocol, folder)


def test_a_field_to_choose_by_that_is_not_there(tmp_path):
    protocol = load_protocol(str(write_protocol(tmp_path / "p.yaml", data__where={"split": "val"})))
    with pytest.raises(ValueError, match=r"images\.0\.split is missing"):
        read_prompts(protocol, write_coco(tmp_path / "coco", 2))
    with pytest.raises(FileNotFoundError, match="no such file; p reads annotations/captions_val2017.json"):
        read_prompts(protocol, tmp_path)
