"""Images for control networks against the published preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.checkpoint import CheckpointError
from ldm.checkpoint.detectors import load_hed, load_midas
from ldm.data.conditions import as_hint, depth, edge_scores, edges, resized, ridges, scribble, soft_edges
from ldm.modules.hed import HED
from tests.helpers.goldens import assert_golden, load_case, recipe_tensor


@pytest.mark.parametrize("key", ["0", "1"])
def test_edges_and_sizes_are_exactly_the_published_ones(key):
    _, tensors = load_case("condition_canny")
    square = Image.fromarray(tensors[f"{key}.square"].numpy())
    assert np.array_equal(edges(square), tensors[f"{key}.canny"])
    image = Image.fromarray(tensors[f"{key}.image"].numpy())
    assert np.array_equal(resized(image, 64), tensors[f"{key}.resize_image_64"])
    hint = as_hint(edges(square))
    assert hint.shape == (3, *tensors[f"{key}.canny"].shape)
    assert torch.equal(hint[1] * 255, tensors[f"{key}.canny"].float())


def test_scribbles_are_the_published_ones():
    _, tensors = load_case("condition_scribble")
    soft = tensors["edge_map"].numpy()
    assert np.array_equal(ridges(soft), tensors["nms"])
    assert np.array_equal(scribble(Image.fromarray(soft)), tensors["scribble"])


def test_hed_gives_the_published_scores(tmp_path):
    case, tensors = load_case("condition_hed")
    path, recipe = tmp_path / "hed.safetensors", case["weight_recipe"]
    weights = {key: recipe_tensor(key, shape, **recipe) for key, (shape, _) in case["weights"].items()}
    save_file({key.replace("net", "module", 1): value for key, value in weights.items()}, path)
    image, older = tensors["image"].permute(2, 0, 1)[None].float(), load_hed(path)
    for i, score in enumerate(older.scores(image)):
        assert_golden(score, tensors[f"score.{i}"], case)
    assert_golden(older(image), tensors["edge"], case)
    soft = soft_edges(Image.fromarray(tensors["image"].numpy()), older)
    assert np.abs(np.asarray(soft).astype(int) - tensors["edge_uint8"].numpy()).max() <= 1
    with torch.device("meta"):
        later = {key: list(value.shape) for key, value in HED(False).state_dict().items()}
    assert later == {key: shape for key, (shape, _) in case["apache"]["weights"].items()}
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not HED"):
        load_hed(path)
    with pytest.raises(CheckpointError, match="not MiDaS"):
        load_midas(path)


def test_depth_is_from_black_to_white():
    ramp = torch.linspace(3, 7, 16).repeat(16, 1)[None, None]
    picture = np.asarray(depth(Image.new("RGB", (32, 32)), lambda image: ramp))
    assert picture.shape == (32, 32) and picture[:, 0].max() == 0 and picture[:, -1].min() == 255


def test_edges_are_scored_on_both_sides():
    line, near, far = (np.zeros((9, 9), np.uint8) for _ in range(3))
    line[:, 3], near[:, 4], far[:, 6] = 1, 1, 1
    assert edge_scores(line, line) == (1, 1, 1) == edge_scores(line, near)
    assert edge_scores(line, far) == (0, 0, 0) == edge_scores(line, far * 0)
    assert edge_scores(line, line | far) == pytest.approx((0.5, 1, 2 / 3))
