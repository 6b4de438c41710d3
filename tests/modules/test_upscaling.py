"""Noise augmentation of a condition."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.upscaling import CLIPEmbeddingNoiseAugmentation, ImageConcatWithNoiseAugmentation
from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.helpers.goldens import assert_golden, load_case

LINEAR = {"linear_start": 0.0001, "linear_end": 0.02}


def test_golden():
    case, tensors = load_case("upscaler_noise_aug")
    augment = ImageConcatWithNoiseAugmentation(LINEAR)
    noised, level = augment(tensors["x"], tensors["noise_level"], tensors["noise"])
    assert_golden(noised, tensors["out"], case)
    assert torch.equal(level, tensors["noise_level"])


def test_random_levels_stay_below_the_highest():
    augment = ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=3)
    _, levels = augment(torch.zeros(200, 1, 1, 1))
    assert set(levels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "level, why",
    [
        (torch.tensor([350]), "in 0..349"),
        (torch.tensor([-1]), "in 0..349"),
        (torch.tensor([1, 2]), "shape"),
        (torch.tensor([1.0]), "integers"),
    ],
)
def test_bad_levels_say_why(level, why):
    with pytest.raises(ValueError, match=why):
        ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=350)(torch.zeros(1, 3, 4, 4), level)


@pytest.mark.parametrize("highest", [0, 1001])
def test_bad_highest_level_says_why(highest):
    with pytest.raises(ValueError, match="max_noise_level must be in 1..1000"):
        ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=highest)


def test_an_embedding_is_noised_in_units_of_its_spread(tmp_path):
    """What is noised has mean 0 and deviation 1; the result is in the embeddings' own units again."""
    mean, std = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    torch.save((mean, std), tmp_path / "stats.th")
    settings = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    augment = CLIPEmbeddingNoiseAugmentation(settings, timestep_dim=2, clip_stats_path=tmp_path / "stats.th")
    plain = CLIPEmbeddingNoiseAugmentation(settings, timestep_dim=2)
    x, noise, level = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 500, 999])
    noised, embedded = augment(x, level, noise)
    torch.testing.assert_close((noised - mean) / std, plain((x - mean) / std, level, noise)[0])
    torch.testing.assert_close(noised[0], x[0], atol=0.1, rtol=0)
    torch.testing.assert_close(((noised - mean) / std)[2], noise[2], atol=0.05, rtol=0)
    assert torch.equal(embedded, timestep_embedding(level, 2))


@pytest.mark.parametrize("content", [None, torch.zeros(2), (torch.zeros(3), torch.ones(3)), b"damaged"])
def test_bad_statistics_are_named(tmp_path, content):
    path = tmp_path / "stats.th"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match="clip_stats_path"):
        CLIPEmbeddingNoiseAugmentation(LINEAR, timestep_dim=2, clip_stats_path=path)
