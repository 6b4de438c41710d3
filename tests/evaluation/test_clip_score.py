"""evaluation/clip_score.py, end to end with a tiny CLIP model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from evaluation import clip_score
from evaluation.metrics.clip_score import compute
from evaluation.metrics.extractors import load_clip, resized
from evaluation.metrics.result import ResultError, comparable, read_result
from ldm.io.images import from_pil, open_image
from ldm.retrieval.embedders import load_embedder
from tests.helpers.measures import N, assert_one_line, draw, load_json
from tests.helpers.paths import ROOT


def test_clip_score_end_to_end(call, sets, clip_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a cat " * 60, *(f"a cat wearing {i} sunglasses" for i in range(1, N))]))
    ours = [sets / "plain", "--weights", clip_folder, "--variant", "hessel", "--out", tmp_path / "a.json"]
    assert call(clip_score, *map(str, ours), "--prompts", str(prompts), network=False) == 0
    assert "1 of 22 captions are longer than CLIP reads (77 tokens)" in capsys.readouterr().err
    found = load_json(tmp_path / "a.json")
    assert found["values"]["captions_cut"] == 1 and found["protocol"]["resize"] == "clip-crop"

    model = load_clip(clip_folder)
    seen = model.embed_images(torch.stack([resized(from_pil(draw(i))[None], 28, "clip-crop")[0] for i in range(N)]))
    read = model.embed_texts([f"A photo depicts {line}" for line in prompts.read_text().splitlines()])
    expected = (2.5 * (seen * read).sum(1).clamp(min=0)).mean().item()
    assert found["values"]["clip_score_hessel"] == pytest.approx(expected, rel=1e-5)

    again = [*ours[:-1], tmp_path / "b.json", "--prompts", prompts, "--batch-size", "3"]
    assert call(clip_score, *map(str, again), network=False) == 0
    name = "clip_score_hessel"
    assert load_json(tmp_path / "b.json")["values"][name] == pytest.approx(found["values"][name], rel=1e-5)

    # Other tokens for the same captions are another measure.
    lines = (clip_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    again = [*ours[:-1], tmp_path / "c.json", "--prompts", prompts, "--vocabulary", tmp_path / "merges.txt"]
    assert call(clip_score, *map(str, again), network=False) == 0
    with pytest.raises(ResultError, match="differ in tokens_sha256"):
        comparable({key: read_result(tmp_path / f"{key}.json") for key in "bc"})


def test_a_variant_takes_its_own_model_only(call, sets, clip_folder, capsys):
    assert call(clip_score, str(sets / "plain"), "--weights", str(clip_folder), network=False) == 2
    assert_one_line(
        capsys.readouterr().err,
        "--weights: hessel-b32 is defined with openai/clip-vit-base-patch32 "
        r".*\(224, 32, 768, 12\)\); .* has \(28, 14, 32, 2\); for another",
    )


def test_the_encoder_that_ships_knows_what_an_emoji_shows(tmp_path):
    """Its score is 100 times the cosine of its embeddings."""
    (tmp_path / "images").mkdir()
    file = ROOT / "docs" / "examples" / "inpaint" / "face.png"
    (tmp_path / "images" / "face.png").write_bytes(file.read_bytes())
    embedder = load_embedder("emoji")
    seen = embedder.images(embedder.prepared(open_image(file).resize((128, 128), Image.Resampling.BICUBIC))[None])
    found = []
    for text in ("a smiling face", "a red car"):
        weights = ROOT / "models" / "rdm" / "emoji-encoder"
        result = compute(tmp_path / "images", variant="cos100", weights=weights, prompts=[text], resize="clip-crop")
        found.append(result.values["clip_score_cos100"])
        assert found[-1] == pytest.approx(100 * float((seen * embedder.texts([text])).sum()), abs=0.1)
    assert found[0] > found[1] + 10
