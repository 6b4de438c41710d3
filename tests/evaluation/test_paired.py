"""evaluation/paired.py: pairs of images from the same noise."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import paired
from evaluation.metrics.paired import LPIPS_WEIGHTS
from ldm.io.files import file_sha256
from ldm.io.images import save_png
from tests.helpers.measures import N, assert_one_line, draw, load_json, settings


def test_pairs_are_of_the_same_noise(call, sets, tmp_path):
    assert call(paired, "plain", "fast", "--out", str(tmp_path / "a.json"), "--batch-size", "4") == 0
    found = load_json(tmp_path / "a.json")["values"]
    pairs = [(np.float64(draw(i)), np.float64(Image.open(sets / "fast" / f"{N - i:02}-b.png"))) for i in range(1, N)]
    expected = np.mean([10 * np.log10(255**2 / ((a - b) ** 2).mean()) for a, b in pairs])
    assert found["psnr_vs_plain"] == pytest.approx(expected, rel=1e-5) and found["identical_pictures"] == 1
    assert 0.5 < found["ssim_vs_plain"] < 1 and found["fid_vs_plain"] > 0 and found["feature_cosine_vs_plain"] < 1
    assert all(key.removesuffix("_interval").endswith("_vs_plain") for key in found if key != "identical_pictures")
    assert load_json(tmp_path / "a.json")["samples"]["plan"]["keys"] == [0, 4]


def test_lpips_with_weights_from_a_recipe(call, tmp_path, monkeypatch):
    """Runs where there is a torchvision that fits PyTorch."""
    try:
        from torchvision.models import alexnet
    except Exception as error:  # is missing, or does not fit
        pytest.skip(f"no torchvision: {error}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = tmp_path / "hub" / "checkpoints" / LPIPS_WEIGHTS
    torch.save(alexnet().state_dict(), weights)
    assert call(paired, "plain", "fast", "--lpips", "--out", str(tmp_path / "a.json")) == 0
    found = load_json(tmp_path / "a.json")
    assert found["values"]["lpips_vs_plain"] > 0
    assert found["protocol"]["lpips"]["sha256"] == file_sha256(weights)


def test_images_that_are_too_small_are_refused(call, tmp_path, capsys):
    for i, side in enumerate((10, 10, 30, 30)):
        save_png(tmp_path / str(side) / f"{i}.png", draw(i, side), settings(i, None))
    for side, flags, least in ((10, [], 11), (30, ["--lpips"], 31)):
        assert call(paired, *[str(tmp_path / str(side))] * 2, *flags) == 2
        assert_one_line(capsys.readouterr().err, f"ACCELERATED: .* at least {least} x {least} pixels; got 2 .* {side}$")


@pytest.mark.parametrize(
    "plain, fast, why",
    [
        ("real", "plain", "ACCELERATED|PLAIN"),
        ("plain", "short", "mismatched sets: 2 images of .*plain have no partner, such as"),
        ("plain", "noise", r"different noise or inputs: .*\[\[7, 0, 0\], .* there and \[\[7, 100, 0\], .* here"),
        ("plain", "array.npy", "can't pair .*plain with .*array.npy: .*expected two folders or two arrays"),
        ("twice", "plain", "1 images share noise and inputs with another; are there several runs"),
    ],
)
def test_sets_that_do_not_match_are_refused(call, sets, capsys, plain, fast, why):
    np.save(sets / "array.npy", np.stack([np.array(draw(i)) for i in range(N)]))
    for i in range(N):
        save_png(sets / "noise" / f"{i:02}-a.png", draw(i), settings(i, None) | {"seed": [7, i + 100, 0]})
        if i > 1:
            save_png(sets / "short" / f"{i}.png", draw(i), settings(i, None))
        save_png(sets / "twice" / f"{i}.png", draw(i), settings(max(i, 1), None))
    assert call(paired, plain, fast) == 2
    assert_one_line(capsys.readouterr().err, why)


def test_runs_that_differ_in_more_than_an_acceleration_are_refused(call, tmp_path, capsys):
    card = {
        "plan": "off",
        "seeds": [7],
        "weights": "w",
        "protocol": {"guidance": 2.0, "size": 32},
        "config": "c",
        "averaged": "ema",
        "method": {"precision": "full", "steps": 50},
    }
    others = {
        "other": {"seeds": [8], "protocol": {"guidance": 5.0}},
        "raw": {"averaged": "raw"},
        "config": {"config": "d"},
        "half": {"method": {"precision": "autocast"}},
    }
    for name, change in {
        "plain": {},
        "fast": {"plan": "auto:9", "method": {"precision": "full", "steps": 20}},
        **others,
    }.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", arr_0=np.stack([np.array(draw(i)) for i in range(4)]))
        (tmp_path / name / "run.json").write_text(json.dumps(card | change))
    plain, fast, other = (str(tmp_path / name / "samples.npz") for name in ("plain", "fast", "other"))
    assert call(paired, plain, fast, "--out", str(tmp_path / "a.json")) == 0
    made = load_json(tmp_path / "a.json")["samples"]
    assert (made["plan"], made["plain"]["plan"]) == ("auto:9", "off")
    capsys.readouterr()
    assert call(paired, plain, other) == 2
    assert_one_line(
        capsys.readouterr().err,
        r"ACCELERATED: differs from the plain run in protocol.guidance \(2.0 there, "
        r"5.0 here\); seeds \(\[7\] there, \[8\] here\); expected runs",
    )
    for name, why in {
        "raw": "averaged .ema there, raw here.",
        "config": "config .c there, d here.",
        "half": "precision .full there, autocast here.",
    }.items():
        assert call(paired, plain, str(tmp_path / name / "samples.npz")) == 2
        assert_one_line(capsys.readouterr().err, f"ACCELERATED: differs from the plain run in {why}; expected runs")


def test_arrays_are_paired_by_position(call, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.stack([np.array(draw(i)) for i in range(4)]))
    np.save(tmp_path / "b.npy", np.stack([np.array(draw(i)) for i in range(3)]))
    np.save(tmp_path / "c.npy", np.stack([np.array(draw(i, 24)) for i in range(4)]))
    a, b, c = (str(tmp_path / f"{name}.npy") for name in "abc")
    assert call(paired, a, a) == 0
    assert "identical_pictures       4" in capsys.readouterr().out
    assert call(paired, a, b) == 2
    assert_one_line(capsys.readouterr().err, "ACCELERATED: .*a.npy has 4 images, .*b.npy has 3; they are paired by")
    assert call(paired, a, c) == 2
    assert_one_line(capsys.readouterr().err, "ACCELERATED: 0 has 32 x 32 pixels, its partner 0 has 24 x 24")
