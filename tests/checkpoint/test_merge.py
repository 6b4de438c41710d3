"""Several deltas of Custom Diffusion in one, by the published closed form."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoint import CheckpointError, load_model
from ldm.checkpoint.conversion import UNET
from ldm.checkpoint.delta import apply_deltas, changes_of, read_delta, read_deltas, save_delta
from ldm.checkpoint.merge import features, merge_deltas, shares
from ldm.io.errors import SettingError
from scripts.merge_deltas import main
from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model

LAYER = "middle_block.1.transformer_blocks.0.attn2.to_{}.weight"
PROMPTS = ["a <new1>", "the <new2>"]
CAPTIONS = [f"{word} {other}" for word in "abcdefgh" for other in "abcdefgh"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    config, weights = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", str(config), "--ckpt", str(weights)]


@pytest.fixture
def model(files):
    return load_model(files[1], files[3])


@pytest.fixture
def deltas(model, tmp_path):
    """One of keys and values in the layout of CompVis, one of values in that of diffusers; of two words."""
    torch.manual_seed(0)
    key, value = (model.get_parameter(UNET + LAYER.format(one)).detach() for one in "kv")
    first = {LAYER.format("k"): key + 0.1 * torch.randn(key.shape), LAYER.format("v"): value + 0.1}
    save_delta(tmp_path / "a.ckpt", first, {"<new1>": torch.randn(1, 16)})
    second = {LAYER.format("v"): value + 0.1 * torch.randn(value.shape)}
    torch.save({"unet": second, "modifier_token": {"<new2>": torch.randn(16)}}, tmp_path / "b.bin")
    return [tmp_path / "a.ckpt", tmp_path / "b.bin"]


def test_the_closed_form():
    """It gives the words what is wanted, and no other change that does so too moves the captions less."""
    torch.manual_seed(0)
    words, kept = torch.randn(3, 12).double(), torch.randn(40, 12).double() @ torch.randn(12, 12).double()
    wanted, gram = torch.randn(3, 5).double(), kept.T @ kept
    change = wanted.T @ shares(words, kept)
    torch.testing.assert_close(words @ change.T, wanted)
    inverse = torch.linalg.inv(gram)
    paper = wanted.T @ torch.linalg.inv(words @ inverse @ words.T) @ words @ inverse
    torch.testing.assert_close(change, paper, rtol=1e-6, atol=1e-6)
    free = torch.eye(12).double() - torch.linalg.pinv(words) @ words  # changes that no word sees
    for _ in range(20):
        other = change + 0.1 * torch.randn(5, 12).double() @ free
        torch.testing.assert_close(words @ other.T, wanted)
        assert (kept @ other.T).norm() > (kept @ change.T).norm()


def test_fewer_captions_than_numbers_and_a_word_twice():
    torch.manual_seed(0)
    word, kept, wanted = torch.randn(1, 12).double(), torch.randn(4, 12).double(), torch.randn(2, 5).double()
    change = wanted[:1].T @ shares(word, kept)
    torch.testing.assert_close(word @ change.T, wanted[:1], rtol=1e-6, atol=1e-6)
    assert (kept @ change.T).norm() < 1e-6 * change.norm()  # where nothing has to give way
    twice = wanted.T @ shares(torch.cat([word, word]), torch.randn(40, 12).double())
    torch.testing.assert_close(word @ twice.T, wanted.mean(0, keepdim=True))
    with pytest.raises(SettingError, match="13 tokens in all, more than the 12 numbers of a feature"):
        shares(torch.randn(13, 12).double(), kept)


@torch.no_grad()
def test_each_prompt_keeps_what_its_own_delta_makes_of_it(model, files, deltas):
    merged = merge_deltas(model, deltas, PROMPTS, CAPTIONS)
    assert set(merged.weights) == {LAYER.format("k"), LAYER.format("v")} and list(merged.tokens) == ["<new1>", "<new2>"]
    assert merged.deviation < 1e-6 and merged.kept == 7 * len(CAPTIONS) >= merged.width  # all but the start
    own = {name: model.get_parameter(UNET + name).double() for name in merged.weights}
    words = [torch.cat([*features(model, [prompt])]) for prompt in PROMPTS]
    alone = [changes_of(model, path, read_delta(path)) for path in deltas]
    for name, weight in merged.weights.items():
        changes = [one.get(UNET + name, torch.zeros_like(weight)).double() for one in alone]
        for of, change in zip(words, changes, strict=True):
            expected = of @ (own[name] + change).T
            torch.testing.assert_close(of @ weight.double().T, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_captions_keep_more_of_the_model_than_with_the_delta_itself(model, deltas):
    change = changes_of(model, deltas[0], read_delta(deltas[0]))
    merged = merge_deltas(model, deltas[:1], PROMPTS[:1], CAPTIONS)
    held = torch.cat([*features(model, CAPTIONS)])
    for name, weight in merged.weights.items():
        moved = held @ (weight - model.get_parameter(UNET + name)).double().T
        assert 0 < moved.norm() < 0.9 * (held @ change[UNET + name].double().T).norm()


def test_the_command_writes_a_delta_in_both_layouts(files, deltas, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    given = [*files, "--captions", str(tmp_path / "captions.txt")]
    expected = merge_deltas(load_model(files[1], files[3]), deltas, PROMPTS, CAPTIONS)
    for name in ("both.ckpt", "both.bin"):
        out = tmp_path / name
        assert main([*map(str, deltas), "--prompts", *PROMPTS, *given, "--out", str(out)]) == 0
        assert "<new1>, <new2>, 2 layers" in capsys.readouterr().out
        model = load_model(files[1], files[3])
        (written,) = apply_deltas(model, [out])
        assert list(written.tokens) == ["<new1>", "<new2>"]
        for key, weight in expected.weights.items():
            torch.testing.assert_close(model.get_parameter(UNET + key).detach(), weight)


def test_words_without_names_are_counted_through_all_files(files, tmp_path, capsys):
    vectors = torch.randn(3, 16)
    save_delta(tmp_path / "a.ckpt", {}, {"<x>": vectors[:1]})
    save_delta(tmp_path / "b.ckpt", {}, {"<x>": vectors[1:2]})
    torch.save({"unet": {}, "modifier_token": {"<new2>": vectors[2]}}, tmp_path / "c.bin")
    paths = [tmp_path / "a.ckpt", tmp_path / "c.bin", tmp_path / "b.ckpt"]
    assert [[*delta.tokens] for delta in read_deltas(paths)] == [["<new1>"], ["<new2>"], ["<new3>"]]
    script = Script("txt2img", tmp_path, *files, "--prompt", "a <new3>", "--steps", "2")
    script(*(part for path in paths for part in ("--delta", str(path))))
    said = capsys.readouterr().out
    assert f"{paths[2]}: its words have no names; here they are <new3>" in said and str(paths[1]) not in said


def test_bad_input(files, deltas, tmp_path, capsys):
    torch.save(
        {"unet": {LAYER.format("q"): torch.ones(64, 64)}, "modifier_token": {"<q>": torch.ones(16)}}, tmp_path / "q"
    )
    torch.save(
        {"unet": {LAYER.format("k"): torch.ones(1, 1)}, "modifier_token": {"<new2>": torch.ones(16)}}, tmp_path / "s"
    )
    torch.save({"unet": {}, "modifier_token": {"<new1>": torch.ones(16)}}, tmp_path / "twice")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    (tmp_path / "told.txt").write_text("a cat\nmy <NEW2>")
    first, second = map(str, deltas)
    base = [*files, "--out", str(tmp_path / "out.bin")]
    for paths, prompts, captions, why in (
        ([first, second], PROMPTS[:1], "captions.txt", "--prompts: expected one for each of the 2 files; got 1"),
        (
            [first, second],
            ["a cat", "a <new2>"],
            "captions.txt",
            f"--prompts: expected one of {first}'s words, <new1>; got",
        ),
        ([first, second], PROMPTS, "told.txt", "--captions: expected none with the new word <new2>; got 'my <NEW2>'"),
        ([first, second], PROMPTS, "nowhere.txt", "--captions: "),
        ([first, str(tmp_path / "s")], PROMPTS, "captions.txt", f"{tmp_path / 's'}: made for another model"),
        ([first, str(tmp_path / "q")], ["a <new1>", "a <q>"], "captions.txt", f"{tmp_path / 'q'}: "),
        ([second, "nowhere.bin"], PROMPTS, "captions.txt", "nowhere.bin: "),
        (
            [str(tmp_path / "twice")] * 2,
            ["a <new1>"] * 2,
            "captions.txt",
            f"{tmp_path / 'twice'}: '<new1>' is a token of",
        ),
    ):
        given = [*paths, "--prompts", *prompts, "--captions", str(tmp_path / captions), *base]
        assert main(given) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1, said
    assert not (tmp_path / "out.bin").exists()


def test_only_keys_and_values_are_merged(model, tmp_path):
    query = model.get_parameter(UNET + LAYER.format("q")).detach()
    torch.save({"unet": {LAYER.format("q"): query}, "modifier_token": {"<q>": torch.ones(16)}}, tmp_path / "q.bin")
    with pytest.raises(CheckpointError, match="only keys and values of the text can be merged"):
        merge_deltas(model, [tmp_path / "q.bin"], ["a <q>"], CAPTIONS)
