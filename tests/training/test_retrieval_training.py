"""Trainings for retrieval by main.py: an encoder of texts and images, and diffusion on neighbours' embeddings."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch.nn.functional import normalize

import main
from ldm.checkpoint import load_config, load_model
from ldm.data.emoji import EmojiDataset
from ldm.io.images import open_image
from ldm.modules.encoders.dual import DualEncoder, DualTextEmbedder
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.retrieval import embedders
from ldm.retrieval.build import BuildSettings, build
from ldm.retrieval.embedders import load_embedder
from ldm.retrieval.search import nearest_others
from ldm.training.contrastive import contrastive_loss, recall
from ldm.training.export import export
from ldm.training.retrieval import EmojiNeighboursData
from ldm.util import instantiate_from_config
from tests.helpers.embedder import Means
from tests.helpers.images import scene
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import write_data

CONFIGS = ROOT / "configs" / "retrieval-augmented-diffusion"
WORDS = ["a thing 0, noto style", "a thing 1, twemoji style", "a keyword", "an owl"]


def test_the_loss_is_that_of_the_right_pairs():
    texts, images = normalize(torch.randn(5, 8)), normalize(torch.randn(5, 8))
    cosines = 3.0 * texts @ images.T
    of_text, of_image = cosines.log_softmax(1), cosines.log_softmax(0)
    apart = contrastive_loss(texts, images, ["a", "b", "c", "d", "e"], torch.tensor(3.0))
    torch.testing.assert_close(apart, -(of_text.diagonal().mean() + of_image.diagonal().mean()) / 2)
    # Images with the same caption are right for it with equal shares.
    shared = contrastive_loss(texts[[0, 0]], images[:2], ["a", "a"], torch.tensor(3.0))
    first = (3.0 * texts[[0]] @ images[:2].T).log_softmax(1)
    torch.testing.assert_close(shared, -(first.mean() - math.log(2)) / 2)


def test_recall():
    texts = images = torch.eye(6)
    assert recall(texts, images, list("abcdef"), 1) == (1.0, 1.0)
    turned = images.roll(1, 0)  # each finds the next one
    assert recall(texts, turned, list("abcdef"), 1) == (0.0, 0.0)
    assert recall(texts, turned, list("aabbcc"), 1) == (0.0, 0.5)


def test_no_image_is_its_own_neighbour():
    rows = normalize(torch.randn(40, 6))
    found = nearest_others(rows, rows, 3, torch.arange(40), batch=7)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    assert torch.equal(found, cosines.topk(3).indices)
    assert torch.equal(nearest_others(rows, rows, 1, torch.full((40,), -1))[:, 0], torch.arange(40))
    with pytest.raises(ValueError, match="k: expected 1..39, fewer than there are images; got 40"):
        nearest_others(rows, rows, 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The tiny dataset with a concept held out; an encoder that was trained for a few steps, as it is used."""
    place = tmp_path_factory.mktemp("retrieval")
    (place / "data").mkdir()
    file = write_data(place / "data", side=32) / "captions.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["split"] = "heldout_concept" if image["concept"] == "c2" else image["split"]
    file.write_text(json.dumps(content))
    train_tokenizer(WORDS, 60, 8).save(str(place / "tokenizer.json"))
    folder = place / "encoder"
    folder.mkdir()
    base = ["-b", str(CONFIGS / "emoji-encoder.yaml"), "-t", "-l", str(place / "logs"), "-n", "encoder", "--steps", "3"]
    settings = {
        "model.params.tokenizer": place / "tokenizer.json",
        "model.params.width": 16,
        "data.params.root": place / "data",
        "data.params.features": place / "features",
        "data.params.batch_size": 6,
    }
    assert main.main([*base, *(f"{key}={value}" for key, value in settings.items())]) == 0
    export(place / "logs" / "encoder", folder / "model.safetensors", dtype="float16")
    shutil.copy(place / "logs" / "encoder" / "config.yaml", folder / "config.yaml")
    return place


