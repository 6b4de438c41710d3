from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageCms, PngImagePlugin

from ldm.io.images import (
    fit,
    from_pil,
    grid,
    open_image,
    open_labels,
    open_mask,
    pad,
    psnr,
    read_png,
    save_png,
    side_by_side,
    to_pil,
)


def plain(colour: str, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    image = Image.fromarray(levels.contiguous().numpy())
    assert to_pil(from_pil(image)[None])[0].tobytes() == image.tobytes()


@given(st.floats(-3, 3, width=32))
def test_values_are_rounded_not_cut_off(value):
    (image,) = to_pil(torch.full((1, 3, 1, 1), value))
    exact = (min(max(value, -1), 1) + 1) * 127.5
    assert abs(image.getpixel((0, 0))[0] - exact) <= 0.5 + 1e-4


@pytest.mark.parametrize(
    "images, why",
    [
        (torch.zeros(3, 4, 4), "expected"),
        (torch.zeros(1, 1, 4, 4), "expected"),
        (torch.full((1, 3, 2, 2), math.nan), "NaN"),
    ],
)
def test_what_is_not_an_image_is_refused(images, why):
    with pytest.raises(ValueError, match=why):
        to_pil(images)


def test_psnr_against_the_formula():
    a, b = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4)
    b[0] += 0.2
    b[1, :, :, :2] += 0.2
    expected = torch.tensor([20.0, 20 + 10 * math.log10(2), math.inf], dtype=torch.float64)
    torch.testing.assert_close(psnr(a, b), expected, rtol=1e-6, atol=1e-5)


