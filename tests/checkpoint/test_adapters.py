"""LoRA files and embeddings, in every layout that is read, on models of Stable Diffusion's kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ldm
from ldm.checkpoint import CheckpointError, load_model, save_weights
from ldm.checkpoint.delta import apply_deltas, save_delta
from ldm.checkpoint.embeddings import add_embeddings, read_embeddings, save_embeddings
from ldm.checkpoint.lora import merge_lora
from tests.helpers.scripts import Script, check_laws
from tests.helpers.tiny_models import tiny_text_model, write_model

CONFIGS = {"v1": "configs/stable-diffusion/v1-inference.yaml", "v2": "configs/stable-diffusion/v2-inference.yaml"}
TEXT = {
    "v1": "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    "v2": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
}
U = "model.diffusion_model."
# The same layers as files name them: the weight, and its name in each layout.
ATTENTION = U + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LAYERS = {
    ATTENTION: {
        "kohya": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "ours": "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k",
        "peft": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "older": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k",
    },
    U + "middle_block.1.proj_in.weight": {
        "kohya": "lora_unet_mid_block_attentions_0_proj_in",
        "ours": "lora_unet_middle_block_1_proj_in",
        "peft": "unet.mid_block.attentions.0.proj_in",
    },
    U + "input_blocks.1.0.in_layers.2.weight": {
        "kohya": "lora_unet_down_blocks_0_resnets_0_conv1",
        "ours": "lora_unet_input_blocks_1_0_in_layers_2",
        "peft": "base_model.model.down_blocks.0.resnets.0.conv1",
    },
    "text": {
        "kohya": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "ours": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "peft": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "older": "text_encoder.text_model.encoder.layers.0.self_attn.to_q",
    },
}
ENDS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "ours": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "older": ("_lora.down.weight", "_lora.up.weight"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    files = tiny_text_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])
    loaded = load_model(files[1], files[3])
    return loaded, {**loaded.state_dict()}, request.param


def restored(model):
    loaded, before, kind = model
    for name, parameter in loaded.named_parameters():
        parameter.data = before[name]
    return loaded, before, kind


def write_lora(path: Path, layout: str, before: dict, kind: str, alpha: float | None = None) -> dict:
    """A file of that layout; the change of each weight that it stands for."""
    torch.manual_seed(3)
    state, changes = {}, {}
    for weight, names in LAYERS.items():
        key = TEXT[kind] if weight == "text" else weight
        outs, ins, *kernel = before[key].shape
        outs = outs // 3 if key == TEXT["v2"] else outs
        down, up = torch.randn(2, ins, *kernel), torch.randn(outs, 2, *[1] * len(kernel))
        change = (up.flatten(1) @ down.flatten(1)).view(outs, ins, *kernel)
        if layout in names:
            state |= dict(zip((names[layout] + end for end in ENDS[layout]), (down, up), strict=True))
            scale = 1.0 if alpha is None else alpha / 2
            if alpha is not None:
                state[names[layout] + ".alpha"] = torch.tensor(alpha)
            changes[key] = scale * change
    save_weights(path, state)
    return changes


@pytest.mark.parametrize("layout, alpha", [("kohya", 1.0), ("ours", None), ("peft", None), ("older", None)])
def test_a_lora_is_merged_in_every_layout_and_several_add_up(model, tmp_path, layout, alpha):
    loaded, before, kind = restored(model)
    changes = write_lora(tmp_path / "a.safetensors", layout, before, kind, alpha)
    assert merge_lora(loaded, tmp_path / "a.safetensors", 0.5) == []
    assert merge_lora(loaded, tmp_path / "a.safetensors", 0.25) == []
    for key, after in loaded.state_dict().items():
        expected = before[key].clone()
        if key in changes:
            expected[: len(changes[key])] += 0.75 * changes[key]  # of the packed weight only the query's rows
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert len(changes) == (2 if layout == "older" else 4)


def test_what_does_not_match_is_said_and_what_is_for_another_model_refused(model, tmp_path):
    loaded, before, kind = restored(model)
    down, up = torch.randn(2, before[ATTENTION].shape[1]), torch.randn(before[ATTENTION].shape[0], 2)
    name = LAYERS[ATTENTION]["kohya"]
    good = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    strange = {"lora_unet_up_blocks_9_x.lora_down.weight": down, "lora_unet_up_blocks_9_x.lora_up.weight": up}
    more = {f"{name}.lora_mid.weight": up, "lora_unet_x.alpha": torch.tensor(1.0)}
    save_weights(tmp_path / "some.safetensors", good | strange | more)
    assert merge_lora(loaded, tmp_path / "some.safetensors") == sorted(strange | more)
    for state, why in (
        (strange, "made for another model: none of its 1 layers is in this one"),
        ({f"{name}.lora_down.weight": down[:, 1:].contiguous(), f"{name}.lora_up.weight": up}, "changes a weight of"),
        ({"model.weight": up}, "not a LoRA of kohya's scripts, peft or diffusers"),
    ):
        save_weights(tmp_path / "bad.safetensors", state)
        with pytest.raises(CheckpointError, match=why):
            merge_lora(loaded, tmp_path / "bad.safetensors")


def test_embeddings_in_every_layout(model, tmp_path):
    """A token of two vectors is read as two tokens that have them."""
    loaded, _, _ = restored(model)
    encoder = loaded.cond_stage_model
    width, rows = encoder.token_table.embedding_dim, encoder.token_table.num_embeddings
    vectors = torch.randn(2, width)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x"}, tmp_path / "mycat.pt")
    save_weights(tmp_path / "mydog.safetensors", {"emb_params": vectors[:1]})
    torch.save({"<Cat-Toy>": vectors[1]}, tmp_path / "learned_embeds.bin")
    save_embeddings(tmp_path / "two.safetensors", {"<r>": vectors})
    for file, name, count in (
        ("mycat.pt", "mycat", 2),
        ("mydog.safetensors", "mydog", 1),
        ("learned_embeds.bin", "<Cat-Toy>", 1),
        ("two.safetensors", "<r>", 2),
    ):
        assert add_embeddings(encoder, tmp_path / file) == [name]
        ids = encoder.tokens(f"a {name}, in mycatalogue")[0].tolist()
        assert [one for one in ids if one >= rows] == [*range(rows, rows + count)]
        assert torch.equal(encoder.token_table.weight[rows : rows + count], read_embeddings(tmp_path / file)[name])
        words = encoder.words(f"a {name}")
        assert words.ids[2:-1] == tuple(range(rows, rows + count))
        assert len(words.words) == 2 and words.of(name) == tuple(range(2, 2 + count))  # one word, whatever its vectors
        rows += count
    with torch.no_grad():
        assert encoder(["a mycat in mydog"]).isfinite().all()
    with pytest.raises(CheckpointError, match="'mycat' is a token of this model already"):
        add_embeddings(encoder, tmp_path / "mycat.pt")
    save_embeddings(tmp_path / "wide.safetensors", {"<w>": torch.randn(1, width + 1)})
    with pytest.raises(CheckpointError, match=f"made for another model: '<w>' has vectors of {width + 1} numbers"):
        add_embeddings(encoder, tmp_path / "wide.safetensors")


# In the scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    config, weights = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", str(config), "--ckpt", str(weights), "--steps", "2"]


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script("txt2img", tmp_path, *files, "--n_samples", "1", "--plan", "off")


LAYER = "middle_block.1.transformer_blocks.0.attn2.to_"


def save_lora_and_word(files: list[str], folder: Path) -> torch.Size:
    """l.safetensors, a LoRA of one layer with a strange key, and e.safetensors, the word <thing>; the layer's shape."""
    outs, ins = shape = load_model(files[1], files[3]).get_parameter(f"{U}{LAYER}v.weight").shape
    name = f"lora_unet_{LAYER.replace('.', '_')}v"
    torch.manual_seed(0)
    lora = {f"{name}.lora_down.weight": torch.randn(1, ins), f"{name}.lora_up.weight": torch.randn(outs, 1)}
    save_weights(folder / "l.safetensors", lora | {"strange": torch.zeros(1)})
    save_embeddings(folder / "e.safetensors", {"<thing>": 3 * torch.randn(1, 16)})
    return shape


