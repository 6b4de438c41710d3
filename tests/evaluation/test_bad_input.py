"""What the measures' commands say of input that can't be used."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from evaluation import adm, clip_score, fid, paired
from evaluation.runs.images import ImageFolder, image_warnings
from tests.helpers.measures import N, assert_one_line, draw, fid_of, load_json


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
    for key in ("images", "pictures"):  # as cards of older runs say
        (tmp_path / "run.json").write_text(json.dumps({"plan": "off", key: N + 1}))
        images = ImageFolder(tmp_path / "samples")
        (warning,) = image_warnings(images)
        assert f"{N} images of a run of {N + 1}" in warning


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
        ("cut.npy", r"truncated, or a wrong header: uint8 \(4, 8, 8, 3\) are 768 bytes, and there are 668$"),
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