def test_grid_places_images_row_by_row():
    colours = ["red", "green", "blue", "black", "yellow"]
    sheet = grid([plain(c) for c in colours], columns=2)
    assert sheet.size == (2 + 2 * 10, 2 + 3 * 8)
    centres = [sheet.getpixel((6 + k % 2 * 10, 5 + k // 2 * 8)) for k in range(5)]
    assert centres == [plain(c).getpixel((0, 0)) for c in colours]
    for faulty in (([], 2), ([plain("red")], 2, ["one", "two"])):
        with pytest.raises(ValueError, match="grid"):
            grid(*faulty)


@pytest.mark.parametrize("text", ["x" * 10**6, "a\nb" * 10**5, "\0" * 10**6, "猫" * 10**6], ids=lambda text: text[:2])
def test_a_caption_of_any_length_is_cut_at_once(text):
    """Letter by letter it would take hours."""
    a = [Image.new("RGB", (32, 32))]
    assert grid(a, 1, [text]).size == grid(a, 1, ["x"]).size and side_by_side({"": a}, [text]).size[1] > 32


def test_a_grid_with_captions_has_ink_below_each_image_that_begins_one():
    images = [plain("red")] * 4  # 8 x 6, enlarged 16 times
    sheet = np.asarray(grid(images, 2, ["a heart", "a heart", "a heart", "a tree"]).convert("L"))
    row = (sheet.shape[0] - 2) // 2
    assert sheet.shape[1] == 2 + 2 * 130 and 96 + 12 < row < 96 + 24
    below = [sheet[2 + r * row + 96 : (r + 1) * row, left : left + 128] for r in (0, 1) for left in (2, 132)]
    ink = [(part < 128).any() for part in below]
    assert ink == [True, False, True, True]


def test_comparison_has_a_column_per_method_and_ink_for_its_labels():
    a, b = [plain("red"), plain("blue")], [plain("green"), plain("black")]
    sheet = side_by_side({"plain": a, "accelerated": b}, captions=["a heart", "a very long caption " * 30])
    blank = side_by_side({"": a, " ": b}, captions=["", ""])
    assert sheet.size == blank.size and sheet.tobytes() != blank.tobytes()
    middle = [sheet.getpixel((x, y)) for y in (100, 100 + 144 + 16) for x in (96, 96 + 194)]
    assert middle == [plain(c).getpixel((0, 0)) for c in ("red", "green", "blue", "black")]
    with pytest.raises(ValueError):
        side_by_side({"plain": a, "accelerated": b[:1]})
    with pytest.raises(ValueError, match="caption"):
        side_by_side({"plain": a}, captions=["one"])


def test_spaces_between_words_can_be_seen():
    sheet = side_by_side({"": [plain("white")], " ": [plain("white")]}, ["noto style"])
    inked = [min(column) < 128 for column in np.asarray(sheet.convert("L")).T]
    first, last = inked.index(True), len(inked) - inked[::-1].index(True)
    gaps = "".join("#" if ink else " " for ink in inked[first:last]).split("#")
    assert sorted(map(len, gaps))[-1] >= 4 > 2 >= sorted(map(len, gaps))[-2]  # the space, and between letters


def test_a_long_comparison_is_about_as_wide_as_high_and_shows_every_image():
    colours = [(i, 100, 100) for i in range(10, 210, 10)]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = side_by_side({"plain": images, "accelerated": images}, ["caption"] * len(images))
    assert 0.6 < sheet.width / sheet.height < 1.7
    assert set(colours) <= {colour for _, colour in sheet.getcolors(maxcolors=2**16)}


def test_settings_come_back_from_the_file(tmp_path):
    settings = {"prompt": 'ein rotes Herz ❤, "naïve"\nstyle', "seed": [42, 1], "scale": 7.5, "keys": None}
    save_png(tmp_path / "new" / "a.png", plain("red"), settings, {"seconds": 1.5})
    image, read, run = read_png(tmp_path / "new" / "a.png")
    assert (read, run) == (settings, {"seconds": 1.5, "proof": run["proof"]})
    assert image.tobytes() == plain("red").tobytes()
    text = Image.open(tmp_path / "new" / "a.png").text
    assert "scale: 7.5" in text["parameters"] and json.loads(text["settings"]) == settings
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_other_files_have_no_settings(tmp_path):
    plain("red").save(tmp_path / "foreign.png")
    save_png(tmp_path / "cut.png", plain("red", (64, 64)), {"seed": 1})
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    assert [read_png(tmp_path / f"{n}.png") for n in ("foreign", "cut", "text", "missing")] == [None] * 4


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    save_png(tmp_path / "a.png", plain("red"), {"seed": 1})
    before = (tmp_path / "a.png").read_bytes()
    broken = plain("blue")
    broken.save = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", broken, {"seed": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


# Files from elsewhere


def ramp() -> Image.Image:
    """Grey, 8 wide and 4 high, no two rows or columns alike."""
    return Image.fromarray(np.arange(32, dtype=np.uint8).reshape(4, 8) * 8)


def test_colours_of_lab_are_those_of_srgb(tmp_path):
    colours = np.array([[[200, 30, 30], [40, 160, 60], [20, 60, 200], [128, 128, 128], [255, 255, 255]]], np.uint8)
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    ImageCms.profileToProfile(Image.fromarray(colours), *profiles, outputMode="LAB").save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as file:
        assert file.mode == "LAB"
    shown = np.asarray(open_image(tmp_path / "a.tif")).astype(int)
    assert np.abs(shown - colours).max() <= 3, "8 bits of lightness and colour"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "CMYK"])
def test_an_image_is_the_same_in_every_mode(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(ramp()).astype(np.uint16) * 257)
        assert image.mode == "I;16"
    else:
        image = (
            ramp().convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
            if mode == "P"
            else ramp().convert("RGB").convert(mode)
            if mode == "CMYK"
            else ramp().convert(mode)
        )
    image.save(tmp_path / "a", format="TIFF" if mode == "CMYK" else "PNG")
    opened = open_image(tmp_path / "a")
    assert opened.mode == "RGB" and opened.tobytes() == ramp().convert("RGB").tobytes()


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    Image.fromarray(np.array([[0, 128, 129, 300, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 0, 1, 1, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    shown = ramp()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = shown.transpose(undo[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    opened = open_image(tmp_path / "a.png")
    assert opened.size == (8, 4) and opened.tobytes() == shown.convert("RGB").tobytes()
    levels = np.asarray(shown)
    assert open_labels(tmp_path / "a.png").tolist() == levels.tolist()
    assert open_mask(tmp_path / "a.png")[0].tolist() == (levels >= 128).tolist()


def test_what_is_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 51))
    image.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]


def test_masks_are_ones_and_zeros(tmp_path):
    Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8)).save(tmp_path / "a.png")
    mask = open_mask(tmp_path / "a.png")
    assert mask.shape == (1, 1, 4) and mask.flatten().tolist() == [0, 0, 1, 1]


def test_a_mask_must_not_be_transparent(tmp_path):
    opaque = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    opaque.save(tmp_path / "a.png")
    assert open_mask(tmp_path / "a.png").flatten().tolist() == [1, 1]
    opaque.putpixel((1, 0), (255, 255, 255, 254))
    opaque.save(tmp_path / "a.png")
    palette = Image.new("P", (2, 1))
    palette.save(tmp_path / "p.png", transparency=0)
    for name in ("a.png", "p.png"):
        with pytest.raises(ValueError, match=f"{name}: a mask with transparent parts; expected white where to paint"):
            open_mask(tmp_path / name)


def test_labels_are_levels_or_palette_indices(tmp_path):
    labels = np.array([[0, 3], [181, 7]], dtype=np.uint8)
    palette = Image.fromarray(labels).convert("L")
    palette.save(tmp_path / "grey.png")
    coloured = Image.fromarray(labels)
    coloured.putpalette([k % 256 for k in range(768)])
    coloured.save(tmp_path / "palette.png")
    Image.fromarray(labels.astype(np.uint16) + 300).save(tmp_path / "deep.png")
    assert coloured.mode == "P"
    assert open_labels(tmp_path / "grey.png").tolist() == labels.tolist()
    assert open_labels(tmp_path / "palette.png").tolist() == labels.tolist()
    assert open_labels(tmp_path / "deep.png").tolist() == (labels.astype(int) + 300).tolist()
    plain("red").save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match="mode RGB; expected one number per pixel"):
        open_labels(tmp_path / "colour.png")


def test_fitting_covers_without_distortion_and_keeps_what_fits():
    disc = Image.new("RGB", (40, 20), "white")
    disc.paste("black", (14, 4, 26, 16))  # a square in the middle stays one
    small = np.asarray(fit(disc, 10, 10).convert("L")) < 128
    assert small.sum(0).max() == small.sum(1).max() == 6
    assert fit(disc, 20, 40).tobytes() == disc.tobytes()


def test_padding_repeats_the_edges():
    image = torch.arange(6.0).view(1, 2, 3)
    padded = pad(image, 4, 4)
    assert padded[0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5], [3, 4, 5, 5]]
    assert torch.equal(pad(image, 2, 3), image)