def test_an_encoder_is_trained_and_embeds_texts_and_images(place):
    embedder = load_embedder(f"emoji:{place / 'encoder'}")
    texts, images = embedder.texts(["a thing 0, noto style", "an owl"]), embedder.images(torch.rand(3, 3, 128, 128))
    assert texts.shape == (2, 16) and images.shape == (3, 16)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert (texts[0] - texts[1]).norm() > 0.01
    assert embedder.cut(["an owl", "a thing 0 " * 9]) == 1
    (log,) = (place / "logs" / "encoder" / "metrics").rglob("metrics.csv")
    head, *rows = log.read_text().splitlines()
    assert {"val/heldout_pair_R@5", "val/heldout_concept_R@5", "val/heldout_concept_concept_R@5"} <= {*head.split(",")}
    assert [*(place / "logs" / "encoder" / "samples").iterdir()]


def test_the_encoder_that_ships_knows_what_an_image_shows():
    embedder, face = load_embedder("emoji"), open_image(ROOT / "docs/examples/inpaint/face.png")
    texts = ["a grinning face, noto style", "a red heart, noto style", "a dog, noto style", "a house, openmoji style"]
    cosines = normalize(embedder.texts(texts), dim=-1) @ normalize(
        embedder.images(embedder.prepared(face)[None])[0], dim=0
    )
    assert cosines[0] > 0.1 > cosines[1:].max(), cosines


def test_padding_changes_no_embedding():
    torch.manual_seed(0)
    short, long = (
        DualEncoder(train_tokenizer(WORDS, 60, 8), 12, 8, 16, 1, 2, length, dropout=0.0).eval() for length in (6, 12)
    )
    weights = short.state_dict() | {"pos_emb": long.pos_emb.data}
    weights["pos_emb"][:6] = short.pos_emb.data
    long.load_state_dict(weights)
    torch.testing.assert_close(short.texts(["an owl"]), long.texts(["an owl"]))


@torch.no_grad()
def test_texts_as_conditioning_lie_where_images_do():
    settings = {"features": 12, "width": 8, "n_embed": 16, "n_layer": 1, "n_head": 2, "max_seq_len": 8}
    conditioner = DualTextEmbedder(train_tokenizer(WORDS, 60, 8), **settings).eval()
    encoder = DualEncoder(train_tokenizer(WORDS, 60, 8), **settings).eval()
    encoder.load_state_dict(conditioner.state_dict())  # the same names: a dual encoder's file fills it
    context = conditioner(["an owl", ""])
    assert context.shape == (2, 8, 8)
    torch.testing.assert_close(context[:, 0], encoder.texts(["an owl", ""]))
    tokens = (conditioner.tokenize(["an owl", ""]) != 0).sum(1)  # [PAD] is 0
    for row, count in zip(context, tokens, strict=True):
        torch.testing.assert_close(row.norm(dim=1), (torch.arange(8) < count).float())
    torch.testing.assert_close(conditioner(["an owl"]), context[:1])
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\."):
        conditioner(torch.full((1, 8), 60))


def of_data(place, **more):
    first_stage = {
        "config": str(ROOT / "configs/autoencoder/emoji128-kl-f8.yaml"),
        "ckpt": str(ROOT / "models/first_stage_models/emoji128-kl-f8/model.safetensors"),
    }
    encoder = {"config": str(place / "encoder/config.yaml"), "ckpt": str(place / "encoder/model.safetensors")}
    files = {"root": str(place / "data"), "features": str(place / "features"), "latents": str(place / "latents")}
    return {**files, "first_stage": first_stage, "encoder": encoder, "batch_size": 4, "k": 2, **more}


def test_neighbours_are_other_training_images_of_the_styles_that_are_used(place):
    data = EmojiNeighboursData(**of_data(place, without_styles=["noto", "twemoji"]))
    data.setup("fit")
    train = EmojiDataset(place / "data", "train", 2)
    styles = [image["style"] for image in train.images if image["style"] not in ("noto", "twemoji")]
    assert len(data.train) == len(data.rows) == len(styles) == 8
    for i in range(len(data.train)):
        example = data.train[i]
        assert example["nn_embeddings"].shape == (2, 16)
        assert not any(torch.equal(found, data.rows[i]) for found in example["nn_embeddings"])
    for styles, why in ((["nato"], "has no style 'nato'"), (["openmoji"], "none of the 1 images of a split is left")):
        with pytest.raises(ValueError, match=f"without_styles: .*{why}"):
            EmojiNeighboursData(**of_data(place, without_styles=styles)).setup("fit")


