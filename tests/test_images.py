from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.images import from_pil, grid, psnr, read_png, save_png, side_by_side, to_pil


def plain(colour: str, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    picture = Image.fromarray(levels.contiguous().numpy())
    assert to_pil(from_pil(picture)[None])[0].tobytes() == picture.tobytes()


@given(st.floats(-3, 3, width=32))
def test_values_are_rounded_not_cut_off(value):
    (picture,) = to_pil(torch.full((1, 3, 1, 1), value))
    exact = (min(max(value, -1), 1) + 1) * 127.5
    assert abs(picture.getpixel((0, 0))[0] - exact) <= 0.5 + 1e-4


@pytest.mark.parametrize("images, why", [
    (torch.zeros(3, 4, 4), "expected"), (torch.zeros(1, 1, 4, 4), "expected"),
    (torch.full((1, 3, 2, 2), math.nan), "NaN")])
def test_what_is_not_a_picture_is_refused(images, why):
    with pytest.raises(ValueError, match=why):
        to_pil(images)


def test_psnr_against_the_formula():
    a, b = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4)
    b[0] += 0.2
    b[1, :, :, :2] += 0.2
    expected = torch.tensor([20.0, 20 + 10 * math.log10(2), math.inf], dtype=torch.float64)
    torch.testing.assert_close(psnr(a, b), expected, rtol=1e-6, atol=1e-5)


def test_grid_places_pictures_row_by_row():
    colours = ["red", "green", "blue", "black", "yellow"]
    sheet = grid([plain(c) for c in colours], columns=2)
    assert sheet.size == (2 + 2 * 10, 2 + 3 * 8)
    centres = [sheet.getpixel((6 + k % 2 * 10, 5 + k // 2 * 8)) for k in range(5)]
    assert centres == [plain(c).getpixel((0, 0)) for c in colours]
    with pytest.raises(ValueError, match="grid"):
        grid([], 2)


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


def test_a_long_comparison_is_about_as_wide_as_high_and_shows_every_picture():
    colours = [(i, 100, 100) for i in range(10, 210, 10)]
    pictures = [Image.new("RGB", (64, 64), colour) for colour in colours]
    sheet = side_by_side({"plain": pictures, "accelerated": pictures}, ["caption"] * len(pictures))
    assert 0.6 < sheet.width / sheet.height < 1.7
    assert set(colours) <= {colour for _, colour in sheet.getcolors(maxcolors=2**16)}


def test_settings_come_back_from_the_file(tmp_path):
    settings = {"prompt": "ein rotes Herz ❤, \"naïve\"\nstyle", "seed": [42, 1], "scale": 7.5, "keys": None}
    save_png(tmp_path / "new" / "a.png", plain("red"), settings, {"seconds": 1.5})
    image, read, run = read_png(tmp_path / "new" / "a.png")
    assert (read, run) == (settings, {"seconds": 1.5})
    assert image.tobytes() == plain("red").tobytes()
    text = Image.open(tmp_path / "new" / "a.png").text
    assert "scale: 7.5" in text["parameters"] and json.loads(text["settings"]) == settings
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_other_files_have_no_settings(tmp_path):
    plain("red").save(tmp_path / "foreign.png")
    save_png(tmp_path / "cut.png", plain("red", (64, 64)), {"seed": 1})
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    assert [read_png(tmp_path / f"{n}.png") for n in ("foreign", "cut", "text", "missing")] == [None] * 4


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    save_png(tmp_path / "a.png", plain("red"), {"seed": 1})
    before = (tmp_path / "a.png").read_bytes()
    broken = plain("blue")
    broken.save = lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", broken, {"seed": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before