# Hostile and unusual files

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
showpage
%%EOF
"""


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    """PostScript under an image's name: Pillow would hand it to GhostScript."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "face.png").write_bytes(EPS)
    for read in (open_image, open_mask, open_labels):
        with pytest.raises(ValueError, match="face.png: not an image that can be read; expected PNG"):
            read(tmp_path / "face.png")
    assert read_png(tmp_path / "face.png") is None
    assert not (tmp_path / "started").exists()
    with pytest.raises((OSError, subprocess.CalledProcessError)), Image.open(tmp_path / "face.png") as image:
        image.load()
    assert (tmp_path / "started").exists()  # as it would have been


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (10_000, 8_000)])
def test_size_bombs_are_refused_before_they_are_decoded(tmp_path, width, height, recwarn):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match="bomb.png: an image of more than 67108864 pixels"):
        open_image(tmp_path / "bomb.png")
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_images_are_said_to_be_damaged(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole", format=kind)
    whole = (tmp_path / "whole").read_bytes()
    open_image(tmp_path / "whole")
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cut: (a damaged image|not an image)") as error:
        open_image(tmp_path / "cut")
    assert "\n" not in str(error.value)


def test_special_files_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(OSError, match="fifo.png: a FIFO"):
        open_image(tmp_path / "fifo.png")
    assert read_png(tmp_path / "fifo.png") is None


@pytest.mark.parametrize("kind", ["settings", "run"])
def test_settings_that_are_nested_too_deep_are_none(tmp_path, kind):
    text = PngImagePlugin.PngInfo()
    for name in ("settings", "run"):
        text.add_itxt(name, "[" * 100_000 + "]" * 100_000 if name == kind else "{}", zip=True)
    plain("red").save(tmp_path / "deep.png", pnginfo=text)
    assert read_png(tmp_path / "deep.png") is None


@pytest.mark.parametrize(
    "levels, why",
    [
        (np.zeros((4, 4), np.uint8), "brightest level is 0"),
        (np.eye(4, dtype=np.uint8), "brightest level is 1 of"),
        (np.eye(4, dtype=np.uint16) * 255, "in more than 8 bits, which is black"),
        (np.full((4, 4, 3), (200, 0, 0), np.uint8), "brightest level is 60 of 255; expected white"),
    ],
)
def test_masks_that_paint_nothing_are_refused(tmp_path, levels, why):
    Image.fromarray(levels).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=f"mask.png: .*{why}"):
        open_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_images_that_would_be_black_are_refused(tmp_path, dtype):
    Image.fromarray(np.arange(256, dtype=dtype).reshape(16, 16)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif: levels 0..255 in more than 8 bits, which is black"):
        open_image(tmp_path / "deep.tif")
