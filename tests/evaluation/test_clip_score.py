"""evaluation/clip_score.py, end to end with a tiny CLIP model."""

from __future__ import annotations

import pytest
import torch

from evaluation import clip_score
from evaluation.metrics.result import ResultError, comparable, read_result
from tests.helpers.measures import N, assert_one_line, draw, load_json


def test_clip_score_end_to_end(call, sets, clip_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a cat " * 60, *(f"a cat wearing {i} sunglasses" for i in range(1, N))]))
    ours = [sets / "plain", "--weights", clip_folder, "--variant", "hessel", "--out", tmp_path / "a.json"]
    assert call(clip_score, *map(str, ours), "--prompts", str(prompts), network=False) == 0
    assert "1 of 22 captions are longer than CLIP reads (77 tokens)" in capsys.readouterr().err
    found = load_json(tmp_path / "a.json")
    assert found["values"]["captions_cut"] == 1 and found["protocol"]["resize"] == "clip-crop"

    from evaluation.metrics.extractors import load_clip, resized
    from ldm.io.images import from_pil

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
