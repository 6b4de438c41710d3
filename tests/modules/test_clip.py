"""The CLIP conditioners: golden numbers, agreement with an independent implementation, errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

from ldm.modules.encoders.clip import clip_pixels
from ldm.modules.encoders.modules import (
    FrozenCLIPEmbedder,
    FrozenClipImageEmbedder,
    FrozenCLIPTextEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import assert_golden, from_recipe, load_case, recipe_weights
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT, TINY_VISION


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of the transformers library, as its users have it on disk; with its numbers."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip-model")
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(path, safe_serialization=True)
    return path, model


@torch.no_grad()
def test_golden_clip():
    case, tensors = load_case("clip_text_hf")
    embedder = from_recipe(FrozenCLIPEmbedder(case["clip_text_config"]), case, {})
    assert_golden(embedder(tensors["tokens"]), tensors["last_hidden_state"], case)
    assert_golden(embedder.encode(tensors["tokens"][:, :9]), tensors["last_hidden_state"][:, :9], case)


@torch.no_grad()
@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_golden_openclip(layer):
    case, tensors = load_case("openclip_text")
    arch = {"embed_dim": case["embed_dim"], "text_cfg": case["text_cfg"]}
    embedder = from_recipe(FrozenOpenCLIPEmbedder(arch, layer=layer), case, {})
    assert_golden(embedder(tensors["tokens"]), tensors[f"out_{layer}"], case)
    assert_golden(embedder.encode(tensors["tokens"][:, :9]), tensors[f"out_{layer}"][:, :9], case)


VISION_KEYS = {
    "visual_projection.weight": "proj",
    "vision_model.": "",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "embeddings.patch_embedding": "conv1",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}


def vision_key(key: str) -> str:
    """An OpenCLIP key as transformers names it; of the joint projection of q, k and v only the rest."""
    for theirs, ours in VISION_KEYS.items():
        key = key.replace(theirs, ours)
    return key


@torch.no_grad()
def test_the_vision_tower_is_that_of_transformers():
    """An independent implementation with the same weights; a published checkpoint has it with 32 layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    ours = recipe_weights(FrozenOpenCLIPImageEmbedder(TINY_OPEN, antialias=False), seed=3)
    weights = {key.removeprefix("model.visual."): value for key, value in ours.state_dict().items()}
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_VISION, hidden_act="gelu")).eval()
    named = {}
    for key in theirs.state_dict():
        name = vision_key(key)
        part = next((i for i, p in enumerate(("q_proj", "k_proj", "v_proj")) if p in name), None)
        if part is not None:
            joint = name.replace(("q_proj.", "k_proj.", "v_proj.")[part], "in_proj_")
            named[key] = weights[joint].chunk(3)[part]
        elif not name.endswith("position_ids"):
            named[key] = weights[name].T if name == "proj" else weights[name]
    theirs.load_state_dict(named, strict=False)
    image = torch.rand(2, 3, 40, 30) * 2 - 1
    expected = theirs(pixel_values=clip_pixels(image, 28, antialias=False)).image_embeds
    torch.testing.assert_close(ours.encode(image), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_is_the_embedding_of_its_tokens(vocabulary):
    for embedder, padding in (
        (FrozenCLIPEmbedder(TINY_TEXT, vocabulary=str(vocabulary)), 49407),
        (FrozenOpenCLIPEmbedder(TINY_OPEN, vocabulary=str(vocabulary)), 0),
    ):
        tokens = torch.full((1, 77), padding)
        tokens[0, :6] = torch.tensor([49406, 320, 2368, 3309, 12906, 49407])
        assert torch.equal(embedder(["a cat wearing sunglasses"]), embedder(tokens))
        assert embedder.encode(["", "a cat"]).shape == (2, 77, 16)
        assert not any(p.requires_grad for p in embedder.parameters())


@torch.no_grad()
def test_embedders_of_retrieval_augmented_diffusion(folder, vocabulary):
    path, model = folder
    text = FrozenCLIPTextEmbedder(path, n_repeat=2, vocabulary=vocabulary)
    tokens = text.tokens(["a cat", ""])
    expected = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
    assert torch.equal(text.encode(["a cat", ""])[:, 0], text(tokens)[:, 1])
    torch.testing.assert_close(text(tokens)[:, 0], F.normalize(expected))
    torch.testing.assert_close(FrozenCLIPTextEmbedder(path, normalize=False)(tokens)[:, 0], expected)

    image = torch.rand(2, 3, 50, 60) * 2 - 1
    seen = model.visual_projection(model.vision_model(pixel_values=clip_pixels(image, 28, False)).pooler_output)
    torch.testing.assert_close(FrozenClipImageEmbedder(path).encode(image), seen)


def test_what_clip_looks_at():
    """Grey is 0.5; the right size and, unless smoothed, the corners stay as they are."""
    grey = clip_pixels(torch.zeros(1, 3, 30, 20), 8, antialias=False)
    torch.testing.assert_close(grey[0, :, 0, 0], torch.tensor([0.06904, 0.16139, 0.33284]), atol=1e-4, rtol=0)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    same = clip_pixels(image, 32, antialias=False)
    torch.testing.assert_close(same[:, 0] * 0.26862954 + 0.48145466, (image[:, 0] + 1) / 2)
    shrunk = clip_pixels(image, 8, antialias=False)
    torch.testing.assert_close(shrunk[..., ::7, ::7], clip_pixels(image, 32, False)[..., ::31, ::31])
    assert not clip_pixels(image, 8, True).allclose(clip_pixels(image, 8, False), atol=0.1)
    with pytest.raises(ValueError, match="B, 3, H, W"):
        clip_pixels(torch.zeros(1, 4, 8, 8), 8, False)


def test_published_settings_that_no_shape_shows():
    with torch.device("meta"):
        clip, text, image = FrozenCLIPEmbedder(), FrozenOpenCLIPEmbedder(), FrozenOpenCLIPImageEmbedder()
    layer = clip.transformer["text_model"].encoder.layers[0]
    assert layer.self_attn.num_heads == 12
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(layer.mlp.activation_fn(x), x * torch.sigmoid(1.702 * x))
    for transformer in (text.model.transformer, image.model.visual.transformer):
        assert transformer.resblocks[0].attn.num_heads == 16
    assert image.model.visual.image_size == 224


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: FrozenCLIPEmbedder("openai/clip-vit-base-patch32"), "version must be one of openai/clip-vit-large"),
        (lambda: FrozenCLIPEmbedder(TINY_TEXT, max_length=78), r"max_length must be in 3..77"),
        (lambda: FrozenCLIPEmbedder(TINY_TEXT, vocabulary="no/where"), "no/where"),
        (lambda: FrozenOpenCLIPEmbedder("ViT-X"), "arch must be one of ViT-H-14"),
        (lambda: FrozenOpenCLIPEmbedder(TINY_OPEN, layer="second"), "layer must be one of last, penultimate"),
        (lambda: FrozenCLIPTextEmbedder(), "openai/clip-vit-large-patch14"),
        (lambda: FrozenClipImageEmbedder("no/where"), "no/where: no such folder"),
    ],
)
def test_bad_settings_say_why(build, why):
    with pytest.raises(ValueError, match=why):
        build()


def test_a_folder_that_is_no_model_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="not a CLIPVisionModelWithProjection"):
        FrozenClipImageEmbedder(tmp_path)
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    CLIPTextModelWithProjection(CLIPTextConfig(**TINY_TEXT)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are missing"):
        FrozenClipImageEmbedder(tmp_path)


@pytest.mark.parametrize(
    "tokens, why",
    [
        (torch.zeros(1, 78, dtype=torch.long), "at most 77"),
        (torch.tensor([[49408]]), "in 0..49407"),
        (torch.zeros(3, dtype=torch.long), r"\(B, L\)"),
        (torch.zeros(1, 3), "integers"),
    ],
)
def test_bad_tokens_say_why(tokens, why):
    with pytest.raises(ValueError, match=why):
        FrozenOpenCLIPEmbedder(TINY_OPEN)(tokens)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="transformers library"):
        FrozenCLIPEmbedder(TINY_TEXT)
