from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.schedule import ddim_nodes, ddim_sigma, ddim_timesteps, diffuse, predict_x0
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
