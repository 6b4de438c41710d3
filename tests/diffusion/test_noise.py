from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.models.diffusion.schedule import ImageNoise

KNOWN = [-0.1917676, -0.7883030, 1.4104905, -0.1767905]
SEEDS = [(42, 0, 0), (42, 0, 1), (42, 1, 0), (7, 0, 0)]


@given(order=st.permutations(range(4)), i=st.integers(0, 1000))
def test_noise_does_not_depend_on_the_batch_or_the_place_in_it(order, i):
    together, x = ImageNoise([SEEDS[k] for k in order]), torch.zeros(4, 2, 3, 3)
    for place, k in enumerate(order):
        alone = ImageNoise([SEEDS[k]])
        assert torch.equal(together.start((2, 3, 3))[place], alone.start((2, 3, 3))[0])
        assert torch.equal(together.node(i, x)[place], alone.node(i, x[:1])[0])


def test_images_and_nodes_draw_independently():
    noise, x = ImageNoise(SEEDS), torch.zeros(4, 1, 64, 64)
    draws = torch.cat([noise.start((1, 64, 64)), noise.node(0, x), noise.node(1, x)]).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(12)
    assert correlation.abs().max() < 0.08  # 5 standard deviations at 4096 values
    assert abs(draws.mean()) < 0.02 and abs(draws.std() - 1) < 0.02


def test_seeds_of_different_lengths_are_different():
    draws = ImageNoise([(1,), (1, 0), (1, 0, 0), (0, 1), (1, 1)]).start((4,))
    assert len({tuple(draw.tolist()) for draw in draws}) == 5


def test_drawing_twice_gives_the_same_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise = ImageNoise(SEEDS)
    assert torch.equal(noise.start((3, 2, 2)), noise.start((3, 2, 2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_known_values():
    """The pictures of a seed stay the same from version to version."""
    values = ImageNoise([(42, 0, 0)]).start((4,))[0]
    torch.testing.assert_close(values, torch.tensor(KNOWN), rtol=0, atol=1e-6)


def test_noise_follows_dtype_and_checks_its_input():
    assert ImageNoise([(1,)]).node(0, torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="expected 4 images"):
        ImageNoise(SEEDS).node(0, torch.zeros(3, 1))
    for seeds in ([], [()], [(-1,)], [(2**32,)]):
        with pytest.raises(ValueError, match="seeds"):
            ImageNoise(seeds)
