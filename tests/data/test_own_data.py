"""One's own data, without code: folders, classes, captions, COCO, databases, shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.captions import captions_below
from ldm.data.coco import CocoBoxesTrain, CocoCaptionsTrain
from ldm.data.folder import CaptionedFolder, ClassFolders, ImageFolder
from ldm.data.images import ImagePaths, array_pixels, listed
from ldm.data.inpainting import InpaintingFolder
from ldm.data.lsun import LSUNBase, LSUNChurchesTrain, LSUNChurchesValidation
from ldm.data.neighbours import QueryDataset
from ldm.data.segmentation import SegmentationFolder
from ldm.data.shards import Shards
from ldm.data.superresolution import SuperResolutionFolder
from ldm.io.files import FileError
from ldm.training.datasets import DataModuleFromConfig, data_of
from ldm.util import ConfigError
from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model


def write_image(path: Path, colour: int = 200, size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 0, 0)).save(path)
    return path


def test_a_folder_is_split_by_names(tmp_path):
    for i in range(40):
        write_image(tmp_path / f"{i % 3}" / f"{i}.png", i)
    (tmp_path / "notes.txt").write_text("no image")
    parts = [
        {Path(e["file_path_"]) for e in ImageFolder(str(tmp_path), 8, split=split, held_out=0.3)}
        for split in ("train", "validation", "all")
    ]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == parts[2] and len(parts[2]) == 40 and len(parts[1]) == 12
    example = ImageFolder(str(tmp_path), 8)[0]["image"]
    assert example.shape == (8, 8, 3) and example.dtype == np.float32 and example[..., 1].max() == -1


def test_folders_are_classes(tmp_path):
    for name in ("owl", "ape", "cat"):
        write_image(tmp_path / name / "deep" / "a.png")
    data = ClassFolders(str(tmp_path), 8)
    assert data.classes == ["ape", "cat", "owl"] and [e["class_label"] for e in data] == [0, 1, 2]
    write_image(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="stray.png: in no folder of a class"):
        ClassFolders(str(tmp_path), 8)


COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {"image_id": 7, "caption": " one "},
        {"image_id": 8, "caption": "two"},
        {"image_id": 8, "caption": "three"},
    ],
}
CAPTIONS = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": ["two", "three"]}\n',
    "manifest.jsonl": '{"file": "a.png", "prompt": "one"}\n{"file": "b.png", "prompt": ["two", "three"]}\n',
    "captions.json": json.dumps({"a.png": "one", "b.png": ["two", "three"]}),
    "coco": json.dumps(COCO),
    "b.txt": "two\n\nthree\n",
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions(kind, tmp_path):
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / kind.replace("coco", "captions.json")).write_text(CAPTIONS[kind])
    data = CaptionedFolder(str(tmp_path), 8)
    assert data.captions == [["one"], ["two", "three"]]
    torch.manual_seed(0)
    assert {data[1]["caption"] for _ in range(20)} == {"two", "three"}


def test_the_folder_of_a_run_is_its_samples_with_their_prompts(tmp_path):
    config, weights = write_model(tmp_path)
    files = ["--config", str(config), "--ckpt", str(weights), "--prompt", "an owl"]
    Script("txt2img", tmp_path, *files, "--steps=1", "--n_samples=2", "--plan=off")()
    (grid,) = (tmp_path / "out").glob("*.png")
    data = CaptionedFolder(str(tmp_path / "out"), 16)
    assert data.captions == [["an owl"]] * 2 and grid not in data.paths


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1: expected"),
        ("metadata.jsonl", '{"file_name": "c.png", "text": "x"}', r"a.png: no caption \(1 of 1 images have none\)"),
        ("captions.json", '{"a.png": 3}', "captions.json: a.png: expected a caption"),
        ("captions.json", '{"annotations": [{"image_id": 1}], "images": []}', "not COCO's captions"),
        ("other.txt", "x", "a.png: no caption .* a.txt beside it"),
    ],
)
def test_captions_that_are_missing(file, content, message, tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        CaptionedFolder(str(tmp_path), 8)


def test_no_images(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        ImageFolder(str(tmp_path / "none"), 8)
    with pytest.raises(ValueError, match="no images in this folder"):
        ImageFolder(str(tmp_path), 8)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png: not an image"):
        ImageFolder(str(tmp_path), 8)[0]


def test_a_smaller_image_fills_the_crop(tmp_path):
    paths = [write_image(tmp_path / "a.png", size=(10, 30))]
    assert ImagePaths(paths, None, 16)[0]["image"].shape == (16, 16, 3)
    assert ImagePaths(paths, 24, 16, random_crop=True)[0]["image"].shape == (16, 16, 3)


def test_coco(tmp_path):
    write_image(tmp_path / "train2017" / "a.png", size=(40, 20))
    folder = tmp_path / "annotations"
    folder.mkdir()
    image = {"id": 7, "file_name": "a.png", "width": 40, "height": 20}
    (folder / "captions_train2017.json").write_text(
        json.dumps({"images": [image], "annotations": [{"image_id": 7, "caption": "x"}]})
    )
    assert CocoCaptionsTrain(8, str(tmp_path))[0]["caption"] == "x"
    categories = [{"id": i, "name": name} for i, name in ((2, "bus"), (10, "dog"), (183, "other"))]
    for kind, id_ in (("instances", 2), ("stuff", 183)):
        notes = [{"image_id": 7, "category_id": id_, "bbox": [10, 5, 20, 10], "iscrowd": 0}]
        content = {"images": [image], "annotations": notes, "categories": categories}
        (folder / f"{kind}_train2017.json").write_text(json.dumps(content))
    data = CocoBoxesTrain(8, str(tmp_path), random_flip=False, random_crop=False, no_tokens=101)
    tokens = data[0]["coordinates_bbox"]
    # "10" comes before "2"; the grid has 10 points a side; the square in the middle is half of the image
    assert tokens[:4].tolist() == [1, 22, 77, 100] and len(tokens) == 92
    assert tokens[-2:].tolist() == [2, 97]
    assert data[0]["objects_center_points"][:2].tolist() == [1, 44]


def test_a_database_of_lsun(tmp_path):
    with lmdb.open(str(tmp_path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for i in range(3):
            transaction.put(f"{i}".encode(), write_image(tmp_path / "x" / "a.webp", 80 * i).read_bytes())
    data = LSUNBase("", str(tmp_path), 8, flip_p=0.0)
    assert len(data) == 3 and [round((e["image"][0, 0, 0] + 1) * 127.5, -1) for e in data] == [0, 80, 160]


def write_database(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image = write_image(folder / "x.webp").read_bytes()
    with lmdb.open(str(folder), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for i in range(count):
            transaction.put(f"{i}".encode(), image)


def test_databases_of_lsun_are_found_and_read_by_several_datasets_and_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_database(Path("data/lsun/church_outdoor_train_lmdb"), 3)
    write_database(Path("data/lsun/church_outdoor_val_lmdb"), 1)
    train, again, held_out = LSUNChurchesTrain(size=8), LSUNChurchesTrain(size=8), LSUNChurchesValidation(size=8)
    assert len(train) == len([*again]) == 3 and len(held_out) == 1
    assert len([*DataLoader(train, 1, num_workers=1)]) == 3


def test_semantic_maps(tmp_path):
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "segmentations").mkdir()
    levels = np.zeros((20, 24), np.uint8)
    levels[:, 12:] = 5
    Image.fromarray(levels).save(tmp_path / "segmentations" / "a.png")
    example = SegmentationFolder(str(tmp_path), 10, 8, classes=6)[0]["segmentation"]
    assert example.shape == (8, 8, 6) and example[..., 0].sum() + example[..., 5].sum() == 64 and example.max() == 1
    with pytest.raises(ValueError, match=r"a.png: class 5; expected 0..3"):
        SegmentationFolder(str(tmp_path), 10, 8, classes=4)[0]
    write_image(tmp_path / "images" / "b.jpg")
    with pytest.raises(ValueError, match="b.jpg: no semantic map"):
        SegmentationFolder(str(tmp_path), 10, 8)


def test_masked_images(tmp_path):
    write_image(tmp_path / "a.png")
    example = InpaintingFolder(str(tmp_path), 16)[0]
    hidden = example["mask"][..., 0] > 0
    assert 0 < hidden.mean() < 1
    assert (example["masked_image"][hidden] == -1).all()
    assert (example["masked_image"][~hidden] == example["image"][~hidden]).all()


def test_shards(tmp_path):
    pixels = write_image(tmp_path / "a.png").read_bytes()
    with webdataset.TarWriter(str(tmp_path / "000.tar")) as shard:
        for i in range(3):
            shard.write({"__key__": f"{i}", "png": pixels, "txt": f"caption {i}"})
    examples = list(Shards(str(tmp_path / "{000..000}.tar"), 8, shuffle=0))
    assert sorted(e["caption"] for e in examples) == ["caption 0", "caption 1", "caption 2"]
    assert examples[0]["image"].shape == (8, 8, 3)
    with pytest.raises(ValueError, match="no such file"):
        Shards(str(tmp_path / "none.tar"), 8)


def shards(folder: Path, **params: Any) -> Shards:
    """Three files of four examples each, whose captions are file and place."""
    pixels = write_image(folder / "a.png").read_bytes()
    for n in range(3):
        with webdataset.TarWriter(str(folder / f"{n}.tar")) as file:
            for i in range(4):
                file.write({"__key__": f"{i}", "png": pixels, "txt": f"{n}.{i}"})
    return Shards(str(folder / "{0..2}.tar"), 8, **params)


def test_processes_read_files_of_their_own_and_as_many_examples(tmp_path, monkeypatch):
    data = shards(tmp_path, epoch=12)
    found = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found.append([example["caption"] for example in data])
    assert [len(captions) for captions in found] == [6, 6]
    assert not {*found[0]} & {*found[1]} and len({*found[0]} | {*found[1]}) > 8
    monkeypatch.setenv("NUM_WORKERS", "2")
    monkeypatch.setenv("WORKER", "0")
    with pytest.raises(ValueError, match="urls: 3 files are fewer than the 2 processes x 2 workers"):
        iter(data)
    data.epoch = None
    with pytest.raises(ValueError, match="epoch: 2 processes train together"):
        iter(data)


def test_each_epoch_of_shards_has_another_order_also_with_workers(tmp_path):
    shards(tmp_path)
    section = {"target": "ldm.data.shards.Shards", "params": {"urls": str(tmp_path / "{0..2}.tar"), "size": 8}}
    orders = []
    for workers in (0, 1):
        params = {"batch_size": 4, "num_workers": workers, "train": section}
        made = data_of({"target": "main.DataModuleFromConfig", "params": params}, seed=3)
        made.setup("fit")
        loader = made.train_dataloader()
        orders += [[batch["caption"] for batch in loader] for _ in range(2)]
    assert orders[0] != orders[1] and orders[:2] == orders[2:]


def test_addresses_of_shards_run_no_command(tmp_path):
    for address in (f"pipe:touch {tmp_path}/made", f"{tmp_path}/a.tar::PIPE:touch {tmp_path}/made", "scp://a/b.tar"):
        with pytest.raises(ValueError, match="accepted: paths, and addresses of http, https"):
            next(iter(Shards(address, 8, shuffle=0)), None)
    assert not (tmp_path / "made").exists()


def test_squares_for_superresolution_have_a_size(tmp_path):
    write_image(tmp_path / "a.png", size=(1, 1))
    data = SuperResolutionFolder(str(tmp_path), 8, degradation="pil_nearest", min_crop_f=0.1)
    assert data[0]["image"].shape == (8, 8, 3) and data[0]["LR_image"].shape == (2, 2, 3)
    for low, high in ((0.0, 1.0), (0.9, 0.5)):
        with pytest.raises(ValueError, match="min_crop_f: .* does not lie in"):
            SuperResolutionFolder(str(tmp_path), 8, min_crop_f=low, max_crop_f=high)


# Data modules


def module(root: Path, **params: Any) -> DataModuleFromConfig:
    section = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(root), "size": 8, "random_crop": True}}
    made = data_of({"target": "main.DataModuleFromConfig", "params": {"train": section, **params}}, seed=3)
    made.setup("fit")
    return made


def test_workers_change_no_result(tmp_path):
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
    found = [
        [batch["image"] for batch in module(tmp_path, batch_size=2, num_workers=workers).train_dataloader()]
        for workers in (0, 1)
    ]
    assert found[0][0].shape == (2, 3, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_validation_sees_the_same_crops_again(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / "0.png")
    section = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(tmp_path), "size": 8}}
    section["params"] |= {"random_crop": True, "flip": 0.5}
    loader = module(tmp_path, batch_size=1, num_workers=0, validation=section).val_dataloader()
    first, second = (next(iter(loader))["image"] for _ in range(2))
    assert torch.equal(first, second)


OWN = """
import torch
from torch.utils.data import Dataset

