"""Trainings on a few images, from configuration to file to image, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import CheckpointError, load_model, read_checkpoint
from ldm.checkpoint.delta import apply_deltas, compressed, read_delta, save_delta
from ldm.checkpoint.embeddings import add_embeddings, read_embeddings
from ldm.checkpoint.lora import merge_lora
from ldm.data.personal import Subject
from ldm.training.configuration import read_configuration
from ldm.training.state import read_state
from main import main
from tests.helpers.goldens import assert_golden, load_case
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import write_model

PERSONAL = ROOT / "configs" / "personalization"
NETWORK = "model.model.diffusion_model."


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("home")
    config, weights = write_model(root)
    model = OmegaConf.load(config)
    model.model.params.ckpt_path = str(weights)
    OmegaConf.save(OmegaConf.create({"model": model.model}), root / "base.yaml")
    for folder, caption in (("mine", "a <new1> <R> tree"), ("class", "a tree")):
        for i in range(4):
            (root / folder).mkdir(exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels.repeat(4, 0).repeat(4, 1)).save(root / folder / f"{i}.png")
            (root / folder / f"{i}.txt").write_text(caption)
    return root


def train(home: Path, folder: Path, name: str, *more: str) -> Path:
    """Two steps of a configuration; the run's folder."""
    config = OmegaConf.load(PERSONAL / f"{name}.yaml")
    data = {"root": home / "mine", "size": 16}
    if "class_root" in config.data.params.train.params:
        data["class_root"] = home / "class"
    settings = [f"data.params.train.params.{key}={value}" for key, value in data.items()]
    quiet = ["lightning.trainer.accelerator=cpu", "lightning.trainer.enable_progress_bar=false"]
    files = [str(home / "base.yaml"), str(PERSONAL / f"{name}.yaml")]
    argv = ["--base", *files, "-t", "-n", name, "-l", str(folder), "--steps", "2", *settings, *quiet, *more]
    assert main(argv) == 0
    return folder / name


def exported(run: Path, name: str) -> Path:
    assert load_script("export_model").main([str(run), "--out", str(run / name)]) == 0
    return run / name


def changed(run: Path, before: dict) -> set[str]:
    state = read_state(run / "last.ckpt")["state_dict"]
    return {
        key.removeprefix(NETWORK)
        for key, value in state.items()
        if key.removeprefix("model.") in before
        and value.shape == before[key.removeprefix("model.")].shape
        and not torch.equal(value, before[key.removeprefix("model.")])
    }


@pytest.fixture(scope="module")
def before(home) -> dict:
    return read_checkpoint(home / "model.safetensors")


def test_dreambooth_trains_the_whole_network(home, before, tmp_path):
    run = train(home, tmp_path, "dreambooth")
    assert len(changed(run, before)) > 50 and not any("cond_stage" in key for key in changed(run, before))
    assert load_model(home / "config.yaml", exported(run, "model.safetensors"))


def test_custom_diffusion_trains_keys_values_and_a_word(home, before, tmp_path, capsys):
    run = train(home, tmp_path, "custom-diffusion", "training.params.new_tokens={<new1>: tree}")
    assert capsys.readouterr().out.endswith(f"--out {run}/delta.bin\n")
    assert load_script("export_model").main([str(run), "--out", str(run / "delta.safetensors")]) == 2
    assert "a delta of Custom Diffusion is a .bin (diffusers) or a .ckpt (CompVis)" in capsys.readouterr().err
    names = changed(run, before) - {"model.cond_stage_model.transformer.token_emb.weight"}
    assert names and all(key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in names)
    state = read_state(run / "last.ckpt")["state_dict"]
    for file in ("delta.bin", "delta.ckpt"):
        model = load_model(home / "config.yaml", home / "model.safetensors")
        rows = model.cond_stage_model.token_table.weight.clone()
        apply_deltas(model, [exported(run, file)])
        for key in names:
            assert torch.allclose(model.get_parameter(f"model.diffusion_model.{key}"), state[NETWORK + key], atol=1e-6)
        (vector,) = read_delta(run / file).tokens.values()
        first = int(state["first_token"])
        table = model.cond_stage_model.token_table.weight
        assert torch.equal(table[first], vector[0]) and torch.equal(table[:first], rows[:first])
        trained = next(v for k, v in state.items() if k.endswith("token_emb.weight") and k.startswith("model."))
        assert torch.equal(trained[:first], rows[:first]) and not torch.equal(trained[first], rows[first])
        with pytest.raises(CheckpointError, match="'<new1>' is a token of this model already"):
            apply_deltas(model, [run / file])


@pytest.mark.parametrize("name", ["textual-inversion", "reversion"])
def test_a_word_alone(home, before, tmp_path, capsys, name):
    token, count = ("<new1>", 2) if name == "textual-inversion" else ("<R>", 1)
    words = ["training.params.relations=[red, dog]", "training.params.stop_words=[a]"] if token == "<R>" else []
    more = [f"training.params.new_tokens={{{token}: tree}}", f"training.params.vectors={count}", *words]
    run = train(home, tmp_path, name, *more)
    assert capsys.readouterr().out.endswith(f"--out {run}/word.safetensors\n")
    assert changed(run, before) <= {"model.cond_stage_model.transformer.token_emb.weight"}
    vectors = read_embeddings(exported(run, "word.safetensors"))
    assert [*vectors] == [token] and vectors[token].shape == (count, 16)
    model = load_model(home / "config.yaml", home / "model.safetensors")
    begun = model.cond_stage_model.token_table.weight[model.cond_stage_model.words("tree").ids[1]]
    assert not torch.equal(vectors[token][0], begun) and (vectors[token][0] - begun).abs().max() < 0.1
    add_embeddings(model.cond_stage_model, run / "word.safetensors")
    first = model.cond_stage_model.words(token).ids[1]
    assert model.cond_stage_model.tokenize([f"a {token}"])[0, 2 : 2 + count].tolist() == [*range(first, first + count)]


