"""scripts/text2video.py on tiny models with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import CheckpointError, load_config, load_model, read_checkpoint, save_weights
from ldm.checkpoint.file import check_weights
from ldm.io import video
from ldm.models.diffusion.propagation.load import load_plan
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.profiling.timing import peak_memory
from ldm.sampling.engine import Engine, Recipe, Sizes, Task
from ldm.sampling.task import Text
from ldm.sampling.video import OneVideo
from tests.helpers.goldens import recipe_weights
from tests.helpers.scripts import Script, check_laws, load_script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

VIDEO = ("--frames=3", "--motion=128,64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 16 x 16 images, a control network, and two images to follow."""
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


def test_frames_follow_a_image_each_and_make_an_mp4(script, folder):
    images = [f"{folder}/{name}.png" for name in ("white", "black", "white")]
    control = ["--control", *images, f"--control-model={folder}/control.safetensors", "--plan=off", "--format=mp4"]
    entries = script(*control)
    assert [one["picture"] for one in entries[0]["control"][0]["control"]] == ["white.png", "black.png", "white.png"]
    (path,) = script.out.glob("video-*.mp4")
    reader = video.imageio_ffmpeg.read_frames(str(path))
    facts, frames = next(reader), sum(1 for _ in reader)
    assert facts["size"] == (16, 16) and facts["fps"] == 4 and frames == 3


def test_the_laws(script, folder):
    """For frames, and for frames that follow a control image each."""
    images = [f"{folder}/{name}.png" for name in ("white", "black", "white")]
    for follow in ([], ["--control", *images, f"--control-model={folder}/control.safetensors"]):
        check_laws(script, *follow, "--format=frames")


def test_numbers_below_zero_need_no_equals_sign():
    args = load_script("text2video").parser().parse_args(["--prompt", "-", "--motion", "-12,-.5", "--scale", "-1e1"])
    assert (args.motion, args.scale) == ((-12, -0.5), -10)


def test_bad_input_is_refused_in_one_line(script, folder, capsys, monkeypatch):
    white, control = f"{folder}/white.png", f"--control-model={folder}/control.safetensors"
    for given, message in (
        (["--frames=0"], "--frames: expected a whole number in 1..1000000; got '0'"),
        (["--motion=3"], "--motion: must be X,Y, two numbers such as 12,12; got '3'"),
        (["--t0=3", "--t1=3"], "--t0: expected 0 <= t0 < t1 < 5, the steps; got t0 3, t1 3"),
        (["--t1=5"], "--t1: expected 0 <= t0 < t1 < 5, the steps; got t0 3, t1 5"),
        (["--steps=1"], "--steps: expected at least 2, of which the first frame makes one alone; got 1"),
        (["--plms"], "--sampler: plms predicts more than once a step; expected one such as ddim"),
        (["--sampler=heun"], "--sampler: heun predicts more than once a step; expected one such as ddim"),
        (["--plan=online:0.1"], "--plan: online:0.1 decides for each image; expected online:time:X or another plan"),
        (["--error-budget=0.1"], "--error-budget: decides for each image; the frames of a video are sampled together"),
        (["--control", white, control], "--control: expected 3 images, one for each frame; got 1"),
        (["--control", *[white] * 3], "--control-model: goes together with --control, the images that it reads"),
        (["--frames=-1"], "--frames: expected a whole number in 1..1000000; got '-1'"),
        (["--frames=300000"], "--chunk: 300000 images of 16 x 16 pixels at a time are more than"),
        (["--fps=0"], "--fps: expected a number in 0.1..100; got '0'"),
    ):
        assert script.refusal(capsys, *given).startswith(message)
    monkeypatch.setattr(video, "imageio_ffmpeg", None)  # as where it is not installed
    assert script.refusal(capsys, "--format=mp4").startswith("--format: mp4 needs imageio-ffmpeg: pip install")


# A model of videos


@pytest.fixture(scope="module")
def videofusion(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videofusion")
    unet = {
        "target": "ldm.modules.diffusionmodules.unet3d.VideoUNet",
        "params": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": [1, 2],
            "context_dim": 16,
            "num_head_channels": 16,
        },
    }
    write_model(folder, unet_config=unet)
    return [f"--config={folder}/config.yaml", f"--ckpt={folder}/model.safetensors", "--model=videofusion"]


@pytest.fixture
def fusion(videofusion, tmp_path):
    return Script("text2video", tmp_path, *videofusion, "--prompt=an owl", "--steps=4", "--frames=3")


