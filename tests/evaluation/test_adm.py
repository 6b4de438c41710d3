"""evaluation/adm.py, end to end with EfficientNet-lite0 on drawn images."""

from __future__ import annotations

import json

import numpy as np
import pytest

from evaluation import adm
from evaluation.metrics.extractors import network_fields
from evaluation.metrics.frechet import extract, save_statistics
from evaluation.runs.images import ImageFolder
from tests.helpers.measures import N, assert_one_line, disk_with_room_for, draw, fid_of, load_json


def test_adm_reads_the_published_formats(call, sets, tmp_path, capsys):
    for name in ("real", "plain"):
        images = [np.array(draw(i + 100 * (name == "real"))) for i in range(N)]
        np.savez(tmp_path / f"{name}.npz", arr_0=np.stack(images))
    real, plain, kept = (str(tmp_path / f"{name}.npz") for name in ("real", "plain", "kept"))
    assert call(adm, real, plain, "--save-statistics", kept, "--out", str(tmp_path / "a.json")) == 0
    whole = load_json(tmp_path / "a.json")["values"]
    assert {*whole} == {"fid_real", "sfid_real", "inception_score", "inception_score_std", "precision", "recall"}
    assert 1 < whole["inception_score"] < N and 0 <= whole["precision"] <= 1
    with np.load(kept) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} < {*file.files} and file["mu"].shape == (1280,)

    capsys.readouterr()
    assert call(adm, kept, plain, "--out", str(tmp_path / "b.json")) == 0
    assert "no precision and recall" in capsys.readouterr().err
    from_file = load_json(tmp_path / "b.json")["values"]
    assert "precision" not in from_file
    assert all(from_file[key] == pytest.approx(whole[key], rel=1e-9) for key in from_file)

    assert call(adm, real, str(sets / "plain"), "--batch-size", "5", "--out", str(tmp_path / "c.json")) == 0
    assert load_json(tmp_path / "c.json")["values"] == {key: pytest.approx(v, rel=1e-4) for key, v in whole.items()}

    assert call(adm, real, plain, "--bootstrap", "5", "--out", str(tmp_path / "d.json")) == 0
    found = load_json(tmp_path / "d.json")["values"]
    for name in ("fid_real", "inception_score", "precision", "recall"):
        low, high = found.pop(f"{name}_interval")
        # Wilson's interval of 0 begins at 0, but for rounding.
        assert low - 1e-9 <= found[name] <= high + 1e-9 and high > low
    assert found == whole


def test_statistics_that_can_not_be_saved_cost_no_value(call, tmp_path, capsys):
    np.savez(tmp_path / "r.npz", arr_0=np.stack([np.array(draw(i)) for i in range(5)]))
    for path, why in (
        (".", "can't write "),
        ("s", "expected a name that ends in .npz; got "),
        ("r.npz", ".*r.npz is REFERENCE itself; expected another file"),
    ):
        assert call(adm, str(tmp_path / "r.npz"), "plain", "--save-statistics", str(tmp_path / path)) == 2
        assert_one_line(capsys.readouterr().err, f"--save-statistics: {why}")
    (tmp_path / "r.npz").unlink()
    with disk_with_room_for(100_000):
        assert (
            call(adm, "real", "plain", "--save-statistics", str(tmp_path / "s.npz"), "--out", str(tmp_path / "a.json"))
            == 2
        )
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("adm.py: error: --save-statistics: ")
    assert "recall" in captured.out and "recall" in load_json(tmp_path / "a.json")["values"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_statistics_that_are_saved_again_keep_their_doubts(call, lite0, tmp_path):
    """What a file does not say of itself is not known of its copy."""
    features = extract(ImageFolder(call.sets / "real"), lite0, spatial=True)
    about = network_fields(lite0) | {"sha256": "x", "statistics": "in the file", "doubts": ["reference: of what?"]}
    save_statistics(tmp_path / "s.npz", features.moments.gaussian(), about, features.spatial.gaussian())
    copy = tmp_path / "t.npz"
    assert (
        call(adm, str(tmp_path / "s.npz"), "plain", "--save-statistics", str(copy), "--out", str(tmp_path / "a.json"))
        == 0
    )
    again = fid_of(call, tmp_path / "b.json", str(copy), "plain")
    for found in (load_json(tmp_path / "a.json"), again):
        assert found["protocol"]["reference"]["statistics"] == "in the file"
        assert "reference: of what?" in found["warnings"]


def test_spatial_statistics_that_a_file_lacks_are_taken_of_its_images(call, lite0, tmp_path, capsys):
    levels = np.stack([np.array(draw(i)) for i in range(6)])
    found = extract(ImageFolder(call.sets / "real"), lite0).moments.gaussian()
    about = json.dumps(network_fields(lite0) | {"sha256": "x"})
    np.savez(tmp_path / "half.npz", arr_0=levels, mu=found.mean, sigma=found.covariance, about=about)
    np.savez(tmp_path / "bare.npz", mu=found.mean, sigma=found.covariance, about=about)
    assert call(adm, str(tmp_path / "half.npz"), "plain", "--out", str(tmp_path / "a.json")) == 0
    assert load_json(tmp_path / "a.json")["protocol"]["reference"]["n"] == 6
    capsys.readouterr()
    assert call(adm, str(tmp_path / "bare.npz"), "plain") == 2
    assert_one_line(capsys.readouterr().err, r"REFERENCE: .*not statistics \(mu_s, sigma_s\)")


def test_published_statistics_are_not_taken_for_another_network(call, tmp_path, capsys):
    statistics = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "only.npz", **statistics)
    images = np.stack([np.array(draw(i)) for i in range(5)])
    np.savez(tmp_path / "both.npz", arr_0=images, **statistics)
    assert call(adm, str(tmp_path / "only.npz"), "plain") == 2
    assert_one_line(
        capsys.readouterr().err,
        "REFERENCE: .*only.npz: statistics of another extractor, inception-2015, "
        "and no images; asked for is efficientnet-lite0",
    )
    assert call(adm, str(tmp_path / "both.npz"), "plain", "--out", str(tmp_path / "a.json")) == 0
    assert load_json(tmp_path / "a.json")["protocol"]["reference"]["statistics"] == "of its pictures"