def test_files_are_used_and_recorded(script, files, tmp_path, capsys):
    save_lora_and_word(files, tmp_path)
    prompt, use = ["--prompt", "a <thing>"], ["--embedding", str(tmp_path / "e.safetensors")]
    (plain,) = script(*prompt)
    said = "<thing>: no word of this model, which reads the letters; an embedding or a delta brings it"
    assert said in capsys.readouterr().out
    (word,) = script(*prompt, *use)
    assert "no word" not in capsys.readouterr().out
    (both,) = script(*prompt, *use, "--lora", f"{tmp_path / 'l.safetensors'}:3")
    assert "--lora" in capsys.readouterr().err
    shown = [script.pixels(one) for one in (plain, word, both)]
    assert (shown[0] != shown[1]).any() and (shown[1] != shown[2]).any()
    assert "lora" not in plain and [one[0] for one in both["embedding"]] == ["e.safetensors"]
    (used,) = both["lora"]
    assert used[0] == "l.safetensors" and used[2] == 3.0 and len(used[1]) == 16
    given = {"embedding": tmp_path / "e.safetensors", "lora": [f"{tmp_path / 'l.safetensors'}:3"]}
    (image,) = ldm.load(config=files[1], ckpt=files[3], **given).images("a <thing>", steps=2, plan="off")
    assert (np.asarray(image) == shown[2]).all()


