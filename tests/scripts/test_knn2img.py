"""scripts/knn2img.py end to end, on the published architecture at a tiny width, with a tiny CLIP."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint import load_model
from ldm.cli.neighbours import embedded
from ldm.io.images import open_image
from ldm.retrieval.database import open_database
from ldm.retrieval.embedders import load_embedder
from ldm.sampling.generate import make_items
from ldm.sampling.neighbours import Neighbours, context_of
from tests.helpers.clip_folder import write_clip
from tests.helpers.goldens import load_case
from tests.helpers.images import scene
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_batches, check_resume, load_script
from tests.helpers.tiny_models import tiny_model

CONFIG = "configs/retrieval-augmented-diffusion/768x768.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, CLIP, and two databases of six images, one of them of another embedder."""
    place = tmp_path_factory.mktemp("rdm")
    tiny_model(
        place / "model",
        CONFIG,
        latent=4,
        unet_config__params={"context_dim": 8, "channel_mult": [1, 2], "attention_resolutions": [2, 1]},
        first_stage_config__params__ddconfig__ch_mult=[1, 1, 1],
    )
    write_clip(place / "clip")
    (place / "pictures").mkdir()
    for number in range(6):
        scene((30, 24), number).rotate(60 * number).save(place / "pictures" / f"{number}.png")
    (place / "pictures" / "2.txt").write_text("a bright scene")
    build = load_script("build_database").main
    for out, embedder in (("db", f"clip:{place / 'clip'}"), ("features", "efficientnet-lite0")):
        assert build([str(place / "pictures"), "--out", str(place / out), "--embedder", embedder]) == 0
    return place


@pytest.fixture
def script(place, tmp_path) -> Script:
    model = ["--config", str(place / "model" / "config.yaml"), "--ckpt", str(place / "model" / "model.safetensors")]
    common = [
        "--steps",
        "4",
        "--skip_grid",
        "--n_samples",
        "1",
        "--prompt",
        "a cat",
        "--clip_type",
        f"clip:{place / 'clip'}",
    ]
    return Script("knn2img", tmp_path, *model, *common, "--database", str(place / "db"))


@pytest.fixture
def by_image(script, place) -> Script:
    script.common = [text for text in script.common if text not in ("--prompt", "a cat")]
    return script


@pytest.mark.parametrize("name", ["rdm_retrieval", "rdm_retrieval_768"])
def test_golden_contexts(name):
    _, tensors = load_case(name)
    stored, text = tensors["database.embedding"][tensors["nns"]], tensors["text"]
    for key, own, neighbours in (
        ("text_only", text, None),
        ("text_and_neighbors", text, stored),
        ("neighbors_only", None, stored),
    ):
        context = context_of(own, neighbours)
        torch.testing.assert_close(context, tensors[f"context.{key}"], atol=1e-6, rtol=1e-5)
    none = Neighbours(context_of(text, stored), {}).unconditional(None, context_of(text, stored))
    assert torch.equal(none, tensors["unconditional"])