def test_frames_of_a_model_of_videos(fusion, capsys):
    made = fusion("--plan", "0,2")
    assert [entry["frame"] for entry in made] == [0, 1, 2] and made[0]["keys"] == [0, 2]
    shown = [fusion.pixels(entry) for entry in made]
    assert all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])
    with Image.open(next(fusion.out.glob("video-*.gif"))) as clip:
        assert clip.n_frames == 3
    more = fusion("--plan", "0,2", "--frames", "2")
    assert len(more) == 2 and (fusion.pixels(more[0]) != shown[0]).any(), "the frames see one another"
    (fusion.out / made[1]["file"]).unlink()
    capsys.readouterr()
    fusion("--plan", "0,2")
    assert "(1 made, 2 found)" in capsys.readouterr().out
    assert np.abs(fusion.pixels(made[1]) - shown[1]).max() <= 1


def test_plans_are_listed_with_what_they_cost_a_frame(fusion, capsys):
    assert fusion.main([*fusion.common, "--steps=20", "--list-plans"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"off", "faster-diffusion", "deepcache:3"} <= {*listed} and not fusion.out.exists()
    assert "tgate:10" not in listed


def test_the_laws_of_a_model_of_videos(fusion):
    check_laws(fusion, "--format=frames")


def test_frames_are_decoded_a_few_at_a_time(videofusion, monkeypatch):
    config, ckpt = (argument.partition("=")[2] for argument in videofusion[:2])
    how = Recipe(64, 64, scale=2.0), load_plan("off", 50), Task(Text(), network=OneVideo(6))
    engine = Engine(load_model(config, ckpt), Sizes.of(load_config(config).model), *how)
    latents = torch.randn(6, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, most = engine.decode(latents), peak_memory(lambda: engine.decode(latents))
    monkeypatch.setattr("ldm.sampling.engine.FRAME_PIXELS", 2 * 64 * 64)
    torch.testing.assert_close(engine.decode(latents), whole, rtol=0, atol=1e-4)
    assert peak_memory(lambda: engine.decode(latents)) < 0.5 * most


def test_the_files_of_modelscope_are_one_checkpoint(videofusion, tmp_path):
    """Three files, the first stage under the names of the model that it was taken from, OpenCLIP with its images."""
    state = read_checkpoint(videofusion[1].removeprefix("--ckpt="))
    network, first_stage = "model.diffusion_model.", "first_stage_model."
    text = {f"cond_stage_model.model.{name}": torch.ones(2) for name in ("token_embedding.weight", "ln_final.bias")}
    files = {
        "text2video_pytorch_model.pth": {k.removeprefix(network): v for k, v in state.items() if k.startswith(network)},
        "VQGAN_autoencoder.pth": {"state_dict": {k: v for k, v in state.items() if k.startswith(first_stage)}},
        "open_clip_pytorch_model.bin": {k.removeprefix("cond_stage_model.model."): v for k, v in text.items()}
        | {"visual.conv1.weight": torch.ones(2)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    joined = read_checkpoint(tmp_path)
    expected = {key: value for key, value in state.items() if key.startswith((network, first_stage))} | text
    assert joined.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in joined.items())
    held = sum(value.nbytes for value in expected.values())
    assert peak_memory(lambda: read_checkpoint(tmp_path)) < 1.1 * held, "the files are mapped, which counts, not copied"
    (tmp_path / "VQGAN_autoencoder.pth").unlink()
    with pytest.raises(CheckpointError, match="text to video, but not VQGAN_autoencoder.pth"):
        check_weights(tmp_path)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--motion", "3,4"], "--motion: not with a model of videos, which makes all frames together"),
        (["--chunk", "2"], "--chunk: not with a model of videos"),
        (["--frames", "300000"], "--frames: 300000 images of 16 x 16 pixels at a time are more than"),
        (["--H", "18"], "--H: must be a multiple of 4 for this model; got 18"),
        (
            ["--plan", "tgate:2"],
            "--plan: tgate needs cross-attention as in Stable Diffusion, which this model's network lacks",
        ),
    ],
)
def test_what_a_model_of_videos_refuses(fusion, capsys, arguments, why):
    assert fusion.refusal(capsys, *arguments).startswith(why)


@pytest.mark.parametrize("name", ["txt2img", "text2video"])
def test_a_model_of_videos_is_no_model_of_images(name, videofusion, tmp_path, capsys):
    line = Script(name, tmp_path, *videofusion[:2], "--prompt=an owl", "--steps=5").refusal(capsys)
    assert line == "--config: a model of videos; expected one of images, or text2video.py --model videofusion"


def test_a_model_of_images_is_no_model_of_videos(folder, tmp_path, capsys):
    files = [f"--config={folder}/config.yaml", f"--ckpt={folder}/model.safetensors", "--model=videofusion"]
    line = Script("text2video", tmp_path, *files, "--prompt=an owl").refusal(capsys)
    assert line == "--config: not a model of videos; expected one such as configs/video/videofusion.yaml"
