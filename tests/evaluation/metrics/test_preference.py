"""Scores of human preference: a published model at a small size, and the command on models in published layouts."""

from __future__ import annotations

import json

import pytest
import torch

from evaluation import preference
from evaluation.metrics.preference import ImageReward
from evaluation.table.row import Sources, jobs_of
from evaluation.table.spec import load_table
from ldm.checkpoint import save_weights
from ldm.io.errors import SettingError
from tests.helpers.goldens import recipe_tensor
from tests.helpers.measures import assert_one_line, load_json
from tests.helpers.paths import GOLDENS

CASE = json.loads((GOLDENS / "image_reward.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small ImageReward.pt with the vocabulary beside it."""
    folder = tmp_path_factory.mktemp("reward")
    names = CASE["shapes"].items()
    torch.save({k: recipe_tensor(k, tuple(shape), CASE["seed"], CASE["gain"]) for k, shape in names}, folder / "r.pt")
    (folder / "vocab.txt").write_text("\n".join(CASE["vocabulary"]))
    return folder / "r.pt"


def test_the_published_scores(weights):
    model = ImageReward(torch.load(weights, weights_only=True), weights.with_name("vocab.txt"))
    images = CASE["images"]
    pixels = recipe_tensor(images["key"], tuple(images["shape"]), CASE["seed"], images["gain"]).clamp(*images["clamp"])
    assert [[i for i in read.ids if i] for read in model.tokenizer.encode_batch(CASE["texts"])] == CASE["ids"]
    torch.testing.assert_close(model(pixels, CASE["texts"]), torch.tensor(CASE["scores"]), rtol=0, **CASE["tolerance"])


def test_the_command(sets, weights, clip_folder, tmp_path, capsys):
    found = {}
    for name, path in (("image-reward", weights), ("pick-score", clip_folder)):
        out = tmp_path / f"{name}.json"
        assert preference.main([str(sets / "plain"), "--model", name, "--weights", str(path), "--out", str(out)]) == 0
        found |= load_json(out)["values"]
    low, high = found["image_reward_interval"]
    assert low < found["image_reward"] < high and -100 < found["pick_score"] < 100
    long = tmp_path / "long.txt"
    long.write_text("".join(f"{'a ' * (99 if i else 1)}\n" for i in range(load_json(out)["protocol"]["n"])))
    given = [str(sets / "plain"), "--weights", str(weights), "--prompts", str(long)]
    capsys.readouterr()
    assert preference.main(given) == 0
    assert "prompts are longer than image-reward reads and lost their ends" in "".join(capsys.readouterr())


def test_other_weights_are_refused(sets, weights, tmp_path, capsys):
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)})
    for given, why in (
        ([], "--weights: image-reward needs ImageReward.pt of huggingface.co/THUDM/ImageReward, with vocab.txt"),
        (["--model", "pick-score"], "--weights: pick-score needs the folder of huggingface.co/yuvalkirstain/PickScore"),
        (
            ["--weights", str(tmp_path / "other.safetensors")],
            f"--weights: {tmp_path}/other.safetensors: not ImageReward",
        ),
        (["--weights", str(weights), "--model", "pick-score"], f"--weights: clip: {weights}: no such model; "),
    ):
        assert preference.main([str(sets / "plain"), *given]) == 2
        assert_one_line(capsys.readouterr().err, why)
    with pytest.raises(SettingError, match="pick_score: pick-score needs the folder of "):
        _ = jobs_of(load_table("table15"), "coco", tmp_path, Sources(), None, ["pick_score"])[0].bench.measures
