"""A folder with T5 at a tiny width, as a pipeline of the diffusers library has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from ldm.checkpoint import save_weights
from tests.helpers.goldens import recipe_tensor

WORDS = ("a", "red", "green", "heart", "tree", "photo", "of")
TINY = {"vocab_size": 16, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}


def recipe_encoder(config: Mapping[str, object], seed: int, gain: float) -> T5EncoderModel:
    encoder = T5EncoderModel(T5Config(**config)).eval()
    weights = {key: recipe_tensor(key, tuple(value.shape), seed, gain) for key, value in encoder.named_parameters()}
    encoder.load_state_dict(weights, strict=False)
    return encoder


def write_t5(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """text_encoder/ and tokenizer/ in a folder."""
    encoder = recipe_encoder(TINY | {"feed_forward_proj": "gated-gelu"}, seed=1, gain=1.0)
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    encoder.config.architectures = ["T5EncoderModel"]
    (folder / "text_encoder" / "config.json").write_text(encoder.config.to_json_string())
    weights: dict[str, Tensor] = {key: value for key, value in encoder.named_parameters()}
    save_weights(folder / "text_encoder" / "model.safetensors", {k: v.detach().clone() for k, v in weights.items()})
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return folder
