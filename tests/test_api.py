"""The Python interface makes the images of the scripts, for every kind of model, and says what it does not take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import ldm
from ldm.cli.kinds import KINDS, PNG_MODES, TIFF_MODES, as_file, parsed
from ldm.io.images import open_image
from tests.helpers.images import add, labelled, scene, slope, small
from tests.helpers.paths import EMOJI64, ROOT
from tests.helpers.scripts import Script, load_script
from tests.helpers.tiny_models import NARROW, TINY_DEPTH, tiny_model, tiny_text_model

DOG = {"class": 3, "box": [0, 0, 1, 1]}


def retrieval_model(folder: Path) -> list[str]:
    """A tiny model whose config recommends a database of three images."""
    files = tiny_model(
        folder,
        "configs/retrieval-augmented-diffusion/768x768.yaml",
        latent=4,
        unet_config__params={"context_dim": 192, "channel_mult": [1, 2], "attention_resolutions": [2, 1]},
        first_stage_config__params__ddconfig__ch_mult=[1, 1, 1],
    )
    (folder / "pictures").mkdir()
    for number in range(3):
        scene((32, 32), number).save(folder / "pictures" / f"{number}.png")
    assert load_script("build_database").main([str(folder / "pictures"), "--out", str(folder / "database")]) == 0
    with Path(files[1]).open("a") as config:
        config.write(f"sampling: {{scale: 2.0, embedder: emoji, knn: 2, database: {folder / 'database'}}}\n")
    return files


# What each kind is tried with: its model, its script with arguments, what Python takes in their place.
MODELS = {
    "text": lambda folder: ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
    "inpainting from text": lambda folder: tiny_text_model(
        folder, "configs/stable-diffusion/v1-inpainting-inference.yaml"
    ),
    "inpainting": lambda folder: tiny_model(folder, "models/ldm/inpainting_big/config.yaml"),
    "depth": lambda folder: tiny_text_model(
        folder, "configs/stable-diffusion/v2-midas-inference.yaml", depth_stage_config__params__settings=TINY_DEPTH
    ),
    "upscaling": lambda folder: tiny_model(folder, "models/ldm/bsr_sr/config.yaml"),
    "classes": lambda folder: tiny_model(folder, "configs/latent-diffusion/cin256-v2.yaml", **NARROW),
    "nothing": lambda folder: tiny_model(folder, "models/ldm/ffhq256/config.yaml"),
    "boxes": lambda folder: tiny_model(
        folder,
        "models/ldm/layout2img-openimages256/config.yaml",
        unet_config__params__context_dim=32,
        unet_config__params__transformer_depth=1,
        cond_stage_config__params__n_embed=32,
        cond_stage_config__params__n_layer=2,
    ),
    "labels": lambda folder: tiny_model(folder, "models/ldm/semantic_synthesis256/config.yaml"),
    "neighbours": retrieval_model,
    "upscaling, text": lambda folder: tiny_text_model(folder, "configs/stable-diffusion/x4-upscaling.yaml"),
}
HEART = "a red heart, noto style"
CASES = {
    "text": (
        "text",
        "txt2img",
        ["--prompt", HEART, "--n_samples", "2", "--plan", "auto:9", "--steps", "50"],
        {"subjects": [HEART], "samples": 2, "plan": "auto:9", "steps": 50},
    ),
    "timesteps of one's own": (
        "text",
        "txt2img",
        ["--prompt", HEART, "--n_samples", "1", "--sampler", "unipc", "--timesteps-at", "900,700,500,100"],
        {"subjects": [HEART], "sampler": "unipc", "timesteps_at": [900, 700, 500, 100]},
    ),
    "every flag": (
        "text",
        "txt2img",
        [
            "--prompt",
            HEART,
            "--n_samples",
            "1",
            "--sampler",
            "euler-a",
            "--scale",
            "3",
            "--propagate",
            "linear",
            "--noise-weight",
            "0.1",
            "--noise-order",
            "after",
            "--guidance-interval",
            "0,900",
            "--parallel",
            "2",
            "--H",
            "32",
            "--W",
            "96",
        ],
        {
            "subjects": HEART,
            "sampler": "euler-a",
            "scale": 3,
            "propagate": "linear",
            "noise_weight": 0.1,
            "noise_order": "after",
            "guidance_interval": (0, 900),
            "parallel": 2,
            "H": 32,
            "W": 96,
        },
    ),
    "weights, chunks and tiles": (
        "text",
        "txt2img",
        ["--prompt", "a (red:1.4) heart", "--prompt-weights", "--prompt-chunks", "2", "--tile", "32", "--n_samples=1"],
        {"subjects": "a (red:1.4) heart", "prompt_weights": True, "prompt_chunks": 2, "tile": 32},
    ),
    "image to image": (
        "text",
        "img2img",
        ["--prompt", "a (red:2) heart", "--prompt-weights", "--init-img", "a.png", "--n_samples", "2"],
        {"subjects": "a (red:2) heart", "prompt_weights": True, "image": "a.png", "samples": 2},
    ),
    "masked": (
        "text",
        "inpaint",
        ["--prompt", HEART, "--indir", "in"],
        {"subjects": HEART, "image": ["in/bird.png", "in/cat.png"], "mask": ["in/bird_mask.png", "in/cat_mask.png"]},
    ),
    "inpainting from text": (
        "inpainting from text",
        "inpaint",
        ["--prompt", "a cat", "--indir", "in"],
        {
            "subjects": ["a cat"],
            "image": ["in/bird.png", "in/cat.png"],
            "mask": ["in/bird_mask.png", "in/cat_mask.png"],
        },
    ),
    "inpainting": (
        "inpainting",
        "inpaint",
        ["--indir", "in"],
        {"image": ["in/bird.png", "in/cat.png"], "mask": ["in/bird_mask.png", "in/cat_mask.png"]},
    ),
    "depth": (
        "depth",
        "depth2img",
        ["--prompt", "a cat", "--init-img", "a.png", "--n_samples", "1"],
        {"subjects": ["a cat"], "image": Path("a.png")},
    ),
    "upscaling": ("upscaling", "superresolution", ["--images", "s.png"], {"image": "s.png"}),
    "upscaling, text": (
        "upscaling, text",
        "superresolution",
        ["--images", "s.png", "--prompt", "a cat"],
        {"subjects": "a cat", "image": "s.png"},
    ),
    "classes": (
        "classes",
        "class_conditional",
        ["--classes", "3", "tench", "--n_samples", "1"],
        {"subjects": [3, "tench"]},
    ),
    "nothing": ("nothing", "sample_diffusion", ["-n", "2"], {"samples": 2}),
    "boxes": ("boxes", "layout2img", ["--boxes", "boxes.json"], {"subjects": [[DOG]]}),
    "labels": ("labels", "semantic2img", ["--maps", "map.png"], {"subjects": ["map.png"]}),
    "neighbours of a text": (
        "neighbours",
        "knn2img",
        ["--prompt", HEART, "--use_neighbors", "--n_samples", "2"],
        {"subjects": HEART, "use_neighbors": True, "samples": 2},
    ),
    "neighbours of images": (
        "neighbours",
        "knn2img",
        ["--query-image", "a.png", "in/cat.png", "--knn", "1", "--n_samples", "1"],
        {"image": ["a.png", "in/cat.png"], "knn": 1},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files as arguments, by kind; made once."""
    made: dict[str, list[str]] = {}

    def files(kind: str) -> list[str]:
        if kind not in made:
            made[kind] = MODELS[kind](tmp_path_factory.mktemp("model"))
        return made[kind]

    return files


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, with images."""
    monkeypatch.setattr("ldm.modules.midas.api.SIDE", 96)
    monkeypatch.chdir(tmp_path)
    slope("a.png")
    small("s.png")
    labelled("map.png")
    for number, name in enumerate(("bird", "cat")):
        add(tmp_path / "in", name, (64, 64), number)
    Path("boxes.json").write_text('[[{"class": 3, "box": [0, 0, 1, 1]}]]')


@pytest.fixture(scope="module")
def emoji(models) -> Any:
    """The model that ships."""
    files = models("text")
    return ldm.load(config=files[1], ckpt=files[3])


@pytest.mark.parametrize("case", CASES)
def test_the_images_are_those_of_the_script(case, models, tmp_path):
    kind, name, arguments, options = CASES[case]
    files = models(kind)
    if "--steps" not in arguments:
        arguments, options = [*arguments, "--steps", "4"], options | {"steps": 4}
    model = ldm.load(config=files[1], ckpt=files[3])
    assert model.kind == kind.partition(",")[0]
    run = model.run(**options, seed=7)
    images = run.images()
    if name not in ("txt2img", "img2img", "depth2img", "knn2img"):  # the last digits depend on the batch
        arguments = [*arguments, "--batch_size", str(len(run.items))]
    script = Script(name, tmp_path, *files)
    expected = [script.pixels(entry) for entry in script(*arguments, "--seed", "7")]
    assert len(images) == len(expected) > 0
    for image, pixels in zip(images, expected, strict=True):
        assert image.mode == "RGB" and (np.asarray(image).astype(int) == pixels).all()


@pytest.mark.parametrize("mode", [*PNG_MODES, *TIFF_MODES[2:], "I", "I;16B", "HSV", "RGBX", "RGBa"])
def test_an_image_of_any_mode_is_taken_as_a_viewer_shows_it(tmp_path, mode):
    levels = np.linspace([0, 40, 80], [200, 160, 255], 64, dtype=np.uint8).reshape(8, 8, 3)
    colours, grey = Image.fromarray(levels), Image.fromarray(levels[..., 0])
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        image, expected = ImageCms.profileToProfile(colours, *profiles, outputMode="LAB"), colours
    elif mode.startswith("I"):
        numbers = levels[..., 0].astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]) * 257
        image, expected = Image.frombytes(mode, (8, 8), numbers.tobytes()), grey
    else:
        image = colours.convert("RGBA").convert(mode) if mode == "RGBa" else colours.convert(mode)
        expected = image if mode in ("1", "L", "P") else colours.convert("L") if mode == "LA" else colours
    shown = open_image(as_file(image, tmp_path).path)
    difference = np.asarray(shown).astype(int) - np.asarray(expected.convert("RGB"))
    assert shown.mode == "RGB" and np.abs(difference).max() <= {"YCbCr": 3, "LAB": 8, "HSV": 6}.get(mode, 0)


@pytest.mark.parametrize(
    "levels, why",
    [
        (np.full((8, 8), 0.5, np.float32), "levels that are not whole numbers"),
        (np.full((8, 8), 70_000, np.int32), "levels 70000..70000; expected 8 or 16 bits"),
        (np.full((8, 8), -1, np.int32), "levels -1..-1; expected 8 or 16 bits"),
        (np.full((8, 8), 200, np.int32), "in more than 8 bits, which is black"),
    ],
    ids=["F", "large", "negative", "dark"],
)
def test_levels_without_a_meaning_are_refused(tmp_path, levels, why):
    with pytest.raises(ValueError, match=why):
        open_image(as_file(Image.fromarray(levels), tmp_path).path)


SCRIPTS = {
    "text": ("txt2img", []),
    "inpainting from text": ("inpaint", ["--indir", "in"]),
    "inpainting": ("inpaint", ["--indir", "in"]),
    "depth": ("depth2img", ["--init-img", "a.png"]),
    "upscaling": ("superresolution", ["--images", "s.png"]),
    "classes": ("class_conditional", []),
    "nothing": ("sample_diffusion", []),
    "boxes": ("layout2img", ["--boxes", "boxes.json"]),
    "labels": ("semantic2img", ["--maps", "map.png"]),
    "neighbours": ("knn2img", []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_the_script(kind):
    """All but how many images there are, and what the script sets afterwards."""
    name, needed = SCRIPTS[kind]
    script = vars(load_script(name).parser().parse_args(needed))
    ours = vars(parsed(KINDS[kind], {}))
    differ = {
        argument: (value, script[argument])
        for argument, value in ours.items()
        if argument in script and script[argument] != value
    }
    set_afterwards = {"inpainting": "scale", "nothing": "steps", "text": "noise_order"}
    assert not differ.keys() - {"n_samples", "batch_size", set_afterwards.get(kind)}


def test_images_in_memory_are_read_as_files_are(emoji):
    with Image.open("in/bird.png") as image, Image.open("in/bird_mask.png") as mask:
        image, mask = image.copy(), mask.copy()
    made = [np.asarray(emoji.images(HEART, image=image, mask=mask, steps=3, seed=seed)[0]) for seed in (1, 1, 2)]
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()
    see_through = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
    white = Image.new("RGB", (64, 64), "white")
    first, second = (emoji.images(HEART, image=one, steps=3, strength=0.4)[0] for one in (see_through, white))
    assert first.tobytes() == second.tobytes()  # prompts name the noise, and what is transparent is white


def test_sizes_follow_each_other_on_one_network(models):
    """Images of every size are to the bit those of a model that makes no other; nothing is read a second time."""
    files = models("text")
    model = ldm.load(config=files[1], ckpt=files[3])
    network, options = model.network, {"subjects": HEART, "steps": 2}
    waiting = model.run(**options, H=32, W=32)
    small, large, again = (model.images(**options, H=side, W=side)[0] for side in (32, 64, 32))
    assert small.size == (32, 32) and large.size == (64, 64) and small.tobytes() == again.tobytes()
    fresh = ldm.load(config=files[1], ckpt=files[3]).images(**options, H=64, W=64)[0]
    assert large.tobytes() == fresh.tobytes() and model.network is network
    model.images(**options, H=64, W=64)
    assert waiting.images()[0].tobytes() == small.tobytes(), "made when images of another size have come between"


@pytest.mark.parametrize(
    "options, error, why",
    [
        ({}, ValueError, "subjects must be one or more prompts"),
        ({"subjects": 5}, ValueError, "subjects must be one or more prompts"),
        ({"subjects": ["a\ud800"]}, ValueError, "subjects must be one or more prompts"),
        ({"subjects": []}, ValueError, "one or more prompts"),
        ({"subjects": [3]}, ValueError, "one or more prompts"),
        ({"subjects": HEART, "steps": 0}, ValueError, "^steps: expected a whole number in 1..10000; got '0'"),
        ({"subjects": HEART, "step": 9}, TypeError, "step: no argument of this kind of model; there are"),
        ({"subjects": HEART, "plms": 1}, TypeError, "plms must be True or False"),
        ({"subjects": HEART, "spacing": "even"}, ValueError, "^spacing: invalid choice: 'even'"),
        ({"subjects": HEART, "timesteps_at": [5, 9]}, ValueError, "^timesteps_at: timesteps must fall strictly"),
        ({"subjects": HEART, "timesteps_at": [9, 5], "spacing": "time"}, ValueError, "^spacing: must be left out"),
        ({"subjects": HEART, "H": 33}, ValueError, "^H: must be a multiple of 32"),
        ({"subjects": HEART, "plan": "auto:9", "steps": 20}, ValueError, "^plan: auto plans need .* one for 50"),
        ({"subjects": HEART, "strength": 0.5}, ValueError, "strength needs an image"),
        (
            {"subjects": HEART, "image": "in/bird.png", "mask": "in/bird_mask.png", "strength": 0.5},
            ValueError,
            "strength needs an image to begin with, which is not for control, and no mask",
        ),
        (
            {"subjects": HEART, "image": "in/bird.png", "mask": "map.png"},
            ValueError,
            "mask must be as large as the image",
        ),
        ({"subjects": HEART, "mask": "in/bird_mask.png"}, ValueError, "image: needed"),
        ({"subjects": HEART, "image": 3}, TypeError, "expected a PIL image or the path of a file; got a int"),
        ({"subjects": HEART, "image": "in"}, ValueError, "^in: a folder; expected a file"),
        ({"subjects": HEART, "image": "/dev/zero"}, ValueError, "^/dev/zero: a device; expected a file"),
        ({"subjects": HEART, "version": True}, TypeError, "^version: no argument"),
        ({"subjects": HEART, "negative_prompt": {"a": 1}}, TypeError, "^negative_prompt must be a text"),
        ({"subjects": HEART, "steps": True}, TypeError, "^steps must be a text, a number"),
        ({"subjects": HEART, "image": "none.png"}, FileNotFoundError, "none.png"),
        ({"subjects": HEART, "tome": 2}, ValueError, "^tome: expected a number in 0..0.75"),
        ({"subjects": "(a:1,3)", "prompt_weights": True}, ValueError, "^prompt: ':1,3' at character 3 is no weight"),
        ({"subjects": HEART, "crop": (0, 0)}, ValueError, "^crop: only for a model that is conditioned on size and"),
    ],
)
def test_what_is_not_taken_is_said(emoji, options, error, why):
    with pytest.raises(error, match=why):
        emoji.images(**options)


def test_a_database_that_is_not_searched_is_refused(models):
    files = models("neighbours")
    with pytest.raises(ValueError, match="^database: there are neighbours only with use_neighbors or image"):
        ldm.load(config=files[1], ckpt=files[3]).run(HEART, database="database")


def test_a_device_may_be_the_object(models):
    files = models("text")
    assert ldm.load(config=files[1], ckpt=files[3], device=torch.device("cpu")).setup.device == torch.device("cpu")


def test_a_prompt_that_is_not_read_to_its_end_is_said(emoji):
    with pytest.warns(UserWarning, match="1 of 1 prompts longer than the text encoder reads"):
        emoji.run("a red heart " * 20)


@pytest.mark.parametrize(
    "given, error, why",
    [
        ({}, ValueError, "give a model's name, or config and ckpt"),
        ({"name": "emoji64", "ckpt": "a.ckpt"}, ValueError, "give a model's name"),
        ({"ckpt": "map.png"}, ValueError, "^ckpt: map.png"),
        ({"config": "a.yaml", "ckpt": "a.ckpt"}, FileNotFoundError, "a.yaml: no such file"),
        ({"name": "nobody"}, ValueError, "there is no model 'nobody'; accepted: emoji64, rdm/emoji, sd-v1-4"),
        (
            {"name": "sd-v1-5"},
            FileNotFoundError,
            "download_models.py sd-v1-5, or put https://.* at models/ldm/stable-diff",
        ),
        ({"name": "emoji64", "weights": "ema2"}, ValueError, "weights must be one of auto, ema, raw"),
        ({"name": "n" * 5000}, ValueError, "File name too long"),
        ({"config": "n" * 5000}, ValueError, "File name too long"),
        ({"name": "emoji64", "device": "cuda:99"}, ValueError, "^device: cuda:99 is not there"),
        ({"name": "emoji64", "lora": [("a", 0.5)]}, TypeError, r"must be a file, or a list of files; got \[\('a', 0.5"),
        ({"name": "emoji64", "lora": "none.safetensors"}, ValueError, "^lora: none.safetensors: no such file"),
        ({"name": "emoji64", "lora": "a:9999"}, ValueError, "^lora: expected a number in -1000..1000; got '9999'"),
    ],
)
def test_models_that_are_not_there(given, error, why):
    with pytest.raises(error, match=why):
        ldm.load(**given)


def test_weights_are_found_from_the_working_directory_and_in_folders(models, tmp_path):
    """As after a download into the folder where one works, and after a training."""
    files = models("classes")
    for place in ("models/ldm/cin256-v2/model.ckpt", "run/model.safetensors", "run/config.yaml"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).write_bytes(Path(files[1] if place.endswith("yaml") else files[3]).read_bytes())
    assert ldm.load("run").kind == "classes"
    with pytest.raises(ValueError, match="model.ckpt"):  # found; but what lies there is no .ckpt
        ldm.load("cin256-v2")


def test_importing_the_package_imports_no_torch():
    code = "import sys, ldm; ldm.load; print(*({'torch', 'numpy', 'PIL', 'yaml'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
