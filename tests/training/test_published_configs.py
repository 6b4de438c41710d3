"""Every published configuration builds and trains, at a reduced width, on a few images in its dataset's own layout."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_model
from ldm.modules.encoders.tokenizer import train_tokenizer
from ldm.training.state import read_state
from main import main
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_clip import TINY_TEXT

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
# A path that was published and where nothing is.
ELSEWHERE = {"configs/first_stage_models/vq-f8/model.yaml": "models/first_stage_models/vq-f8/model.ckpt"}
COUNT = 2  # images in each set
SIZE = 32  # of the images that are trained on
# What the released configurations leave to the user: data of the kind that the model is trained on.
DATA_OF = {
    "cin256-v2": {"target": "ldm.data.folder.ClassFolders", "params": {"root": "own/classes"}},
    "model_inpainting_big": {"target": "ldm.data.inpainting.InpaintingFolder", "params": {"root": "own/classes"}},
    "model_semantic_synthesis256": {
        "target": "ldm.data.segmentation.SegmentationFolder",
        "params": {"root": "data/rfw/train", "crop_size": SIZE},
    },
    "txt2img-1p4B-eval": {"target": "ldm.data.folder.CaptionedFolder", "params": {"root": "data/previews/train"}},
    "rdm_768x768": {"target": "neighbours.WithNeighbours"},
}
# What the command line of Custom Diffusion's release says.
CUSTOM = {
    "data.params.train.params.datapath": "own/classes",
    "data.params.train.params.caption": "a <new1>",
    "data.params.train2.params.datapath": "own/classes",
    "data.params.train2.params.caption": "a thing",
    "model.params.cond_stage_config.params.version": TINY_TEXT,
    "model.params.cond_stage_config.params.vocabulary": "clip",
}
OWN_DATA = """
import numpy as np
from torch.utils.data import Dataset

