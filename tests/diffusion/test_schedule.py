"""Timesteps and noise levels; noise that belongs to an image."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.schedule import ImageNoise, ddim_nodes, ddim_sigma, ddim_timesteps, diffuse, predict_x0
from ldm.modules.diffusionmodules.util import make_beta_schedule
from tests.helpers.goldens import load_case

BETAS, BETA_TENSORS = load_case("noise_schedules")
GRIDS, GRID_TENSORS = load_case("ddim_parameters")
ULP = 2.0**-23


@pytest.mark.parametrize("name", BETAS["configs"])
def test_published_betas(name):
    config = BETAS["configs"][name]
    betas = make_beta_schedule(config["schedule"], config["n"], config["linear_start"], config["linear_end"])
    np.testing.assert_allclose(betas, BETA_TENSORS[f"{name}.betas_f64"], rtol=0, atol=1e-14)
    if (abar := BETA_TENSORS.get(f"{name}.alphas_cumprod_f64")) is not None:
        np.testing.assert_allclose(np.cumprod(1 - betas), abar, rtol=0, atol=1e-14)


@pytest.mark.parametrize("parameterization, v_posterior", [("eps", 0.0), ("eps", 0.5), ("x0", 0.0), ("x0", 0.5)])
def test_published_buffers(parameterization, v_posterior):
    model = DDPM(
        {"target": "torch.nn.Identity"},
        linear_start=0.00085,
        linear_end=0.012,
        use_ema=False,
        parameterization=parameterization,
        v_posterior=v_posterior,
    )
    prefix = f"ddpm_{parameterization}_vpost{v_posterior}."
    stored = {key.removeprefix(prefix): value for key, value in BETA_TENSORS.items() if key.startswith(prefix)}
    assert stored
    for name, expected in stored.items():
        torch.testing.assert_close(getattr(model, name), expected, rtol=ULP, atol=0)


@pytest.mark.parametrize("name", GRIDS["lengths"])
def test_published_timestep_grid(name):
    method, steps = name.split("_")
    expected = GRID_TENSORS[f"{name}.timesteps"]
    overruns = int(expected[-1]) >= 1000
    assert overruns == (name in ("uniform_333", "uniform_1000"))
    grid = ddim_timesteps(int(steps), 1000, method)
    assert list(grid) == (expected - int(overruns)).tolist()  # the grid that the published code cannot run


@pytest.mark.parametrize("name", [key.removesuffix(".alphas") for key in GRID_TENSORS if key.endswith(".alphas")])
def test_published_levels(name):
    method, steps = name.removeprefix("ldm_").split("_")
    start, end = (0.0015, 0.0195) if name.startswith("ldm_") else (0.00085, 0.012)
    abar = torch.from_numpy(np.cumprod(1 - make_beta_schedule("linear", 1000, start, end))).float()
    nodes = ddim_nodes(abar, ddim_timesteps(int(steps), 1000, method))[::-1]
    levels = {
        "alphas": [n.abar for n in nodes],
        "alphas_prev": [n.abar_next for n in nodes],
        "sqrt_one_minus_alphas": [(1 - n.abar) ** 0.5 for n in nodes],
    }
    levels |= {f"eta{eta}.sigmas": [ddim_sigma(n, eta) for n in nodes] for eta in (0.0, 0.5, 1.0)}
    for key, values in levels.items():
        if (expected := GRID_TENSORS.get(f"{name}.{key}")) is not None:
            torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-6, atol=2e-7)


@given(total=st.integers(1, 300), data=st.data(), method=st.sampled_from(["uniform", "quad"]))
def test_a_grid_can_always_be_run(total, data, method):
    steps = data.draw(st.integers(1, total))
    grid = ddim_timesteps(steps, total, method)
    assert 0 <= grid[0] and grid[-1] < total and len(grid) >= steps
    assert list(grid) == sorted(grid)
    nodes = ddim_nodes(torch.linspace(0.999, 0.01, total), grid)
    assert [n.t for n in nodes] == sorted(grid, reverse=True)
    assert all(a.abar_next == b.abar for a, b in pairwise(nodes))


@pytest.mark.parametrize(
    "steps, method, why",
    [(0, "uniform", "1..1000"), (1001, "uniform", "1..1000"), (-5, "quad", "1..1000"), (10, "linear", "'quad'")],
)
def test_bad_grids_say_why(steps, method, why):
    with pytest.raises(ValueError, match=why):
        ddim_timesteps(steps, 1000, method)


def test_levels_and_back():
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for abar in (1.0, 0.5, 0.005):
        torch.testing.assert_close(predict_x0(diffuse(x0, eps, abar), eps, abar), x0)


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
    """The images of a seed stay the same from version to version."""
    values = ImageNoise([(42, 0, 0)]).start((4,))[0]
    torch.testing.assert_close(values, torch.tensor(KNOWN), rtol=0, atol=1e-6)


def test_noise_follows_dtype_and_checks_its_input():
    assert ImageNoise([(1,)]).node(0, torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match="expected 4 images"):
        ImageNoise(SEEDS).node(0, torch.zeros(3, 1))
    for seeds in ([], [()], [(-1,)], [(2**32,)]):
        with pytest.raises(ValueError, match="seeds"):
            ImageNoise(seeds)
