"""Scores of human preference by published models, from weights on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn

from evaluation.metrics.extractors import ModelError, load_clip, normalised, score_pairs
from evaluation.metrics.result import Result, mean_values
from evaluation.runs.images import Source, image_warnings, open_with_prompts, reading
from ldm.checkpoint import read_checkpoint
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import file_sha256, json_sha256
from ldm.modules.encoders.clip import MEAN, STD

BATCH = 16
# Where the weights of each model are published, and what they are.
MODELS = {
    "image-reward": "ImageReward.pt of huggingface.co/THUDM/ImageReward, with vocab.txt of bert-base-uncased beside it",
    "pick-score": "the folder of huggingface.co/yuvalkirstain/PickScore_v1",
}


class Scorer(NamedTuple):
    """A model of preference."""

    score: Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, size, size) in [-1, 1], B texts -> scores (B,)
    size: int  # side of its images in pixels
    file: Path  # of its weights
    cut: Callable[[Sequence[str]], list[bool]]  # whether texts are longer than what it reads of them


def compute(
    samples: Source,
    *,
    model: str = "image-reward",
    weights: str | Path | Scorer | None = None,
    prompts: str | Path | Sequence[str] | None = None,
) -> Result:
    """The mean score of images with their prompts, under the model's name, with its 95 % interval.

    Args:
        samples: see `Source`.
        model: one of MODELS; weights: what that says, or what `load_scorer` loaded.
        prompts: see `prompts_of`.

    Raises SettingError: an argument can't be used; it names the argument.
    """
    images, prompts = open_with_prompts(samples, prompts)
    scorer = weights if isinstance(weights, Scorer) else load_scorer(model, weights)
    with fault_of("weights"):  # their vocabulary may be missing
        cut = sum(scorer.cut(prompts))
    with fault_of("samples"):
        found = score_pairs(scorer.score, images, prompts, scorer.size, "clip-crop", BATCH, model)
    name, made = model.replace("-", "_"), images.provenance
    protocol = {"measure": name, "features_sha256": file_sha256(scorer.file), "n": len(found)}
    protocol |= {"prompts": made.get("protocol_sha256"), "captions_sha256": json_sha256({"captions": prompts})}
    warnings = image_warnings(images)
    if cut:
        warnings.append(f"{cut} of {len(prompts)} prompts are longer than {model} reads and lost their ends")
    return Result(mean_values(name, found, prompts), protocol, made, warnings)


def load_scorer(name: str, weights: str | Path | None) -> Scorer:
    """The model of that name.
    Raises SettingError: `model`: there is none of that name; `weights`: not there, or not its weights."""
    if name not in MODELS:
        raise SettingError("model", f"{name!r} is not one of {', '.join(MODELS)}")
    with fault_of("weights"):
        if weights is None or not Path(weights).exists():
            raise ModelError(f"{name} needs {MODELS[name]}; got {weights or 'nothing'}")
        if name == "pick-score":
            clip = load_clip(weights)
            return Scorer(clip.agreement, clip.size, clip.weights, clip.tokenizer.cut)
        with reading(weights, f"not {MODELS[name]}", ModelError):  # or a vocabulary that is none
            model = ImageReward(read_checkpoint(weights), Path(weights).with_name("vocab.txt"))
        return Scorer(model, model.size, Path(weights), model.cut)


# ImageReward

TOKENS = 35  # of a text; what is longer is cut
HEAD = (0, 2, 4, 6, 7)  # the linear layers among those of the published head; the others drop out in training
CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072  # of the published training's scores
# Published names of the vision encoder, in order, as patterns, and those of the library transformers.
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
)


class ImageReward(nn.Module):
    """BLIP's encoders, of which that of the text attends to the image, and a head on the text's first token.

    Args:
        state: the weights under their published names (ImageReward.pt); all sizes are read from them.
        vocabulary: vocab.txt of bert-base-uncased.

    Raises:
        KeyError, RuntimeError: other weights.

    Source: Xu et al. (arXiv 2304.05977), Li et al. (arXiv 2201.12086).
    """

    def __init__(self, state: Mapping[str, Tensor], vocabulary: str | Path) -> None:
        super().__init__()
        names = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")
        vision, text, head = (part(state, name) for name in names)
        self.tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.enable_padding(length=TOKENS)
        self.vision, self.size = vision_encoder(vision)
        self.text = text_encoder(text, width=len(vision["norm.weight"]))
        self.head = nn.Sequential(*(nn.Linear(*head[f"{i}.weight"].shape[::-1]) for i in HEAD))
        self.vision.load_state_dict({renamed(key): value for key, value in vision.items()})
        self.text.load_state_dict({key: value for key, value in text.items() if not key.endswith("position_ids")})
        for layer, i in zip(self.head, HEAD, strict=True):
            layer.load_state_dict(part(head, f"{i}."))

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is longer than what is read of it."""
        return [bool(read.overflowing) for read in self.tokenizer.encode_batch([*texts])]

    @torch.no_grad()
    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Images (B, 3, size, size) in [-1, 1] and B texts -> scores (B,), about 0 on average."""
        read = self.tokenizer.encode_batch([*texts])
        tokens, there = (torch.tensor([getattr(one, name) for one in read]) for name in ("ids", "attention_mask"))
        seen = self.vision(normalised(images, MEAN, STD)).last_hidden_state  # (B, N, D)
        states = self.text(tokens, there, encoder_hidden_states=seen).last_hidden_state  # (B, TOKENS, D')
        return (self.head(states[:, 0])[:, 0] - CENTRE) / SPREAD


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def renamed(key: str) -> str:
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key


def layers(state: Mapping[str, Tensor], name: str) -> int:
    """How many numbered layers there are of that name."""
    return len({found[1] for key in state if (found := re.match(rf"{re.escape(name)}\.(\d+)\.", key))})


def vision_encoder(state: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
    """BLIP's vision encoder of the sizes of these weights, without them; and the side of its images in pixels."""
    library = import_module("transformers")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    size = patch * round((state["pos_embed"].shape[1] - 1) ** 0.5)
    config = library.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=layers(state, "blocks"),
        num_attention_heads=width // 64,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return library.BlipVisionModel(config).eval(), size


def text_encoder(state: Mapping[str, Tensor], width: int) -> nn.Module:
    """BLIP's text encoder of the sizes of these weights, without them; width: of the image's tokens."""
    library = import_module("transformers")
    words, hidden = state["embeddings.word_embeddings.weight"].shape
    config = library.BlipTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=layers(state, "encoder.layer"),
        num_attention_heads=hidden // 64,
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
    )
    return library.BlipTextModel(config, add_pooling_layer=False).eval()