def test_the_laws_under_all_three(script, files, tmp_path):
    shape = save_lora_and_word(files, tmp_path)
    save_delta(tmp_path / "d.ckpt", {f"{LAYER}k.weight": torch.randn(shape)}, {"<x>": 3 * torch.randn(1, 16)})
    use = ["--lora", f"{tmp_path}/l.safetensors:3", "--embedding", f"{tmp_path}/e.safetensors"]
    words = ["--prompt", "a <thing> <new1>", "--delta", f"{tmp_path}/d.ckpt"]
    check_laws(script, *use, *words, "--steps", "5", "--noise-weight", "0")


def test_a_word_changes_no_image_without_it(script, tmp_path):
    """Neither one of an embedding nor the one of a delta that has no weights."""
    save_embeddings(tmp_path / "e.safetensors", {"<thing>": 3 * torch.randn(2, 16)})
    save_delta(tmp_path / "d.ckpt", {}, {"<x>": 3 * torch.randn(1, 16)})
    (before,) = script("--prompt", "an owl")
    for use in (["--embedding", f"{tmp_path}/e.safetensors"], ["--delta", f"{tmp_path}/d.ckpt"]):
        (after,) = script("--prompt", "an owl", *use)
        assert after["file"] != before["file"] and (script.pixels(after) == script.pixels(before)).all()


def test_words_of_a_delta_can_be_edited(files, tmp_path):
    """In prompt-to-prompt, which reads the words before the model is loaded."""
    script = Script(
        "prompt2prompt", tmp_path, *files, "--prompt", "a <new1>", "--reweight", "<new1>=2", "--plan", "off"
    )
    save_delta(tmp_path / "d.ckpt", {}, {"<x>": torch.randn(1, 16)})
    source, edit = script("--delta", str(tmp_path / "d.ckpt"))
    assert [one[0] for one in edit["delta"]] == ["d.ckpt"] and (script.pixels(source) != script.pixels(edit)).any()


def test_bad_files(script, tmp_path, capsys):
    save_embeddings(tmp_path / "e.safetensors", {"<thing>": torch.randn(1, 768)})
    save_weights(tmp_path / "x.safetensors", {"x.weight": torch.ones(1)})
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for arguments, why in (
        (["--lora", "nowhere.safetensors"], "--lora: nowhere.safetensors: no such file"),
        (["--lora", f"{tmp_path / 'e.safetensors'}:2000"], "--lora: expected a number in -1000..1000; got '2000'"),
        (["--lora", str(tmp_path / "x.safetensors")], f"--lora: {tmp_path / 'x.safetensors'}: not a LoRA"),
        (["--lora", str(tmp_path / "empty.safetensors")], "--lora: "),
        (["--embedding", str(tmp_path / "e.safetensors")], "--embedding: "),
    ):
        assert script.refusal(capsys, *arguments).startswith(why)


