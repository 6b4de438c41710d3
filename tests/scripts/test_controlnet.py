"""scripts/controlnet.py on a tiny model with random weights and a control network of its own."""

from __future__ import annotations

import gc
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
import ldm.cli.control as cli_control
from ldm.checkpoint import save_weights
from ldm.cli.control import LATELY, ControlSettings, controlled, made_of, read_source
from ldm.cli.settings import ModelSettings
from ldm.cli.setup import make_setup
from ldm.data.conditions import as_hint, edges
from ldm.io.errors import SettingError
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.sampling import engine
from ldm.sampling.control import ControlInput
from tests.helpers.goldens import recipe_weights
from tests.helpers.scripts import Script, check_laws
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET

ENCODER = {key: value for key, value in TEXT_UNET.items() if key != "out_channels"} | {"legacy": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 16 x 16 images, control networks, an image of two sizes, and control images."""
    folder = tmp_path_factory.mktemp("control")
    write_model(folder)
    for name, changes in (("control", {}), ("other", {"context_dim": 24}), ("coarse", {"hint_widths": (8, 8, 8)})):
        network = ControlNet(**ENCODER | {"hint_channels": 3, "hint_widths": (8, 16)} | changes)
        save_weights(folder / f"{name}.safetensors", recipe_weights(network, seed=2, gain=1.0).state_dict())
    save_weights(folder / "no_network.safetensors", {"x.weight": torch.ones(1)})
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 5:11] = (255, 40, 0)
    image = Image.fromarray(pixels)
    image.save(folder / "image.png")
    edges(image).save(folder / "edges.png")
    edges(image).resize((32, 16)).save(folder / "wide.png")
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(folder / "clear.png")
    for name, drawn, caption in (("a", image, "an owl"), ("b", image.transpose(Image.Transpose.ROTATE_90), "a fox")):
        (folder / "several").mkdir(exist_ok=True)
        drawn.save(folder / f"several/{name}.png")
        (folder / f"several/{name}.txt").write_text(caption)
    (folder / "untold").mkdir()
    image.save(folder / "untold/a.png")
    return folder


@pytest.fixture
def script(folder, tmp_path):
    common = [
        f"--config={folder}/config.yaml",
        f"--ckpt={folder}/model.safetensors",
        "--prompt=an owl",
        "--steps=4",
        "--parallel=1",
    ]
    made = Script("controlnet", folder, *common, "--n_samples=1", "--skip_grid")
    made.out = tmp_path / "out"
    made.common[-1] = str(made.out)
    return made


def control(folder, kind="edges", name="control"):
    image = [f"--image={folder}/image.png"] if kind == "edges" else []
    return ["--control", kind, "--control-model", f"{folder}/{name}.safetensors", *image]


def test_control_images_are_followed_plain_and_with_plans(script, folder, capsys):
    edge = control(folder)
    (plain,) = script(*edge, "--plan=off")
    assert re.search(r"images: edges followed, within a pixel: F-score 0\.\d{3}, precision", capsys.readouterr().out)
    assert plain["control"][0].items() >= {"weight": 1.0}.items()
    assert plain["control"][0]["control"].items() >= {"kind": "edges", "image": "image.png"}.items()
    (same,) = script(*control(folder, f"{folder}/edges.png"), "--plan=off")
    assert np.array_equal(script.pixels(same), script.pixels(plain))  # the file is what is made of the image
    (held,) = script(*edge, "--plan=0,2")
    (every,) = script(*edge, "--plan=0,2", "--control-at=every")
    assert np.abs(script.pixels(every) - script.pixels(held)).max() > 1
    # The same decoders, and the control network at four steps in the place of two.
    assert plain["unet_macs"] > every["unet_macs"] > held["unet_macs"]
    # Two controls of half the weight are one; guess mode leaves it out of the unconditional prediction.
    halves = [*edge, *control(folder, f"{folder}/edges.png"), "--control-weight=0.5", "--control-weight=0.5"]
    (two,) = script(*halves, "--plan=off")
    assert np.abs(script.pixels(plain) - script.pixels(two)).max() <= 1 and two["unet_macs"] > plain["unet_macs"]
    (guess,) = script(*edge, "--plan=off", "--guess")
    assert guess["guess"] is True and guess["unet_macs"] < plain["unet_macs"]
    settings = json.loads(Image.open(script.out / guess["file"]).text["settings"])
    assert settings["guess"] is True and len(settings["control"]) == 1
    capsys.readouterr()
    assert script(*edge, "--plan=off", "--guess") == [] and "(0 made, 1 found)" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--guess"], ["--control-at=every"]], ids=str)
def test_the_laws(script, folder, more):
    check_laws(script, *control(folder), *more, "--noise-weight=0", "--scale=8")


def test_from_python(script, folder):
    """The same image as the script's; also of an image in memory, and after one without control."""
    (entry,) = script(*control(folder), *control(folder, f"{folder}/edges.png"), "--plan=0,2", "--guess")
    model = ldm.load(config=folder / "config.yaml", ckpt=folder / "model.safetensors")
    network = f"{folder}/control.safetensors"
    follow = {
        "control": ["edges", Image.open(folder / "edges.png")],
        "control_model": [network, network],
        "guess": True,
    }
    options = {"steps": 4, "plan": "0,2", "parallel": 1}
    plain, image = (
        np.asarray(model.images("an owl", **options, **more)[0])
        for more in ({}, follow | {"image": Image.open(folder / "image.png")})
    )
    assert np.array_equal(image, script.pixels(entry)) and (plain != image).any()
    for given, why in (
        ({"guess": True}, "^control: needed"),
        ({"control": "edges", "control_model": network}, "^image: needed for control edges"),
        (
            {"control": "edges", "control_model": network, "mask": folder / "image.png"},
            "^mask does not go with control",
        ),
        ({"control": "edges", "control_model": network, "strength": 0.5}, "^strength needs an image to begin with"),
        ({"control": "edges", "control_model": network, "image": folder / "several"}, "one image here; got the folder"),
    ):
        with pytest.raises(ValueError, match=why):
            model.images("an owl", **given)


def test_each_image_of_a_folder_is_followed_by_the_image_of_its_caption(script, folder, capsys):
    edge = [*control(folder)[:-1], f"--image={folder}/several"]
    (alone,) = script(*control(folder), "--plan=off")
    script.common.remove("--prompt=an owl")
    script.common[script.common.index("--n_samples=1")] = "--n_samples=2"
    owl, fox = script(*edge, "--plan=off")
    assert [one["prompt"] for one in (owl, fox)] == ["an owl", "a fox"] and owl["image"] == "a.png"
    assert np.abs(script.pixels(owl) - script.pixels(alone)).max() <= 1  # in a batch with other edges
    assert re.search(r"F-score 0\.\d+ \(95 % interval", capsys.readouterr().out)
    (other,) = script(
        *control(folder)[:-1], f"--image={folder}/several/b.png", "--prompt=a fox", "--n_samples=1", "--plan=off"
    )
    assert np.abs(script.pixels(fox) - script.pixels(other)).max() <= 1
    for given, message in (
        ([*edge, "--prompt=an owl"], "--prompt: not with a folder as --image: each of its images has one prompt, its"),
        ([*edge, "--repeat=2"], "--repeat: not with a folder as --image"),
        (
            [*edge[:-1], f"--image={folder}/untold"],
            f"--image: {folder}/untold/a.png: no caption (1 of 1 images have none); expected them in metadata.jsonl",
        ),
    ):
        assert script.refusal(capsys, *given).startswith(message)


def test_control_images_of_a_folder_are_made_when_their_images_are_sampled(folder, tmp_path):
    """However many there are, a few are in memory; and what they show does not depend on a run's precision."""
    images, several = [], tmp_path / "several"
    several.mkdir()
    for number in range(3 * LATELY):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[2 : 3 + number % 12, 3 : 4 + number // 12 % 12] = 255
        images.append(Image.fromarray(pixels))
        images[-1].save(several / f"{number:03}.png")
        (several / f"{number:03}.txt").write_text("a square")
    expected = [as_hint(edges(image)) for image in images]
    images.clear()
    setup = make_setup(ModelSettings(folder / "config.yaml", folder / "model.safetensors", device="cpu"))
    settings = ControlSettings(["edges"], [f"{folder}/control.safetensors"])
    gc.collect()
    before = sum(type(thing) is Image.Image for thing in gc.get_objects())
    (given,) = controlled(setup, settings, read_source(several), (16, 16)).inputs
    for first in range(0, len(expected), 4):
        assert torch.equal(given.of(range(first, first + 4)), torch.stack(expected[first : first + 4]))
    gc.collect()
    assert sum(type(thing) is Image.Image for thing in gc.get_objects()) - before <= LATELY
    (several / "000.png").unlink()
    with pytest.raises(SettingError, match="^image: .*000.png: no such file"):
        given.of([0])


def test_control_images_are_made_before_their_images_are_timed(script, folder, monkeypatch):
    """What finds edges or depth takes none of the seconds of the method that comes first."""
    timed, drawn, inside, made_inside = engine.timed, cli_control.drawn, [], []

    def timing(call, device):
        inside.append(call)
        try:
            return timed(call, device)
        finally:
            inside.pop()

    def drawing(*given):
        made_inside.append(bool(inside))
        return drawn(*given)

    monkeypatch.setattr(engine, "timed", timing)
    monkeypatch.setattr(cli_control, "drawn", drawing)
    script.common.remove("--prompt=an owl")
    assert len(script(*control(folder)[:-1], f"--image={folder}/several", "--plan=off")) == 2
    assert made_inside == [False, False]


def test_what_makes_control_images_computes_in_full_precision():
    class Detected:
        detector = torch.nn.Conv2d(3, 3, 3)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, places):
            return self.detector(torch.ones(len(places), 3, 8, 8))

    with torch.autocast("cpu", torch.bfloat16):
        assert ControlInput(None, Detected(), 1.0, {}).of([7, 9]).dtype is torch.float32


@pytest.mark.parametrize("kind, name", [("scribble", "hed"), ("depth", "midas")])
def test_a_control_image_is_told_by_the_network_that_makes_it(folder, tmp_path, kind, name):
    options = []
    for content in (b"one", b"two"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        settings = ControlSettings([kind], ["x"], **{name: str(tmp_path / "weights.safetensors")})
        options.append(made_of(settings, kind, read_source(f"{folder}/image.png")))
    assert options[0][name] == "weights.safetensors" and options[0] != options[1]


def test_a_saved_image_that_is_gone_before_its_edges_are_compared(script, folder, capsys, monkeypatch):
    followed = cli_control.edges_followed

    def without_images(network, runs):
        for file in (script.out / "samples").iterdir():
            file.unlink()
        return followed(network, runs)

    monkeypatch.setattr(cli_control, "edges_followed", without_images)
    assert script.main([*script.common, *control(folder), "--plan=off"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"controlnet.py: error: --outdir: .*/samples/an-owl.*\.png: no such file; expected an image", line
    )


def test_a_long_strip_needs_a_size(script, folder, tmp_path, capsys):
    """The results would be as long."""
    Image.new("RGB", (400, 1), "red").save(tmp_path / "strip.png")
    strip = [*control(folder)[:-1], f"--image={tmp_path}/strip.png"]
    assert script.refusal(capsys, *strip) == (
        "--image: 400 x 1 pixels, from which the results would have 6400 x 16; a side of more than 8 times the other "
        "needs --H and --W"
    )
    (made,) = script(*strip, "--H=16", "--W=16", "--plan=off")
    assert script.pixels(made).shape == (16, 16, 3)


def test_bad_input_is_refused_in_one_line(script, folder, capsys):
    edge, file = control(folder), f"{folder}/edges.png"
    for given, message in (
        (edge[:2] + edge[4:], "--control-model: needed, one for each control; only that of emoji64's edges ships"),
        (edge[:4], "--image: needed for control edges: the image that it is made of"),
        ([*control(folder, file), f"--image={folder}/image.png"], "--image: only for control edges, scribble, depth"),
        ([*edge, "--control", file], "--control-model: expected one for each control, 2; got 1"),
        ([*edge, "--control-weight=1", "--control-weight=1"], "--control-weight: expected one for each control, 1"),
        (
            control(folder, "egdes"),
            "--control: expected edges, scribble, depth or the file of a control image; got egdes; did you mean edges?",
        ),
        (
            [*control(folder, "edge"), f"--image={folder}/image.png"],
            "--control: expected edges, scribble, depth or the file of a control image; got edge; did you mean edges?",
        ),
        (
            [*edge, "--control=scribbel", "--control-model=x"],
            "--control: expected edges, scribble, depth or the file of a control image; got scribbel; did you mean ",
        ),
        (control(folder, f"{folder}/wide.png"), f"--control: {folder}/wide.png: 32 x 16 pixels; expected 16 x 16, the"),
        (control(folder, f"{folder}/clear.png"), f"--control: {folder}/clear.png: an image of mode RGBA with transp"),
        (control(folder, f"{folder}/config.yaml"), f"--control: {folder}/config.yaml: not an image"),
        (control(folder, "edges", "other"), f"--control-model: {folder}/other.safetensors: a control network for anot"),
        (control(folder, "edges", "coarse"), f"--control-model: {folder}/coarse.safetensors: a control network for an"),
        (
            control(folder, "edges", "model"),
            f"--control-model: {folder}/model.safetensors: this is a model, which --ckpt takes",
        ),
        (control(folder, "edges", "no_network"), f"--control-model: {folder}/no_network.safetensors: no control netw"),
        (control(folder, "edges", "none"), f"--control-model: {folder}/none.safetensors: no such file"),
        ([*control(folder), "--canny=5"], "--canny: must be LOW,HIGH, two numbers such as 100,200; got '5'"),
        ([*control(folder), "--canny=200,100"], "--canny: expected LOW <= HIGH; got 200,100"),
        ([*control(folder)[2:], "--control=scribble"], "--hed: needed for control scribble: the weights of HED"),
        ([*control(folder)[2:], "--control=depth"], "--midas: needed for control depth: the weights of MiDaS"),
        ([*edge, "--control-at=every", "--plan=deepcache:2"], "--control-at: control networks run at every step only"),
        ([*edge, "--control-at=every", "--plan=online:0.1"], "--control-at: every needs key timesteps that are known"),
        ([*edge, "--control-at=every", "--guidance-reuse"], "--control-at: every does not go with guidance_reuse"),
    ):
        assert script.refusal(capsys, *given).startswith(message)
