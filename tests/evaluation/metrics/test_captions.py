"""The prompts that images were made from."""

from __future__ import annotations

import json

import pytest

from evaluation.runs.images import ImageError, ImageFolder, prompts_of
from tests.helpers.measures import N


def test_prompts_are_found(sets, tmp_path):
    images = ImageFolder(sets / "plain")
    in_images = [f"shapes {i}" for i in range(N)]
    assert prompts_of(images, None) == in_images
    entries = [{"file": f"samples/{name}", "prompt": f"p {name}"} for name in images.names]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "m.json").write_text(json.dumps({name: f"p {name}" for name in images.names}))
    for name in ("m.jsonl", "m.json"):
        assert prompts_of(images, tmp_path / name) == [f"p {name}" for name in images.names]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("p.txt", "one\ntwo", "has 2 prompts for 22 images in .*; expected one line for each"),
        ("p.json", "{}", "no prompt for 22 of 22 images, such as 00-a.png"),
        ("p.json", '{"00-a.png": 3}', "not prompts: expected a text for every file"),
        ("p.jsonl", '{"name": "x"}', "not prompts: an entry without file or file_name or image: it has name"),
        ("p.jsonl", "{", "not prompts"),
        ("p.txt", None, "not prompts: .*No such file"),
    ],
)
def test_bad_prompts_say_why(sets, tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ImageError, match=f"{name}: {why}"):
        prompts_of(ImageFolder(sets / "plain"), tmp_path / name)
    with pytest.raises(ImageError, match="images that don't state their prompt"):
        prompts_of(ImageFolder(sets / "real"), None)