class WithNeighbours(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 4

    def __getitem__(self, i):
        image = np.full((self.size, self.size, 3), i / 4, np.float32)
        return {"jpg": image, "nix": np.full((2, 768), i / 4, np.float32)}
"""


def write_image(path: Path, seed: int, side: int = 40) -> Path:
    """An image of a few colours, not square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(side // 5, 0).repeat(side // 5, 1)).save(path)
    return path


def write_lists(root: Path) -> None:
    """LSUN, FFHQ and CelebA-HQ: folders, and lists of what is in them."""
    sets = {
        "lsun/churches": ("lsun/church_outdoor_train.txt", "lsun/church_outdoor_val.txt"),
        "lsun/bedrooms": ("lsun/bedrooms_train.txt", "lsun/bedrooms_val.txt"),
        "ffhq": ("ffhqtrain.txt", "ffhqvalidation.txt"),
        "celebahq": ("celebahqtrain.txt", "celebahqvalidation.txt"),
    }
    for folder, lists in sets.items():
        names = [f"{i:05d}.{'npy' if folder == 'celebahq' else 'jpg'}" for i in range(COUNT)]
        for i, name in enumerate(names):
            path = write_image((root / folder / name).with_suffix(".jpg"), i)
            if folder == "celebahq":
                np.save(root / folder / name, np.asarray(Image.open(path)).transpose(2, 0, 1)[None])
        for file in lists:
            (root / file).write_text("\n".join(names) + "\n")


def write_openimages(root: Path) -> None:
    labels = ["/m/01g317", "/m/0cmf2"]
    for part in ("train", "validation"):
        names = [write_image(root / part / f"{i:016x}.jpg", i).stem for i in range(COUNT)]
        rows = [
            [name, "x", labels[i % 2], "1", "0.1", "0.6", "0.2", "0.9", "0", "0", "0"] for i, name in enumerate(names)
        ]
        header = "ImageID Source LabelName Confidence XMin XMax YMin YMax IsOccluded IsTruncated IsGroupOf".split()
        with (root / f"{part}-annotations-bbox.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([header, *rows])
    (root / "class-descriptions-boxable.csv").write_text("".join(f"{label},Thing\n" for label in labels))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working folder with every dataset in the layout that it has on disk."""
    root = tmp_path_factory.mktemp("home")
    write_lists(root / "data")
    write_openimages(root / "data" / "openimages")
    for part in ("train", "validation"):
        for i in range(COUNT):
            synset = root / "cache" / "autoencoders" / "data" / f"ILSVRC2012_{part}" / "data" / f"n0000000{i}"
            write_image(synset / f"n0000000{i}_1.JPEG", i)
            image = write_image(root / "data" / "rfw" / part / "images" / f"{i}.jpg", i)
            labels = np.random.default_rng(i).integers(0, 182, Image.open(image).size[::-1], dtype=np.uint8)
            (root / "data" / "rfw" / part / "segmentations").mkdir(exist_ok=True)
            Image.fromarray(labels).save(root / "data" / "rfw" / part / "segmentations" / f"{i}.png")
            write_image(root / "data" / "previews" / part / f"{i}.jpg", i).with_suffix(".txt").write_text(
                "a red thing\n"
            )
            write_image(root / "own" / "classes" / f"class{i}" / "a.png", i)
    (root / "neighbours.py").write_text(OWN_DATA)
    np.savez(root / "nns.npz", nn_embeddings=np.random.default_rng(0).normal(size=(COUNT, 5, 16)).astype(np.float32))
    write_vocabulary(root / "clip")
    train_tokenizer(["a red thing"], 60, 8).save(str(root / "tokenizer.json"))
    return root


def shipped(name: str) -> Path:
    """Where a published configuration is in this project."""
    source = json.loads(CONFIGS[name].read_text())["source"].partition("/")[2]
    return ROOT / source.replace("configs/rdm/", "configs/retrieval-augmented-diffusion/rdm-")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_configuration_is_the_published_one(name):
    text = CONFIGS[name].read_text()
    for before, after in ELSEWHERE.items():
        text = text.replace(before, after)
    assert OmegaConf.to_container(OmegaConf.load(shipped(name))) == json.loads(text)["config"]


def at(config: dict, path: str) -> Any:
    """A part of a configuration, {} if it is not there."""
    for key in path.split("."):
        config = config.get(key, {}) if isinstance(config, dict) else {}
    return config


def reduced_first_stage(ddconfig: dict, prefix: str) -> dict[str, Any]:
    resolution, size = ddconfig["resolution"], max(SIZE, 2 ** len(ddconfig["ch_mult"]))
    return {
        f"{prefix}.ch": 32,
        f"{prefix}.ch_mult": [1] * len(ddconfig["ch_mult"]),
        f"{prefix}.num_res_blocks": 1,
        f"{prefix}.resolution": size,
        f"{prefix}.attn_resolutions": [a * size // resolution for a in ddconfig["attn_resolutions"]],
    }


def reduced_network(config: dict) -> dict[str, Any]:
    """The UNet, the first stage and the conditioner of a latent diffusion model."""
    unet, cond = "model.params.unet_config.params", "model.params.cond_stage_config.params"
    changes = {f"{unet}.model_channels": 32, f"{unet}.num_res_blocks": 1}
    changes[f"{unet}.channel_mult"] = [1] * len(at(config, unet)["channel_mult"])
    if "context_dim" in at(config, unet):
        width = 768 if at(config, cond) == {} and config["model"]["params"].get("cond_stage_key") == "nix" else 16
        changes |= {f"{unet}.context_dim": width, f"{unet}.transformer_depth": 1}
    first = "model.params.first_stage_config.params"
    changes |= reduced_first_stage(at(config, f"{first}.ddconfig"), f"{first}.ddconfig")
    if "n_embed" in at(config, first):
        changes[f"{first}.n_embed"] = 16
    if "ckpt_path" in at(config, first):
        changes[f"{first}.ckpt_path"] = None
    if "embed_dim" in at(config, cond):
        changes[f"{cond}.embed_dim"] = 16
    if "n_layer" in at(config, cond):
        changes |= {f"{cond}.n_embed": 16, f"{cond}.n_layer": 1}
        if at(config, cond).get("use_tokenizer", True):
            changes |= {f"{cond}.vocab_size": 60, f"{cond}.max_seq_len": 8, f"{cond}.tokenizer": "tokenizer.json"}
    return changes


def size_of(config: dict) -> int:
    """A side of the images: as many pixels as the network halves, or more."""
    if "unet_config" not in config["model"]["params"]:
        return max(SIZE, 2 ** len(at(config, "model.params.ddconfig.ch_mult")))
    levels = at(config, "model.params.unet_config.params.channel_mult")
    factor = 2 ** (len(at(config, "model.params.first_stage_config.params.ddconfig.ch_mult")) - 1)
    return max(SIZE, factor * 2 ** (len(levels) - 1))


def reduced_data(config: dict, size: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"data.params.batch_size": 2, "data.params.num_workers": 0}
    for part in ("train", "validation"):
        params = at(config, f"data.params.{part}.params")
        if "dset_config" in params:
            inner = params["dset_config"]["params"]
            value = {"config": {"size": size}} if "config" in inner else {"size": size}
            changes[f"data.params.{part}.params.dset_config.params"] = value
            changes[f"data.params.{part}.params.nns"] = "nns.npz"
        for name in [name for name in ("size", "crop_size", "config") if name in params]:
            value = {"size": size} if name == "config" else size
            changes[f"data.params.{part}.params.{name}"] = value
    return changes


def overrides_of(config: dict) -> list[str]:
    changes = reduced_data(config, size_of(config))
    if "unet_config" in config["model"]["params"]:
        changes |= reduced_network(config)
    else:
        loss = "model.params.lossconfig.params"
        changes |= reduced_first_stage(config["model"]["params"]["ddconfig"], "model.params.ddconfig")
        changes |= {f"{loss}.disc_start": 1, f"{loss}.disc_ndf": 8, f"{loss}.perceptual": "none"}
        if "n_embed" in config["model"]["params"]:
            changes["model.params.n_embed"] = 16
    changes |= CUSTOM if config["model"]["target"].endswith("CustomDiffusion") else {}
    quiet = {"accelerator": "cpu", "enable_progress_bar": "false", "limit_val_batches": 0, "max_epochs": 9}
    changes |= {f"lightning.trainer.{name}": value for name, value in quiet.items()}
    return [
        f"{key}={json.dumps(value) if value is not None else 'null'}".replace('"', "") for key, value in changes.items()
    ]


def data_file(name: str, config: dict, folder: Path) -> list[str]:
    """A second file for --base, with the data that a released configuration lacks."""
    if name not in DATA_OF:
        return []
    section = DATA_OF[name]
    section = section | {"params": section.get("params", {}) | {"size": size_of(config)}}
    (folder / "data.yaml").write_text(
        yaml.safe_dump({"data": {"target": "main.DataModuleFromConfig", "params": {"train": section}}})
    )
    return [str(folder / "data.yaml")]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps(name, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    config = json.loads(CONFIGS[name].read_text())["config"]
    files = [str(shipped(name)), *data_file(name, config, tmp_path)]
    allow = ["--allow", "neighbours"] if "neighbours" in str(DATA_OF.get(name)) else []
    code = main(["-b", *files, "-t", "-n", "run", "--steps", "2", "-l", str(tmp_path), *allow, *overrides_of(config)])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "learning rate" in out.out
    assert ("a first stage that was never trained" in out.out) == ("unet_config" in config["model"]["params"])
    state = read_state(tmp_path / "run" / "last.ckpt")
    assert state["global_step"] == 2
    assert all(value.isfinite().all() for value in state["state_dict"].values() if torch.is_tensor(value))


@pytest.mark.parametrize(
    "name, data",
    [
        ("model_ffhq256", "folder"),
        ("first_stage_kl-f8", "folder"),
        ("cin-ldm-vq-f8", "classes"),
        ("txt2img-1p4B-eval", "captions"),
        ("model_bsr_sr", "superresolution"),
        ("model_inpainting_big", "inpainting"),
    ],
)
def test_data_of_ones_own(name, data, home, tmp_path, monkeypatch, capsys):
    """The recipes of docs/training.md."""
    monkeypatch.chdir(home)
    config = json.loads(CONFIGS[name].read_text())["config"]
    for i in range(30):
        write_image(tmp_path / "mine" / f"class{i % 2}" / f"{i}.jpg", i).with_suffix(".txt").write_text("a red thing")
    files = [str(shipped(name)), str(ROOT / "configs" / "data" / f"{data}.yaml")]
    size = f"data.params.train.params.size={size_of(config)}"
    reduced = [text for text in overrides_of(config) if not text.startswith(("data.params.train", "data.params.val"))]
    run = ["--base", *files, "-t", "-n", "c", "--steps", "2", "-l", str(tmp_path), *reduced, size]
    run += ["lightning.trainer.limit_val_batches=1", "lightning.trainer.val_check_interval=1"]
    run += ["training.params.sample_steps=2"] if "unet_config" in config["model"]["params"] else []
    assert main(run) == 2
    assert "data.params.train.params.root" in capsys.readouterr().err
    assert main([*run, f"data.params.train.params.root={tmp_path / 'mine'}"]) == 0, capsys.readouterr().err
    assert read_state(tmp_path / "c" / "last.ckpt")["global_step"] == 2
    assert (tmp_path / "c" / "samples" / "00000002.png").is_file()


def test_single_settings_replace_the_data(tmp_path, monkeypatch, capsys):
    """As docs/training.md prints them, where the published data is not; then data of another kind of model."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_image(tmp_path / "mine" / f"{i}.jpg", i)
    for name, code, message in (
        ("model_ffhq256", 0, ""),
        (
            "model_cin256",
            2,
            "data: its examples have no 'class_label', which this model is trained on; they have image",
        ),
    ):
        config = json.loads(CONFIGS[name].read_text())["config"]
        reduced = [
            text for text in overrides_of(config) if not text.startswith(("data.params.train", "data.params.val"))
        ]
        folder = {"target": "ldm.data.folder.ImageFolder", "params.root": "mine", "params.size": size_of(config)}
        data = [f"data.params.train.{key}={value}" for key, value in folder.items()]
        run = ["--base", str(shipped(name)), "-t", "-n", name, "--steps", "2", "-l", str(tmp_path), *reduced, *data]
        assert main([*run, "data.params.validation=null"]) == code
        assert message in capsys.readouterr().err


def test_a_stopped_run_ends_with_the_same_weights(home, tmp_path, monkeypatch):
    """The model has random crops, and its first batch sets the scale factor."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    config = json.loads(CONFIGS["model_cin256"].read_text())["config"]
    config["model"]["params"]["scale_by_std"] = True
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run = ["--base", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path), *overrides_of(config)]
    assert main([*run, "-n", "whole", "lightning.trainer.max_steps=3"]) == 0
    assert main([*run, "-n", "parts", "lightning.trainer.max_steps=1"]) == 0
    assert main(["--resume", str(tmp_path / "parts"), "-t", "lightning.trainer.max_steps=3"]) == 0
    whole, parts = (read_state(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert whole["model.scale_factor"] != 1.0


@pytest.mark.parametrize("workers", (0, 1))
def test_an_image_that_cannot_be_read_is_named(home, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(home)
    for name in "ab":
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(b"no image")
    config = json.loads(CONFIGS["first_stage_kl-f4"].read_text())["config"]
    config["data"]["params"]["train"] = {
        "target": "ldm.data.folder.ImageFolder",
        "params": {"root": str(tmp_path / "images"), "size": SIZE},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    argv = ["--base", str(tmp_path / "c.yaml"), "-t", "-l", str(tmp_path), *overrides_of(config)]
    assert main([*argv, f"data.params.num_workers={workers}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ".png: not an image that can be read; expected PNG" in line and "Traceback" not in line
    assert not (tmp_path / "c").exists()


def test_a_run_is_exported_and_loaded(home, tmp_path, monkeypatch):
    """The averages of the network, and the scale factor of the first batch."""
    monkeypatch.chdir(home)
    name = "lsun_churches-ldm-kl-8"
    config = json.loads(CONFIGS[name].read_text())["config"]
    argv = ["-b", str(shipped(name)), "-t", "-n", "run", "--steps", "2", "-l", str(tmp_path), *overrides_of(config)]
    assert main(argv) == 0
    assert load_script("export_model").main([str(tmp_path / "run"), "--out", str(tmp_path / "model.safetensors")]) == 0
    model = load_model(tmp_path / "run" / "config.yaml", tmp_path / "model.safetensors")
    state = read_state(tmp_path / "run" / "last.ckpt")["state_dict"]
    key = "diffusion_model.out.2.weight"
    assert torch.equal(model.scale_factor, state["model.scale_factor"]) and model.scale_factor != 1.0
    assert torch.equal(model.model.get_parameter(key), state[f"network_ema.{key.replace('.', '')}"])
    assert not torch.equal(model.model.get_parameter(key), state[f"model.model.{key}"])