def test_a_lora_is_what_was_trained(home, before, tmp_path, capsys):
    run = train(home, tmp_path, "lora")
    assert capsys.readouterr().out.endswith(f"--out {run}/lora.safetensors\n")
    assert changed(run, before) == set()
    state = read_state(run / "last.ckpt")["state_dict"]
    model = load_model(home / "config.yaml", home / "model.safetensors")
    assert merge_lora(model, exported(run, "lora.safetensors")) == []
    layer = "middle_block.1.transformer_blocks.0.attn2.to_v"
    change = state[f"{NETWORK}{layer}.up"] @ state[f"{NETWORK}{layer}.down"]
    merged = model.get_parameter(f"model.diffusion_model.{layer}.weight")
    assert change.abs().max() > 0
    torch.testing.assert_close(merged, before[f"model.diffusion_model.{layer}.weight"] + change)
    assert load_script("export_model").main([str(run), "--out", str(run / "half.safetensors"), "--dtype", "fp16"]) == 0
    assert {value.dtype for value in read_checkpoint(run / "half.safetensors").values()} == {torch.float16}


def test_new_words_stand_in_the_place_of_the_example():
    """Several concepts can only be used together if each has a word of its own, and no other."""
    files, example = [PERSONAL / "custom-diffusion.yaml"], "training.params.new_tokens"
    model = ["model={target: ldm.Any}"]
    for settings, words in (
        ([], {"<new1>": "face"}),
        ([f"{example}={{<new2>: tool}}"], {"<new2>": "tool"}),
        ([f"{example}.<new1>=owl", f"{example}.<new2>=tool"], {"<new1>": "owl", "<new2>": "tool"}),
    ):
        assert read_configuration(files, [*model, *settings]).training.params.new_tokens == words


def test_bad_settings(home, tmp_path, capsys):
    base = ["--base", str(home / "base.yaml"), "-t", "-n", "x", "-l", str(tmp_path)]
    for name, more, why in (
        ("lora", ["training.params.what=half"], "what must be one of all, crossattn-kv, crossattn, lora, tokens"),
        ("lora", ["training.params.new_tokens={<x>: tree}"], "new_tokens: not with lora"),
        ("textual-inversion", ["training.params.new_tokens=null"], "new_tokens: needed where nothing else is trained"),
        ("textual-inversion", ["training.params.new_tokens={tree: tree}"], "'tree' is a token of this model already"),
        ("lora", ["training.params.compile=true"], "compile: not with the losses of this training"),
        ("lora", ["data.params.train.params.root=nowhere"], "nowhere"),
        (
            "lora",
            ["model.params.unet_config.params.out_channels=8"],
            "model: not one whose network predicts a variance",
        ),
    ):
        argv = [base[0], base[1], str(PERSONAL / f"{name}.yaml"), *base[2:], *more]
        assert main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert why in line


def test_a_delta_of_another_model(home, tmp_path):
    model = load_model(home / "config.yaml", home / "model.safetensors")
    name = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    for weights, tokens, why in (
        ({name: torch.ones(2, 2)}, {}, "made for another model: .* is \\(2, 2\\), here"),
        ({"input_blocks.9.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 2)}, {}, "is not in this one"),
        ({}, {"<x>": torch.ones(1, 768)}, "made for another model: '<new1>' has 768 numbers, expected 16"),
    ):
        save_delta(tmp_path / "d.ckpt", weights, tokens)
        with pytest.raises(CheckpointError, match=why):
            apply_deltas(model, [tmp_path / "d.ckpt"])
    torch.save({"x": torch.ones(1)}, tmp_path / "d.bin")
    with pytest.raises(CheckpointError, match="not a delta of Custom Diffusion"):
        apply_deltas(model, [tmp_path / "d.bin"])


def test_the_recorded_compression():
    case, tensors = load_case("custom_diffusion_compress")
    for i, one in enumerate(case["cases"]):
        u, v = compressed(tensors[f"{i}.tuned"], tensors[f"{i}.pretrained"], one["ratio"])
        assert len(v) == one["rank"]
        assert_golden(tensors[f"{i}.pretrained"] + u @ v, tensors[f"{i}.merged"], case)


def test_images_are_scaled_as_their_captions_say(home):
    subject = Subject(str(home / "mine"), 48, "a thing", str(home / "class"), augment=True)
    seen = set()
    for i in range(40):
        torch.manual_seed(i)
        example = subject[i % 4]
        assert example["image"].shape == (48, 48, 3) and example["mask"].shape == (6, 6, 1)
        assert example["mask"].max() == 1 and example["class_caption"] == "a tree"
        grey = np.abs(example["image"]).max(2) == 0
        inside = example["mask"][..., 0].repeat(8, 0).repeat(8, 1) > 0
        assert not (grey & inside).all(axis=None) or inside.all()
        seen.add(example["caption"].removesuffix("a thing"))
    assert seen == {"", "a far away ", "very small ", "zoomed in ", "close up "}
