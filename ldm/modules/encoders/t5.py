"""The encoder of T5 v1.1, whose states DeepFloyd-IF reads, from a local folder of the transformers library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ldm.io.errors import one_line, some
from ldm.io.files import read_json
from ldm.modules.encoders.clip import transformers

LENGTH = 77  # tokens of a text for DeepFloyd-IF
ENCODER, TOKENIZER = "text_encoder", "tokenizer"  # parts of a folder of the diffusers library


def find_parts(folder: Path) -> tuple[Path, Path]:
    """The folders of the encoder and of its tokenizer: parts of a folder, or both the folder itself.

    Raises:
        ValueError: they are not there, or are not T5's.
    """
    encoder, tokenizer = folder / ENCODER, folder / TOKENIZER
    if not encoder.is_dir():
        encoder = tokenizer = folder
    try:
        kind = read_json(encoder / "config.json")["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}: no {ENCODER}/config.json of T5; expected a folder with {ENCODER}/ and {TOKENIZER}/"
        ) from None
    if kind != "t5":
        raise ValueError(f"{encoder}: a text encoder of the kind {kind!r}; expected t5")
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise ValueError(f"{tokenizer}: no tokenizer.json and no spiece.model; expected the tokenizer of T5")
    return encoder, tokenizer


class T5States:
    """Texts to the states of their tokens.

    Args:
        folder: see `find_parts`; no file outside it is read, and no code in it is run.
        length: tokens of a text, padded or cut.
        device: where it computes, in the precision of its file.

    Raises:
        ValueError: the folder is not T5's, or has no weights that can be read safely.
    """

    def __init__(self, folder: Path, length: int = LENGTH, device: torch.device | str = "cpu") -> None:
        encoder, tokenizer = find_parts(folder)
        library, self.length = transformers(), length
        local = {"local_files_only": True, "trust_remote_code": False}
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # what does not fit is said below
        how = {"dtype": "auto", "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            self.tokenizer = library.AutoTokenizer.from_pretrained(tokenizer, **local)
            loaded, found = library.T5EncoderModel.from_pretrained(encoder, **how, **local)
        except (OSError, ImportError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"{folder}: {one_line(error)[:300]}") from error
        if wrong := {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}:
            raise ValueError(
                f"{encoder}: weights of another T5 than its config.json describes: {len(wrong)} are missing, or of "
                f"another shape{some(wrong, 3)}"
            )
        self.encoder = loaded.eval().requires_grad_(False).to(device)

    def cut(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are longer than `length` tokens, of which the rest is not read."""
        return sum(len(ids) > self.length for ids in self.tokenizer([*map(cleaned, prompts)]).input_ids)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Texts -> (B, length, width); T5 does not attend to padding, whose states are there all the same."""
        tokens = self.tokenizer(
            [*map(cleaned, prompts)],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return self.states(tokens.input_ids, tokens.attention_mask)

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L), 1 where there is a token in the mask (B, L) -> (B, L, width)."""
        device = self.encoder.device
        return self.encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state


def cleaned(prompt: str) -> str:
    """As published, without the optional cleaning of captions from the web."""
    return prompt.lower().strip()