def test_texts_neighbours_and_both_make_other_images(script, capsys):
    (text,) = script()
    assert text.items() >= {"prompt": "a cat", "scale": 5.0, "height": 16}.items() and "neighbors" not in text
    assert "--database: not used without --use_neighbors" in capsys.readouterr().out
    (both,) = script("--use_neighbors", "--knn", "3")
    (near,) = script("--use_neighbors", "--knn", "3", "--omit_query")
    shown = [script.pixels(entry) for entry in (text, both, near)]
    assert shown[0].shape == (16, 16, 3)
    assert all(np.abs(one - other).mean() > 0.2 for k, one in enumerate(shown) for other in shown[:k])
    found = [(entry["row"], entry["similarity"]) for entry in both["neighbors"]]
    assert len(found) == 3 and [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    assert near["neighbors"] == both["neighbors"] and both["knn"] == 3 and near["omit_query"]


@torch.no_grad()
def test_the_network_sees_the_text_and_then_the_neighbours(place):
    embedder, database = load_embedder(f"clip:{place / 'clip'}"), open_database(place / "db")
    queries = embedder.texts(["a cat", "a dog"])
    context = context_of(queries, database.embeddings(torch.tensor([[4, 2], [0, 1]])))
    assert context.shape == (2, 3, 8)
    torch.testing.assert_close(context.norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(context[1, 0], torch.nn.functional.normalize(queries[1], dim=0))
    own = embedder.images(embedder.prepared(open_image(place / "pictures" / "2.png"))[None])[0]
    torch.testing.assert_close(context[0, 2], torch.nn.functional.normalize(own, dim=0), atol=1e-4, rtol=1e-4)
    model = load_model(place / "model" / "config.yaml", place / "model" / "model.safetensors")
    condition = Neighbours(context, {})
    assert condition.tokens(model) == 3
    items = make_items([{"prompt": "a cat"}, {"prompt": "a dog"}], 1, seed=0)
    assert torch.equal(condition.encode(model, items[::-1]), context.flip(0))


def test_other_texts_change_no_digit_of_an_embedding():
    embedder, texts = load_embedder("emoji"), ["a red heart", "a long caption of a giraffe in a hat", ""] * 2
    alone = torch.cat([embedded(embedder, [], [text]) for text in texts])
    assert torch.equal(embedded(embedder, [], texts), alone)


def test_an_image_finds_its_neighbours_and_they_are_shown(by_image, place, capsys):
    query = str(place / "pictures" / "2.png")
    arguments = ["--query-image", query, "--knn", "2", "--show-neighbors"]
    check_resume(by_image, capsys, *arguments)
    (entry,) = by_image.entries()
    first = entry["neighbors"][0]
    assert (first["image"], first["caption"], entry["query_image"]) == ("2.png", "a bright scene", "2.png")
    assert first["similarity"] > 0.999 and entry["omit_query"]
    sheet = by_image.out / "neighbors" / entry["file"].removeprefix("samples/")
    with Image.open(sheet) as image:
        assert image.width > 3 * 128


def test_all_steps_as_key_steps_are_the_plain_run_and_batches_change_nothing(script):
    arguments = ("--use_neighbors", "--knn", "2", "--noise-weight", "0", "--plan")
    (plain,) = script(*arguments, "off")
    assert script(*arguments, "0,1,2,3") == []  # it is there already
    plain = script.pixels(plain)
    (script.out / "manifest.jsonl").unlink()
    (fast,) = check_batches(script, (*arguments, "0,2", "--parallel", "1"), (*arguments, "0,2", "--parallel", "4"))
    assert (plain != fast).any()


def test_an_index_and_compare(script, place, tmp_path, capsys):
    index = str(tmp_path / "index")
    train = load_script("train_searcher").main
    assert train(["-d", str(place / "db"), "-t", index, "--kind", "flat", "-k", "3"]) == 0
    (exact,) = script("--use_neighbors", "--knn", "2")
    arguments = ["--use_neighbors", "--knn", "2", "--searcher", index]
    plain, fast = script(*arguments, "--compare", "--plan", "0,2")
    assert [n["row"] for n in plain["neighbors"]] == [n["row"] for n in exact["neighbors"]]
    assert "PSNR to plain" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--use_neighbors", "--knn", "7"], "--knn: expected 1..6, the rows of .*; got 7"),
        (["--knn", "3"], "--knn: there are neighbours only with --use_neighbors or images to search with"),
        (["--omit_query"], "--omit_query: there are neighbours only with"),
        (["--show-neighbors"], "--show-neighbors: there are neighbours only with"),
        (["--query-image", "a.png"], "--query-image: either texts or images are searched with; got both"),
        (["--use_neighbors", "--database", "nowhere"], "--database: nowhere: no such folder, nor .*nowhere; scripts"),
        (
            ["--use_neighbors", "--database", "PLACE/features"],
            "--database: .*: made by the embedder efficientnet-lite0",
        ),
        (["--use_neighbors", "--searcher", "nowhere"], "--searcher: nowhere: no index; "),
        (["--clip_type", "efficientnet-lite0"], "--clip_type: efficientnet-lite0 embeds images only, so a text finds"),
        (["--clip_type", "clip:nowhere"], "--clip_type: clip: nowhere/model.safetensors: no such file; download"),
        (
            ["--use_neighbors", "--knn", "2", "--show-neighbors", "--skip_save"],
            "--show-neighbors: the sheets are of saved",
        ),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a retrieval-augmented model: its conditioner BERTEmbedder takes no embeddings",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, place, capsys, arguments, why):
    arguments = [text.replace("PLACE", str(place)) for text in arguments]
    assert re.match(why, script.refusal(capsys, *arguments))


def test_a_database_that_is_damaged_inside(script, place, tmp_path, capsys):
    """Its header can be read, so that shows only in the search, or when the neighbours are looked up."""
    shutil.copytree(place / "db", tmp_path / "db")
    (part,) = (tmp_path / "db").glob("*.npz")
    whole, lines = part.read_bytes(), part.with_suffix(".jsonl")
    with np.load(part) as arrays:
        np.savez_compressed(part, **arrays)
    content = bytearray(part.read_bytes())
    content[90] ^= 255
    part.write_bytes(bytes(content))
    arguments = ["--use_neighbors", "--knn", "2", "--database", str(tmp_path / "db")]
    assert re.match(r"--database: .*-part_1.npz: ", script.refusal(capsys, *arguments))
    part.write_bytes(whole)
    lines.write_text("{}\n")
    assert re.match(r"--database: .*-part_1.jsonl: expected 6 lines, one for", script.refusal(capsys, *arguments))


def test_an_image_that_can_not_be_read(by_image, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no image")
    line = by_image.refusal(capsys, "--query-image", str(tmp_path / "a.png"))
    assert line.startswith(f"--query-image: {tmp_path / 'a.png'}: not an image that can be read")


def test_embeddings_of_another_width(by_image, place, capsys):
    other = ["--clip_type", "efficientnet-lite0", "--database", str(place / "features"), "--knn", "2"]
    line = by_image.refusal(capsys, "--query-image", str(place / "pictures" / "2.png"), *other)
    assert line.endswith("its network attends to embeddings 8 wide; these are 1280 wide")


def test_the_model_that_ships_needs_no_flag_and_from_python_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = Script("knn2img", tmp_path, "--prompt", "a red heart", "--n_samples", "1", "--skip_grid")
    (entry,) = script("--use_neighbors", "--steps", "2", "--plan", "off", "--seed", "7")
    assert entry.items() >= {"knn": 4, "height": 128, "width": 128}.items() and entry["scale"] > 1
    assert all("heart" in neighbour["caption"] for neighbour in entry["neighbors"])
    settings = {"use_neighbors": True, "steps": 2, "plan": "off", "seed": 7}
    (image,) = ldm.load("rdm/emoji").images("a red heart", **settings)
    assert (np.asarray(image).astype(int) == script.pixels(entry)).all()


def test_a_database_is_told_from_its_images_in_a_folder_of_the_same_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    scene((30, 24)).save(tmp_path / "mine" / "a.png")
    assert load_script("build_database").main(["mine"]) == 0
    script = Script("knn2img", tmp_path, "--prompt", "a red heart", "--n_samples", "1", "--skip_grid")
    (entry,) = script("--use_neighbors", "--database", "mine", "--knn", "1", "--steps", "1")
    assert entry["neighbors"][0]["image"] == "a.png"
    (tmp_path / "other").mkdir()
    assert "--database: other: no parts" in script.refusal(capsys, "--use_neighbors", "--database", "other")


def test_the_published_checkpoint_and_clip_are_asked_for_by_their_places(script, capsys):
    files, rest = script.common[:4], script.common[4:]
    script.common = ["--config", CONFIG, *rest]
    assert re.match("--ckpt: .*rdm768x768/model.ckpt: no such file", script.refusal(capsys))
    script.common = [*files, *(text for text in rest if not text.startswith("clip:") and text != "--clip_type")]
    assert re.match("--clip_type: clip: .*models/clip/ViT-L-14/model.safetensors: no", script.refusal(capsys))