class Ones(Dataset):
    def __init__(self, count: int = 4):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"image": torch.ones(8, 6, 3)}

def function():
    pass
"""


def test_a_dataset_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own_data.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    section = {
        "target": "my_own_data.Ones",
        "params": {"batch_size": 2, "num_workers": 0, "count": 2, "train": {"target": "x"}},
    }
    with pytest.raises(ConfigError, match="my_own_data.Ones' is outside the allowed packages"):
        data_of(section, seed=0)
    made = data_of(section, seed=0, allow=["my_own_data"])
    made.setup("fit")
    (batch,) = made.train_dataloader()
    assert batch["image"].shape == (2, 3, 8, 6) and made.val_dataloader() == []
    assert "data.params: train of the configuration: not used" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="neither a LightningDataModule nor a Dataset"):
        data_of({"target": "my_own_data.function"}, seed=0, allow=["my_own_data"])


def test_a_data_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="train: expected target and params"):
        DataModuleFromConfig(batch_size=1)
    with pytest.raises(ValueError, match=r"data.params.train: .*none: no such folder"):
        module(tmp_path / "none", batch_size=1)


def test_neighbours_belong_to_the_dataset(tmp_path):
    section = {"target": "ldm.data.folder.ImageFolder", "params": {"root": str(tmp_path), "size": 8}}
    for name in "ab":
        write_image(tmp_path / f"{name}.png")
    embeddings = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    np.savez(tmp_path / "nns.npz", nn_embeddings=embeddings)
    example = QueryDataset(section, str(tmp_path / "nns.npz"), k=2)[1]
    assert example["nn_embeddings"].tolist() == embeddings[1, :2].tolist() and example["image"].shape == (8, 8, 3)
    np.savez(tmp_path / "other.npz", nn_embeddings=embeddings[:1])
    np.savez(tmp_path / "unnamed.npz", embeddings)
    (tmp_path / "text.npz").write_text("no archive")
    for file, k, message in (
        ("unnamed.npz", 1, "has no array nn_embeddings"),
        ("text.npz", 1, "nns: .*text.npz: File is not a zip file"),
        ("nns.npz", 4, r"expected \(2 images, 4 or more, D\)"),
        ("other.npz", 1, r"\(1, 3, 4\); expected \(2 images"),
        ("none.npz", 1, "no file"),
    ):
        with pytest.raises(ValueError, match=message):
            QueryDataset(section, str(tmp_path / file), k=k)


def test_lists_and_captions_are_read_as_other_systems_write_them(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa.png\r\nb.png\r\n".encode())
    assert listed(tmp_path / "list.txt", tmp_path) == [tmp_path / "a.png", tmp_path / "b.png"]
    (tmp_path / "a.txt").write_bytes("\ufeffan owl\u2028by night\r\n".encode())
    assert captions_below(tmp_path, [tmp_path / "a.png"]) == {tmp_path / "a.png": ["an owl\u2028by night"]}


@pytest.mark.parametrize("content", [b"", b"no array", np.zeros((2, 3, 4, 4), np.uint8), np.zeros((1, 3, 4, 4))])
def test_arrays_that_are_no_image_are_refused_by_name(tmp_path, content):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4))
    assert array_pixels(path)[1, 2].tolist() == [6, 22, 38]
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(FileError, match="a.npy: "):
        array_pixels(path)
