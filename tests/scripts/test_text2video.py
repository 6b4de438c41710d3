"""scripts/text2video.py on a tiny model with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ldm.checkpoint import save_weights
from ldm.io import video
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.goldens import recipe_weights
from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

VIDEO = ("--frames=3", "--motion=128,64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 16 x 16 images, a control network, and two pictures to follow."""
    folder = tmp_path_factory.mktemp("video")
    write_model(folder)
    encoder = {key: value for key, value in TEXT_UNET.items() if key != "out_channels"} | {"legacy": False}
    network = ControlNet(**encoder, hint_channels=3, hint_widths=(8, 16))
    save_weights(folder / "control.safetensors", recipe_weights(network, seed=2, gain=1.0).state_dict())
    Image.new("L", (16, 16), 255).save(folder / "white.png")
    Image.new("L", (16, 16), 0).save(folder / "black.png")
    return folder


@pytest.fixture
def script(folder, tmp_path):
    files = [f"--config={folder}/config.yaml", f"--ckpt={folder}/model.safetensors"]
    made = Script("text2video", folder, *files, "--prompt=an owl", "--steps=5", "--parallel=1", *VIDEO)
    made.out = tmp_path / "out"
    made.common[-1] = str(made.out)
    return made


def test_chunks_change_nothing_and_frames_are_found_again(script, capsys):
    frames = [script.pixels(entry) for entry in script("--plan=0,2")]
    assert len(frames) == 3 and np.abs(frames[1] - frames[0]).max() > 1
    (path,) = script.out.glob("video-*.gif")
    gif = Image.open(path)
    assert gif.n_frames == 3 and gif.info["duration"] == 250
    settings = json.loads(gif.info["comment"])
    assert settings["motion"] == [128.0, 64.0] and [item["frame"] for item in settings["items"]] == [0, 1, 2]
    before = path.read_bytes()
    assert script("--plan=0,2", "--chunk=2") == [] and "(0 made, 3 found)" in capsys.readouterr().out
    for sample in (script.out / "samples").iterdir():
        sample.unlink()
    script("--plan=0,2", "--chunk=1", "--format=frames")
    for entry, frame in zip(script.entries(), frames, strict=True):
        assert np.abs(script.pixels(entry) - frame).max() <= 1
    assert path.read_bytes() == before


def test_frames_follow_a_picture_each_and_make_an_mp4(script, folder):
    pictures = [f"{folder}/{name}.png" for name in ("white", "black", "white")]
    control = ["--control", *pictures, f"--control-model={folder}/control.safetensors", "--plan=off", "--format=mp4"]
    entries = script(*control)
    assert [one["picture"] for one in entries[0]["control"][0]["control"]] == ["white.png", "black.png", "white.png"]
    (path,) = script.out.glob("video-*.mp4")
    reader = video.imageio_ffmpeg.read_frames(str(path))
    facts, frames = next(reader), sum(1 for _ in reader)
    assert facts["size"] == (16, 16) and facts["fps"] == 4 and frames == 3


def test_bad_input_is_refused_in_one_line(script, folder, capsys, monkeypatch):
    white, control = f"{folder}/white.png", f"--control-model={folder}/control.safetensors"
    for given, message in (
        (["--frames=0"], "--frames: expected a whole number in 1..1000000; got '0'"),
        (["--motion=3"], "--motion: must be X,Y, two numbers such as 12,12; got '3'"),
        (["--t0=3", "--t1=3"], "--t0: expected 0 <= t0 < t1 < 5, the steps; got t0 3, t1 3"),
        (["--t1=5"], "--t1: expected 0 <= t0 < t1 < 5, the steps; got t0 3, t1 5"),
        (["--plms"], "--sampler: plms predicts more than once a step; expected one such as ddim"),
        (["--sampler=heun"], "--sampler: heun predicts more than once a step; expected one such as ddim"),
        (["--plan=online:0.1"], "--plan: online:0.1 decides for each image; expected online:time:X or another plan"),
        (["--error-budget=0.1"], "--error-budget: decides for each image; the frames of a video are sampled together"),
        (["--control", white, control], "--control: expected 3 pictures, one for each frame; got 1"),
        (["--control", *[white] * 3], "--control-model: goes together with --control, the pictures that it reads"),
        (["--fps=0"], "--fps: expected a number in 0.1..100; got '0'"),
    ):
        assert script.refusal(capsys, *given).startswith(message)
    monkeypatch.setattr(video, "imageio_ffmpeg", None)  # as where it is not installed
    assert script.refusal(capsys, "--format=mp4").startswith("--format: mp4 needs imageio-ffmpeg: pip install")
