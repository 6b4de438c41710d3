"""What is done to images, boxes and low-resolution images, held to published numbers."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import degradation, superresolution
from ldm.data import images as of_images
from ldm.data.boxes import WHOLE, LabelledBox, Tokens
from ldm.data.degradation import FULL, LIGHT, Draws, bsrgan
from ldm.data.imagenet import ImageNetSRTrain, ImageNetTrain
from ldm.data.images import ImagePaths
from ldm.data.lsun import LSUNBase
from ldm.data.superresolution import SuperResolution
from tests.helpers.goldens import load_case


def assert_near(found: np.ndarray, expected: torch.Tensor, case: dict) -> None:
    difference = np.abs(found - expected.numpy())
    assert difference.max() <= case["tolerance"]["atol"] and difference.mean() <= case["tolerance"]["mean_abs"]


@pytest.mark.parametrize("i", range(4))
def test_images_golden(i, tmp_path):
    case, tensors = load_case("dataset_pictures")
    Image.fromarray(tensors[f"{i}.input"].numpy()).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    centre = ImagePaths([tmp_path / "a.png"], case["size"])[0]["image"]
    assert_near(centre, tensors[f"{i}.center"], case)
    lsun = LSUNBase(str(tmp_path / "list.txt"), str(tmp_path), case["size"], flip_p=0.0)[0]["image"]
    assert_near(lsun, tensors[f"{i}.lsun"], case)


class NoFiles(SuperResolution):
    def files(self):
        return []


def test_superresolution_golden(monkeypatch):
    case, tensors = load_case("dataset_sr")
    for name, drawn in case["draws"].items():
        place, _, kind = name.partition(".")
        shares = iter([drawn["uniform"]])
        monkeypatch.setattr(superresolution, "uniform", lambda low, high, shares=shares: next(shares))
        python = random.Random(case["seed"])
        python.random()  # whether to crop at all; the case lists this one and the next as h_start and w_start
        starts = iter([python.random(), python.random()])
        monkeypatch.setattr(of_images, "uniform", lambda starts=starts: next(starts))
        data = NoFiles(case["size"], kind, case["downscale_f"], random_crop=place == "random")
        image, small = (of_images.in_range(x) for x in data.pair(tensors["input"].numpy()))
        if f"{name}.image" in tensors:
            assert_near(image, tensors[f"{name}.image"], case)
        assert_near(small, tensors[f"{name}.LR_image"], case)


@pytest.mark.parametrize("name", ("dataset_layout_tokens", "dataset_layout_tokens_small"))
def test_boxes_golden(name):
    case, tensors = load_case(name)
    for i, one in enumerate(case["cases"]):
        boxes = [LabelledBox(tuple(a["bbox"]), a["category_no"], a["is_group_of"]) for a in one["annotations"]]
        random.Random(case["seed"] + i).shuffle(boxes)
        builder = Tokens(
            one["kind"], case["no_object_classes"], case["no_tokens"], case["max_objects"], one["encode_crop"]
        )
        found = builder.sequence(boxes, tuple(one["crop"] or WHOLE), one["horizontal_flip"])
        assert found.tolist() == tensors[f"{i}.tokens"].tolist(), (i, one["kind"])


def test_blur_kernels_golden():
    case, tensors = load_case("degrade_kernels")
    tolerance = case["tolerance"]
    found = {}
    for i, k in enumerate(case["aniso"]):
        found[f"aniso.{i}"] = degradation.anisotropic_kernel(k["ksize"], k["theta"], k["l1"], k["l2"])
    for i, k in enumerate(case["fspecial"]):
        found[f"fspecial.{i}"] = degradation.gaussian_kernel(k["hsize"], k["sigma"])
    for i, k in enumerate(case["shifted"]):
        found[f"shifted.{i}"] = degradation.shifted_kernel(degradation.gaussian_kernel(25, k["sigma"]), k["sf"])
    for name, kernel in found.items():
        np.testing.assert_allclose(kernel, tensors[name].numpy(), tolerance["rtol"], tolerance["atol"], err_msg=name)


def test_pieces_golden():
    case, tensors = load_case("degrade_pieces")
    t = {name: tensor.numpy() for name, tensor in tensors.items()}
    image, levels = t["image"], (t["image"] * 255).round().astype(np.uint8)
    found = {
        "blur": degradation.convolve(image, t["kernel"]),
        "blur_even": degradation.convolve(image, t["kernel_even"]),
        "strided.2": image[::2, ::2],
        "imresize_half": degradation.imresize(image, 0.5),
        "imresize_quarter": degradation.imresize(image, 0.25),
        "imresize_x2": degradation.imresize(image, 2.0),
    }
    for kind, size in case["sizes_wh"].items():
        for name in ("linear", "cubic", "area"):
            found[f"cv2.{kind}.{name}"] = degradation.resize(image, *size, f"INTER_{name.upper()}")
        for name, (_, flag) in zip(
            ("nearest", "linear", "cubic", "area", "lanczos"), degradation.CV_FILTERS.items(), strict=True
        ):
            found[f"cv2u8.{kind}.{name}"] = degradation.resize(levels, *size, flag)
    for name in degradation.PIL_FILTERS:
        size = t["pil.quarter.nearest"].shape[1::-1]
        by = Image.Resampling[name.upper()]
        found[f"pil.quarter.{name}"] = np.asarray(Image.fromarray(levels).resize(size, by))
    for name, value in found.items():
        atol = case["tolerance"]["uint8_atol"] if t[name].dtype == np.uint8 else case["tolerance"]["atol"]
        np.testing.assert_allclose(
            value.astype(np.float64), t[name].astype(np.float64), case["tolerance"]["rtol"], atol, err_msg=name
        )


STEPS = {
    "resize": "random_resize",
    "add_blur": "add_blur",
    "add_Gaussian_noise": "add_noise",
    "add_JPEG_noise": "add_jpeg",
}


@pytest.mark.parametrize("name, strength", [("degrade_bsrgan_seeded", FULL), ("degrade_bsrgan_light_seeded", LIGHT)])
def test_bsrgan_golden(name, strength, monkeypatch):
    """Each step, given what the step before it returned there, and the whole."""
    case, tensors = load_case(name)
    stored: list[np.ndarray] = []  # results of the steps of this run, in their order
    made: list[tuple[str, np.ndarray]] = []
    for ours in STEPS.values():
        real = getattr(degradation, ours)

        def step(image, *rest, real=real, ours=ours):
            result = real(image, *rest)
            made.append((ours, result))
            return stored[len(made) - 1]

        monkeypatch.setattr(degradation, ours, step)
    for number, run in enumerate(case["runs"]):
        names = sorted(
            (key for key in tensors if key.startswith(f"{number}.step.")), key=lambda key: int(key.split(".")[2])
        )
        kinds = [STEPS.get(key.split(".")[3]) for key in names]
        stored[:] = [tensors[key].numpy() for key, kind in zip(names, kinds, strict=True) if kind]
        made.clear()
        out = bsrgan(tensors[f"{number}.image"].numpy(), Draws.seeded(run["seed"]), strength)
        assert [kind for kind, _ in made] == [kind for kind in kinds if kind], run["seed"]
        for (kind, result), expected in zip(made, stored, strict=True):
            if kind == "add_jpeg":
                assert np.abs(result - expected).mean() < 1.5 / 255
            else:
                np.testing.assert_allclose(np.clip(result, 0, 1), np.clip(expected, 0, 1), 0, 2e-5, err_msg=kind)
        difference = np.abs(out.astype(float) - tensors[f"{number}.out"].numpy())
        assert difference.mean() < case["tolerance"]["out_mean_abs_uint8"]


# ImageNet


@pytest.fixture
def imagenet(tmp_path, monkeypatch) -> Path:
    """Four classes of two images each; the working folder."""
    for n in range(4):
        for i in range(2):
            path = tmp_path / "set" / "ILSVRC2012_train" / "data" / f"n0000000{n}" / f"n0000000{n}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12)).save(path)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "original, used, labels",
    [(False, None, [0, 0, 1, 1, 2, 2, 3, 3]), (False, "1-2, 3", [0, 0, 1, 1]), (True, "1-2, 3", [1, 1, 3, 3])],
)
def test_some_classes_of_imagenet(imagenet, original, used, labels):
    config = {"size": 8, "sub_indices": used, "keep_orig_class_label": original}
    data = ImageNetTrain(config, data_root="set")
    assert [data[i]["class_label"] for i in range(len(data))] == labels
    for wrong in ("1-x", "4", "2-1"):
        with pytest.raises(ValueError, match="config: sub_indices: "):
            ImageNetTrain({"sub_indices": wrong}, data_root="set")


def test_large_images_of_imagenet_are_listed(imagenet, capsys):
    listed = imagenet / "data" / "imagenet_train_hr_indices.p"
    assert len(ImageNetSRTrain(8, "pil_nearest", "set")) == 8
    listed.write_bytes(pickle.dumps([1, 6]))
    data = ImageNetSRTrain(8, "pil_nearest", "set")
    assert [path.name for path in data.paths] == ["n00000000_1.JPEG", "n00000003_0.JPEG"]
    assert "2 of 8 images are used" in capsys.readouterr().out
    for content, why in ((pickle.dumps([8]), "of 0 to 7"), (b"", ""), (pickle.dumps(Path("x")), "asks for pathlib")):
        listed.write_bytes(content)
        with pytest.raises(ValueError, match=f"hr_indices.p: not a list of indices: .*{why}"):
            ImageNetSRTrain(8, "pil_nearest", "set")
