"""Weights in prompts and prompts in chunks: the grammar, and functions of the encoders' embeddings."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.encoders.dual import DualTextEmbedder
from ldm.modules.encoders.modules import (
    BERTEmbedder,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
)
from ldm.modules.encoders.tokenizer import Reading, parse_weights, read, train_tokenizer, weighted
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import recipe_weights
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT

WEIGHTS, PROMPT = Reading(weights=True), "a cat wearing sunglasses"


@pytest.mark.parametrize(
    "prompt, spans",
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a) ((b))", [("a", 1.1), (" ", 1), ("b", 1.21)]),
        ("[a] [(b:2)]", [("a", 1 / 1.1), (" ", 1), ("b", 2 / 1.1)]),
        ("(a (b:2) c: .5 )", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        (r"a \(b\) \[c\] \\ \d", [(r"a (b) [c] \ \d", 1)]),
        (r"a: b (c:d) (e\:9) 12:30", [("a: b ", 1), ("c:d", 1.1), (" ", 1), ("e:9", 1.1), (" 12:30", 1)]),
        ("(a:0)(b:1)", [("a", 0), ("b", 1)]),
    ],
)
def test_grammar(prompt, spans):
    parsed = parse_weights(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in spans]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in spans])


@pytest.mark.parametrize(
    "prompt, why",
    [
        (
            "a (cat",
            r"'\(' at character 3 has no partner, in 'a \(cat'; expected \(word:1.3\), .*or \\\( for the bracket",
        ),
        ("a cat)", r"'\)' at character 6 has no partner"),
        ("a cat:1.3)", r"'\)' at character 10 has no partner"),
        ("[a)", r"'\)' at character 3 has no partner"),
        ("((a)", r"'\(' at character 1 has no partner"),
        ("[a:1.3)]", r"'\)' at character 7 has no partner"),
        ("a (b:1,3)", r"':1,3' at character 5 is no weight, in 'a \(b:1,3\)'; expected .* or \\: for the colon"),
        ("(b:1.2.3)", "':1.2.3' at character 3 is no weight"),
        ("(b:1e1)", "':1e1' at character 3 is no weight"),
        ("(b:)", "':' at character 3 is no weight"),
        ("[b:1.3]", "':1.3' at character 3 is no weight"),
        ("(b\uff1a1.3)", "'\uff1a1.3' at character 3 is no weight"),
        ("a () b", r"brackets without text at character 3"),
        ("(:1.3)", r"brackets without text at character 1"),
        ("(a:11)", "a weight must be 0..10; got 11"),
        ("(a:-1)", "a weight must be 0..10; got -1"),
        ("(b (a:10):10)", "a weight must be 0..10; brackets in brackets give 'a' 100"),
    ],
)
def test_what_is_unbalanced_or_out_of_range_is_said(prompt, why):
    with pytest.raises(ValueError, match=why):
        parse_weights(prompt)


def test_weighted_embeddings():
    z, empty = torch.randn(2, 5, 4), torch.randn(1, 5, 4)
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0, 1.0], [1.0] * 5])
    moved = weighted(z, empty, weights)
    assert torch.equal(moved[1], z[1]) and torch.equal(moved[0, 3:], z[0, 3:])
    torch.testing.assert_close(moved[0, 1], empty[0, 1])
    torch.testing.assert_close(moved[0, 2], 2 * z[0, 2] - empty[0, 2])


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    vocabulary = str(write_vocabulary(tmp_path_factory.mktemp("clip")))
    tokenizer = train_tokenizer([PROMPT, "a red heart"], vocab_size=100, max_length=12)
    made = {
        "SD 1": FrozenCLIPEmbedder(TINY_TEXT, vocabulary=vocabulary),
        "SD 2": FrozenOpenCLIPEmbedder(TINY_OPEN, layer="penultimate", vocabulary=vocabulary),
        "SDXL": FrozenOpenCLIPEmbedder2(TINY_OPEN, vocabulary=vocabulary),
        "emoji": BERTEmbedder(16, 1, vocab_size=100, max_seq_len=12, tokenizer=tokenizer),
        "dual": DualTextEmbedder(tokenizer, width=16, n_embed=8, n_layer=1, n_head=2, max_seq_len=12).eval(),
    }
    return {name: recipe_weights(encoder, seed=2) for name, encoder in made.items()}


def tokens_of(result):
    return result[0] if isinstance(result, tuple) else result


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD 1", "SD 2", "SDXL", "emoji", "dual"])
def test_reading(encoders, name):
    encoder = encoders[name]
    plain, published = read(encoder, [PROMPT], WEIGHTS), encoder([PROMPT])
    assert torch.equal(plain[0], tokens_of(published))
    if name == "SDXL":
        assert torch.equal(plain[1], published[1])

    # Weights change the embeddings of their words alone, and brackets are not read.
    strong, empty = read(encoder, ["a (cat:1.5) wearing sunglasses"], WEIGHTS)[0], tokens_of(encoder([""]))
    factor = encoder.rows(WEIGHTS.spans("a (cat:1.5) wearing sunglasses"), 1).weights[0]
    chosen = factor != 1
    assert torch.equal(strong[0, ~chosen], plain[0][0, ~chosen]) and chosen.any()
    torch.testing.assert_close(strong[0, chosen], (1.5 * plain[0] - 0.5 * empty)[0, chosen], rtol=1e-4, atol=1e-5)

    # Chunks: a short prompt is followed by empty ones, a long one goes on in them; a batch changes nothing.
    length = plain[0].shape[1]
    words = " ".join([PROMPT] * 30)
    both = read(encoder, [PROMPT, words], Reading(chunks=3))[0]
    assert both.shape[:2] == (2, 3 * length)
    torch.testing.assert_close(both[:1, :length], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:1, length:], torch.cat([empty, empty], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1:, :length], tokens_of(encoder([words])), rtol=1e-4, atol=1e-5)
    assert (both[1, length : 2 * length] - empty[0]).abs().max() > 0.01
    torch.testing.assert_close(both[:1], read(encoder, [PROMPT], Reading(chunks=3))[0], rtol=1e-4, atol=1e-5)


def test_chunks_hold_all_tokens_and_say_what_is_left_out(encoders):
    encoder = encoders["SD 1"]
    rows = encoder.rows([("cat " * 160, 1.0)], 2)
    assert rows.ids.shape == (2, 77) and rows.left_out == 10
    assert rows.ids[:, 0].tolist() == [49406, 49406] and rows.ids[:, -1].tolist() == [49407, 49407]
    assert len(set(rows.ids[:, 1:-1].flatten().tolist())) == 1
    assert encoder.rows([("cat " * 150, 1.0)], 2).left_out == 0


def test_other_conditioners_read_no_weights():
    with pytest.raises(ValueError, match="ClassEmbedder reads prompts in the published way only"):
        read(ClassEmbedder(4, 10), ["a"], WEIGHTS)
