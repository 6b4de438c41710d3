"""Conditioners: golden numbers, the tokenizer, errors."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models

from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, SpatialRescaler, TransformerEmbedder
from ldm.modules.encoders.tokenizer import load_tokenizer, of_length, train_tokenizer
from tests.helpers.goldens import assert_golden, from_recipe, load_case

CAPTIONS = ["a red heart", "a slice of pizza, noto style", "a crying face", "a green tree", "Red Pizza"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, vocab_size=100, max_length=12)


def bert(tokenizer=None, **changes) -> BERTEmbedder:
    settings = dict(n_embed=32, n_layer=1, vocab_size=100, max_seq_len=12)
    return BERTEmbedder(**{**settings, **changes}, tokenizer=tokenizer).eval()


@pytest.mark.parametrize("name, cls", [("transformer_embedder", TransformerEmbedder), ("bert_embedder", BERTEmbedder)])
def test_golden_text_encoder(name, cls):
    case, tensors = load_case(name)
    embedder = from_recipe(cls(**case["kwargs"]), case, tensors)
    tokens, embedded = tensors["tokens"], []
    embedder.transformer.emb_dropout.register_forward_hook(lambda module, args, out: embedded.append(out))
    with torch.no_grad():
        assert_golden(embedder(tokens), tensors["out"], case)
        assert_golden(embedder.encode(tokens[:, :5]), tensors["out_first5"], case)
        assert_golden(embedder.transformer(tokens), tensors["logits"], case)
    assert_golden(embedded[0], tensors["embedded_input"], case)


def test_golden_class_embedder():
    case, tensors = load_case("class_embedder")
    embedder = from_recipe(ClassEmbedder(**case["kwargs"]), case, tensors)
    assert_golden(embedder(tensors["y"]), tensors["out"], case)
    assert_golden(embedder({"class_label": tensors["y"], "image": None}), tensors["out"], case)


@pytest.mark.parametrize("number", range(4))
def test_golden_spatial_rescaler(number):
    case, tensors = load_case("spatial_rescaler")
    rescaler = SpatialRescaler(**case["cases"][str(number)])
    prefix = f"{number}.w."
    rescaler.load_state_dict(
        {key.removeprefix(prefix): value.float() for key, value in tensors.items() if key.startswith(prefix)}
    )
    assert_golden(rescaler(tensors["x"]), tensors[f"{number}.out"], case)
    assert_golden(rescaler.encode(tensors["x"]), tensors[f"{number}.out"], case)


def test_trained_tokenizer_frames_pads_and_cuts(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() <= 100
    heart, upper, long = tokenizer.encode_batch(["a red heart", "A RED Heart", "red " * 40])
    assert heart.ids == upper.ids
    assert heart.tokens == ["[CLS]", "a", "red", "heart", "[SEP]"] + ["[PAD]"] * 7
    assert len(long.ids) == 12 and long.ids[-1] == 3
    assert "[UNK]" in tokenizer.encode("犬").tokens


def test_training_a_tokenizer_again_gives_the_same(tokenizer):
    assert train_tokenizer(iter(CAPTIONS), 100, 12).to_str() == tokenizer.to_str()


@pytest.mark.parametrize(
    "args, why", [(([], 100, 12), "captions"), ((CAPTIONS, 4, 12), "vocab_size"), ((CAPTIONS, 100, 2), "max_length")]
)
def test_bad_tokenizer_settings_say_why(args, why):
    with pytest.raises(ValueError, match=why):
        train_tokenizer(*args)


def test_text_is_the_embedding_of_its_tokens(tokenizer):
    embedder = bert(tokenizer)
    texts = ["a red heart", ""]
    with torch.no_grad():
        out = embedder.encode(texts)
        ids = torch.tensor([e.ids for e in tokenizer.encode_batch(texts)])
        assert torch.equal(embedder(ids), out)
        torch.testing.assert_close(embedder("a red heart"), out[:1])
        torch.testing.assert_close(embedder.encode([""]), out[1:])
    assert out.shape == (2, 12, 32)
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert ids[1].tolist() == [2, 3] + [0] * 10


def test_tokenizer_from_a_file_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    from_file = bert(str(path))
    assert torch.equal(from_file.tokenize(CAPTIONS), bert(tokenizer).tokenize(CAPTIONS))


def test_a_given_tokenizer_is_not_changed(tokenizer):
    before = tokenizer.to_str()
    assert bert(tokenizer, max_seq_len=6).tokenize("a red heart").shape == (1, 6)
    assert tokenizer.to_str() == before


def test_missing_or_broken_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        bert("nowhere.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match="broken.json is not"):
        load_tokenizer(str(broken), 12)


def test_tokenizer_without_padding_token():
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        of_length(Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), 12)


def test_without_tokenizer_text_says_what_is_missing():
    with pytest.raises(ValueError, match="tokenizer.json of bert-base-uncased"):
        bert().encode(["a red heart"])


def test_tokenizer_must_fit_the_model(tokenizer):
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        bert(tokenizer, vocab_size=5)
    with pytest.raises(ValueError, match="use_tokenizer=False"):
        bert(tokenizer, use_tokenizer=False)


@pytest.mark.parametrize(
    "text, why",
    [
        ([], "string"),
        (["a", 3], "string"),
        (torch.tensor([[100]]), r"tokens must be in 0..99; got 100..100"),
        (torch.tensor([[-1]]), "tokens must be in"),
        (torch.zeros(2, 13, dtype=torch.long), "max_seq_len = 12"),
        (torch.zeros(3, dtype=torch.long), r"shape \(B, L\)"),
        (torch.zeros(2, 5), "integers"),
    ],
)
def test_bad_text_says_why(tokenizer, text, why):
    with pytest.raises(ValueError, match=why):
        bert(tokenizer)(text)


@pytest.mark.parametrize(
    "batch, why",
    [
        (torch.tensor([11]), r"class_label must be in 0..10; got 11..11"),
        (torch.tensor([[1]]), r"shape \(B,\)"),
        (torch.tensor([1.0]), "integers"),
        ({"image": 1}, "'class_label'"),
    ],
)
def test_bad_class_says_why(batch, why):
    with pytest.raises(ValueError, match=why):
        ClassEmbedder(16, n_classes=11, key="class_label")(batch)


@pytest.mark.parametrize("settings, why", [(dict(method="lanczos"), "method"), (dict(n_stages=-1), "n_stages")])
def test_bad_rescaler_says_why(settings, why):
    with pytest.raises(ValueError, match=why):
        SpatialRescaler(**settings)


def test_embedding_dropout_acts_in_training_only(tokenizer):
    embedder = bert(tokenizer, embedding_dropout=0.5)
    assert torch.equal(embedder("a tree"), embedder("a tree"))
    embedder.train()
    assert not torch.equal(embedder("a tree"), embedder("a tree"))