def test_the_configuration_trains_and_its_model_samples_from_neighbours(place):
    settings = {
        **{f"data.params.{key}": value for key, value in of_data(place).items() if isinstance(value, str | int)},
        **{f"data.params.encoder.{key}": value for key, value in of_data(place)["encoder"].items()},
        "data.params.without_styles": "[twemoji]",
        "model.params.image_size": 4,
        "model.params.unet_config.params.context_dim": 16,
        "model.params.unet_config.params.model_channels": 32,
        "model.params.unet_config.params.channel_mult": "[1,1]",
        "training.params.sample_steps": 2,
    }
    base = ["-b", str(CONFIGS / "emoji.yaml"), "-t", "-l", str(place / "logs"), "-n", "rdm", "--steps", "2"]
    assert main.main([*base, *(f"{key}={value}" for key, value in settings.items())]) == 0
    export(place / "logs" / "rdm", place / "rdm.safetensors")
    model = load_model(place / "logs" / "rdm" / "config.yaml", place / "rdm.safetensors")
    context = normalize(torch.randn(1, 2, 16), dim=-1)
    x, t = torch.randn(1, 8, 4, 4), torch.tensor([500])
    assert (model.apply_model(x, t, context) - model.apply_model(x, t, torch.zeros_like(context))).abs().max() > 0


def test_the_text_models_network_can_start_as_this_one():
    configs = CONFIGS / "emoji.yaml", ROOT / "configs/latent-diffusion/emoji128.yaml"
    with torch.device("meta"):
        unets = [instantiate_from_config(load_config(config).model.params.unet_config) for config in configs]
    own, text = ({name: p.shape for name, p in unet.state_dict().items()} for unet in unets)
    assert own == text


def test_a_folder_of_ones_own_trains_the_published_kind_and_its_run_is_exported(tmp_path, monkeypatch):
    monkeypatch.setitem(embedders.EMBEDDERS, "means", Means)
    (tmp_path / "in").mkdir()
    for number in range(6):
        scene((24, 20 + number), number).save(tmp_path / "in" / f"{number}.png")
    build(BuildSettings(tmp_path / "in", tmp_path / "db", "means"))
    settings = {
        "data.params.train.params.root": tmp_path / "in",
        "data.params.train.params.database": tmp_path / "db",
        "data.params.train.params.size": 16,
        "data.params.batch_size": 2,
        "data.params.num_workers": 0,
        "lightning.trainer.accelerator": "cpu",
        "model.params.image_size": 4,
        "model.params.first_stage_config.params.ckpt_path": "null",
        "model.params.first_stage_config.params.ddconfig.ch": 32,
        "model.params.first_stage_config.params.ddconfig.num_res_blocks": 1,
        "model.params.unet_config.params.model_channels": 32,
        "model.params.unet_config.params.num_res_blocks": 1,
        "model.params.unet_config.params.channel_mult": "[1,1]",
        "model.params.unet_config.params.attention_resolutions": "[1]",
        "model.params.unet_config.params.context_dim": 12,
        "training.params.sample_steps": 2,
    }
    base = ["-b", str(CONFIGS / "rdm-imagenet.yaml"), str(ROOT / "configs/data/neighbours.yaml"), "-t"]
    run = tmp_path / "logs" / "own"
    given = [*base, "-l", str(run.parent), "-n", run.name, "--steps", "1"]
    assert main.main([*given, *(f"{key}={value}" for key, value in settings.items())]) == 0
    export(run, run / "model.safetensors")
    model = load_model(run / "config.yaml", run / "model.safetensors")
    context, x = normalize(torch.randn(1, 4, 12), dim=-1), torch.randn(1, 3, 4, 4)
    assert torch.equal(model.get_learned_conditioning(context), context)
    assert model.apply_model(x, torch.tensor([500]), context).isfinite().all()