@pytest.mark.parametrize(
    "option, name, content, why",
    [
        ("--delta", "d.bin", {"unet": None}, "unet: expected weights or vectors by their names; got None"),
        (
            "--delta",
            "d.bin",
            {"unet": {}, "modifier_token": {"<a>": [1.0]}},
            "<a>: expected the vector of a token; got",
        ),
        ("--delta", "d.ckpt", {"state_dict": {"embed": None}}, "embed: expected the vector of a token; got None"),
        (
            "--embedding",
            "e.pt",
            {"string_to_param": None},
            "expected a vector, or several, for each token; 'e' is None",
        ),
        ("--embedding", "e.pt", {"x": torch.zeros(0, 16)}, "expected a vector, or several, for each token; 'x' is"),
    ],
)
def test_files_whose_entries_are_no_tensors(script, tmp_path, capsys, option, name, content, why):
    torch.save(content, tmp_path / name)
    assert script.refusal(capsys, option, str(tmp_path / name)).startswith(f"{option}: {tmp_path / name}: {why}")


def test_a_lora_of_odd_shapes(files, tmp_path):
    model, name = load_model(files[1], files[3]), "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_v"
    outs, ins = model.get_parameter(f"{U}middle_block.1.transformer_blocks.0.attn2.to_v.weight").shape
    down, up = torch.ones(1, ins), torch.ones(outs, 1)
    for parts in (
        {"lora_down.weight": down[0], "lora_up.weight": up[:, 0]},
        {"lora_down.weight": down[:0], "lora_up.weight": up[:, :0]},
        {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.ones(2)},
    ):
        save_weights(tmp_path / "l.safetensors", {f"{name}.{end}": value.clone() for end, value in parts.items()})
        with pytest.raises(CheckpointError, match="expected two matrices and one alpha"):
            merge_lora(model, tmp_path / "l.safetensors")


def test_deltas_of_several_concepts_add_up(files, tmp_path):
    """One whole, in the layout of CompVis, and one compressed, in that of diffusers, which names its word."""
    model = load_model(files[1], files[3])
    key, encoder = f"{LAYER}k.weight", model.cond_stage_model
    own = model.get_parameter(U + key).clone()
    torch.manual_seed(0)
    first, u, v = torch.randn(own.shape), torch.randn(len(own), 1), torch.randn(1, own.shape[1])
    words = torch.randn(2, 16)
    save_delta(tmp_path / "a.ckpt", {key: first}, {"<x>": words[:1]})
    torch.save({"unet": {key: {"u": u, "v": v}}, "modifier_token": {"<two>": words[1]}}, tmp_path / "b.bin")
    apply_deltas(model, [tmp_path / "a.ckpt", tmp_path / "b.bin"])
    torch.testing.assert_close(model.get_parameter(U + key).detach(), first + u @ v)
    ids = [encoder.words(word).ids[1] for word in ("<new1>", "<two>")]
    assert torch.equal(encoder.token_table.weight[ids], words)


def test_a_delta_for_a_model_on_another_device(files, tmp_path):
    model, key = load_model(files[1], files[3]).to("meta"), "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    torch.save({"unet": {key: torch.ones(model.get_parameter(U + key).shape)}}, tmp_path / "d.bin")
    apply_deltas(model, [tmp_path / "d.bin"])
    assert model.get_parameter(U + key).device.type == "meta"


def test_the_tokenizer_of_bert_too(files, tmp_path):
    encoder = load_model(files[1], files[3]).cond_stage_model
    vectors = torch.randn(3, 16)
    save_embeddings(tmp_path / "e.safetensors", {"<Thing>": vectors})
    add_embeddings(encoder, tmp_path / "e.safetensors")
    before, ids = encoder.tokenize("a")[0].tolist(), encoder.tokenize("a <thing>")[0].tolist()
    assert ids[:2] == before[:2] and torch.equal(encoder.token_table.weight[ids[2:5]], vectors)
    assert ids[5] == before[2]  # the token that ends a text
    assert encoder.cut(["a a a a a a", "a <thing> a a a"]) == [False, True]
