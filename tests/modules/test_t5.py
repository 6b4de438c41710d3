"""T5's encoder from a local folder: the published numbers, what is padded and cut, and folders of something else."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from ldm.modules.encoders.t5 import T5States, find_parts
from tests.helpers.goldens import assert_golden, load_case
from tests.helpers.paths import GOLDENS
from tests.helpers.tiny_t5 import recipe_encoder, write_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


def test_the_published_numbers(folder):
    case, tensors = load_case("t5_encoder")
    states = T5States(folder)
    states.encoder = recipe_encoder(case["kwargs"], **case["weight_recipe"])
    with torch.no_grad():
        found = states.states(tensors["input_ids"], tensors["attention_mask"])
        assert_golden(found, tensors["last_hidden_state"], case)
        alone = states.states(tensors["input_ids"], torch.ones_like(tensors["attention_mask"]))
        assert_golden(alone, tensors["without_mask"], case)


def test_texts_are_padded_and_cut_and_case_does_not_matter(folder):
    states = T5States(folder, length=6)
    found = states([" A red Heart", "a red heart", "a green tree", "a photo of a red green tree heart"])
    assert found.shape == (4, 6, 32)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    assert states.cut(["a red heart", "a photo of a red green tree heart"]) == 1


def test_a_folder_of_something_else(folder, tmp_path):
    with pytest.raises(ValueError, match="no text_encoder/config.json of T5; expected a folder with"):
        find_parts(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(ValueError, match="a text encoder of the kind 'clip_text_model'; expected t5"):
        find_parts(tmp_path)
    config.write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="no tokenizer.json and no spiece.model"):
        find_parts(tmp_path)
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    with pytest.raises(ValueError, match="model.safetensors"):
        T5States(tmp_path)


@pytest.mark.parametrize("change, found", [({"num_layers": 2}, 9), ({"vocab_size": 4}, 1)])
def test_weights_that_are_not_those_of_the_description(folder, tmp_path, change, found, capfd):
    """The library would make up what is missing."""
    shutil.copytree(folder, tmp_path / "t5")
    config = tmp_path / "t5" / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ValueError, match=f"another T5 than its config.json describes: {found} are missing, or of"):
        T5States(tmp_path / "t5")
    assert capfd.readouterr().err == ""


def test_the_published_names_and_shapes():
    published = json.loads(gzip.decompress((GOLDENS / "state_dicts_if.json.gz").read_bytes()))
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**published["t5"]))
    ours = {key: list(value.shape) for key, value in encoder.state_dict().items()}
    tied = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    assert ours | {tied: ours["shared.weight"]} == published["t5_v1_1_xxl_encoder"] | {tied: ours["shared.weight"]}
