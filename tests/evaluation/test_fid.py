"""evaluation/fid.py, end to end with EfficientNet-lite0 on drawn images."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from evaluation import fid
from evaluation.metrics import frechet
from evaluation.metrics.extractors import network_fields
from evaluation.metrics.frechet import Gaussian, extract, save_statistics
from evaluation.metrics.result import ResultError, comparable, read_result
from tests.helpers.measures import N, assert_one_line, draw, fid_of, load_json


def test_fid_says_what_it_is_of(call, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert call(fid, "real", "plain", "--kid", "--infinity", "--bootstrap", "3", "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "fid_real" in captured.out and "warning: samples: 22 images for 1280 features" in captured.err
    found = load_json(out)
    low, high = found["values"]["fid_real_interval"]
    order = ["fid_real", "fid_real_interval", "fid_infinity_real", "kid_real", "kid_real_std"]
    assert [line.split()[0] for line in captured.out.splitlines()] == order == [*found["values"]]
    assert 0 < low < found["values"]["fid_real"] < high and found["values"]["kid_real"] > 0
    protocol = found["protocol"]
    assert (protocol["n"], protocol["resize"], protocol["extractor"]) == (N, "torch-antialias", "efficientnet-lite0")
    assert protocol["reference"]["n"] == N and protocol["kid"]["size"] == N
    assert found["settings"] == {"bootstrap": {"resamples": 3, "seed": 0}}
    assert found["samples"]["seeds"] == [7] and len(found["warnings"]) == 3
    assert found["warnings"][2].startswith("fid_infinity_real: 22 images for 1280 features are too few")
    assert read_result(out).protocol_sha256 == found["protocol_sha256"]


def test_reference_statistics_are_kept_and_only_used_for_their_own(call, sets, tmp_path, monkeypatch):
    cache = ("--cache", str(tmp_path / "cache"))
    first = fid_of(call, tmp_path / "a.json", "real", "plain", *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    extracted = []
    monkeypatch.setattr(
        frechet, "extract", lambda images, *a, **more: extracted.append(images.path) or extract(images, *a, **more)
    )
    assert fid_of(call, tmp_path / "b.json", "real", "plain", *cache) == first and sets / "real" not in extracted
    other = fid_of(call, tmp_path / "c.json", "real", "plain", "--resize", "clean", *cache)
    assert extracted.count(sets / "real") == 1 and len(list((tmp_path / "cache").iterdir())) == 2
    assert other["values"]["fid_real"] != first["values"]["fid_real"]
    with pytest.raises(ResultError, match=r"differ in resize \(a: torch-antialias, b: clean\)"):
        comparable({"a": read_result(tmp_path / "a.json"), "b": read_result(tmp_path / "c.json")})


def test_a_cache_that_can_not_be_written_loses_nothing(call, sets, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "fid_real" in fid_of(call, tmp_path / "a.json", "real", "plain", "--cache", str(tmp_path / "file"))["values"]
    assert "warning: cache: the reference's statistics are not kept: " in capsys.readouterr().err


def test_the_reference_images_of_a_protocol(call, tmp_path, capsys):
    """The images of an array whose captions have the fields that it asks for, in the order of their ids."""
    levels = np.stack([np.array(draw(i)) for i in range(6)])
    np.save(tmp_path / "pictures.npy", levels)
    np.save(tmp_path / "some.npy", levels[[0, 3, 5]])
    images = [{"id": 50 - k, "file_name": f"{k}", "split": "train" if k in (0, 2, 5) else "rest"} for k in range(6)]
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"images": images, "annotations": []}))
    asks = {
        "data": {"kind": "captions", "file": "captions.json", "pictures": "pictures.npy", "where": {"split": "train"}},
        "size": 32,
        "guidance": 1.0,
    }
    (tmp_path / "p.yaml").write_text(json.dumps(asks))
    reference = f"protocol:{tmp_path / 'p.yaml'}"
    found = fid_of(call, tmp_path / "a.json", reference, "plain", "--data", str(tmp_path))
    assert found["protocol"]["reference"]["n"] == 3
    assert found["values"] == fid_of(call, tmp_path / "b.json", str(tmp_path / "some.npy"), "plain")["values"]
    assert found["protocol"]["reference"]["sha256"] == hashlib.sha256(levels[[0, 3, 5]]).hexdigest()

    for why, (other, more) in {
        "REFERENCE: unknown protocol 'coco'; accepted: ": ("protocol:coco", ()),
        "--data: goes with REFERENCE protocol:NAME; got ": ("real", ("--data", "x")),
        "REFERENCE: protocol emoji64-prompts names no real images": ("protocol:emoji64-prompts", ()),
        "REFERENCE: .*x.pictures.npy: can't be read: .*No such file": (reference, ("--data", "x")),
    }.items():
        capsys.readouterr()
        assert call(fid, other, "plain", *more) == 2
        assert_one_line(capsys.readouterr().err, why)
    captions.write_text(json.dumps({"images": images[1:], "annotations": []}))
    capsys.readouterr()
    assert call(fid, reference, "plain", "--data", str(tmp_path)) == 2
    assert_one_line(capsys.readouterr().err, "REFERENCE: .*pictures.npy: has 6 images, captions.json has 5")


def test_batch_size_does_not_change_a_distance(call, tmp_path):
    one = fid_of(call, tmp_path / "a.json", "real", "plain", "--cache", "none")
    other = fid_of(call, tmp_path / "b.json", "real", "plain", "--cache", "none", "--batch-size", "3")
    assert one["values"]["fid_real"] == pytest.approx(other["values"]["fid_real"], rel=1e-4)
    assert one["protocol_sha256"] == other["protocol_sha256"]


def test_a_set_is_at_no_distance_from_itself_and_others_are(call, tmp_path):
    same = fid_of(call, tmp_path / "a.json", "plain", "plain")["values"]["fid_real"]
    near = fid_of(call, tmp_path / "b.json", "plain", "fast")["values"]["fid_real"]
    far = fid_of(call, tmp_path / "c.json", "real", "plain")["values"]["fid_real"]
    assert same < 1e-3 < near < far


def test_statistics_of_another_width_are_found_before_the_work(call, lite0, tmp_path, capsys):
    save_statistics(tmp_path / "s.npz", Gaussian(np.zeros(3), np.eye(3), 9), network_fields(lite0))
    assert call(fid, str(tmp_path / "s.npz"), "plain") == 2
    assert_one_line(capsys.readouterr().err, "REFERENCE: statistics of 3 features; efficientnet-lite0 has 1280")


def test_cmmd_is_of_one_published_model(call, sets, clip_folder, tmp_path):
    out = tmp_path / "a.json"
    assert (
        call(fid, "real", "plain", "--cmmd", "--extractor", "clip", "--weights", str(clip_folder), "--out", str(out))
        == 0
    )
    assert load_json(out)["values"]["cmmd_real"] > 0
    assert load_json(out)["warnings"][-1].startswith("cmmd_real: published values are of another CLIP model")


def test_statistics_can_not_give_a_kernel_distance(call, lite0, tmp_path, capsys):
    reference = tmp_path / "s.npz"
    save_statistics(reference, Gaussian(np.zeros(1280), np.eye(1280), 9), network_fields(lite0) | {"sha256": "x"})
    assert call(fid, str(reference), "plain", "--kid") == 2
    assert_one_line(capsys.readouterr().err, "REFERENCE: .*mean and covariance only; KID and CMMD need its images")
    assert fid_of(call, tmp_path / "a.json", str(reference), "plain")["protocol"]["reference"] == {
        "sha256": "x",
        "n": 9,
        "statistics": "of its pictures",
    }
    capsys.readouterr()
    save_statistics(reference, Gaussian(np.zeros(1280), np.eye(1280), 9), {"resize": "clean"})
    assert call(fid, str(reference), "plain") == 2
    assert_one_line(capsys.readouterr().err, "statistics of another resize, clean, and no images; asked for is torch")


def test_help_states_each_default_that_there_is_once():
    printed = " ".join(fid.parser().format_help().split())
    assert "resampling (default: 0)" in printed and "per batch; changes speed and memory only (default: 50)" in printed
    assert "default: None" not in printed and "default: False" not in printed
    assert "(default: its own)" in printed and printed.count("(default: the one that the protocol names)") == 1
