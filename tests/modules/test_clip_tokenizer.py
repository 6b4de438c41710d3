"""CLIP's tokenizer against recorded ids, and where its vocabulary comes from."""

from __future__ import annotations

import sys

import pytest

from ldm.modules.encoders import clip_tokenizer
from ldm.modules.encoders.clip_tokenizer import PACKAGES, ClipTokenizer, find_vocabulary
from tests.helpers.clip_vocabulary import CASES, lines, write_vocabulary

START, END = 49406, 49407


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return ClipTokenizer(vocabulary)


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("prompt", CASES["prompts"])
def test_recorded_ids(vocabulary, tokenizer, prompt, padding):
    used = tokenizer if padding is None else ClipTokenizer(vocabulary, padding=0)
    body = CASES["prompts"][prompt][:75]
    filled = [END if padding is None else padding] * (75 - len(body))
    assert used(prompt).tolist() == [[START, *body, END, *filled]]


def test_a_text_does_not_depend_on_its_batch(tokenizer):
    prompts = list(CASES["prompts"])
    assert tokenizer(prompts).tolist() == [tokenizer(p)[0].tolist() for p in prompts]


def test_entities_are_mended_twice_over(tokenizer):
    assert tokenizer("a < b &amp;amp; c").equal(tokenizer("a < b & c"))


def test_a_shorter_context_cuts(vocabulary, tokenizer):
    short = ClipTokenizer(vocabulary, max_length=4)("a cat wearing sunglasses")
    assert short.tolist() == [[*tokenizer("a cat wearing sunglasses")[0, :3].tolist(), END]]


def test_a_transformers_folder_is_a_vocabulary(tmp_path, tokenizer):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    prompt = "a painting of a virus monster playing guitar"
    for folder in (tmp_path, tmp_path / "tokenizer"):
        assert ClipTokenizer(folder)(prompt).equal(tokenizer(prompt))


def test_an_installed_package_has_the_vocabulary_and_is_not_imported(tmp_path, monkeypatch, tokenizer):
    write_vocabulary(tmp_path / "open_clip")
    (tmp_path / "open_clip" / "__init__.py").write_text("raise ImportError('torchvision does not fit')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_vocabulary().parent == tmp_path / "open_clip"
    assert ClipTokenizer()("a cat").equal(tokenizer("a cat"))
    assert "open_clip" not in sys.modules


def test_no_vocabulary_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr("ldm.modules.encoders.clip_tokenizer.PACKAGES", tuple(f"no_{name}" for name in PACKAGES))
    with pytest.raises(ValueError, match="pip install --no-deps open-clip-torch"):
        ClipTokenizer()("a cat")


def test_a_missing_vocabulary_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        ClipTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b cut off", b"#version\na b\n", b"\xff\xfe"])
def test_a_broken_vocabulary_is_named(tmp_path, content):
    path = tmp_path / "merges.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="merges.txt"):
        ClipTokenizer(path)("a cat")


@pytest.mark.parametrize("text", [[], ["a", 3], [None]])
def test_what_is_not_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="text must be"):
        tokenizer(text)


def test_a_missing_library_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(clip_tokenizer, "ftfy", None)
    with pytest.raises(ValueError, match="ftfy"):
        tokenizer("a cat")
