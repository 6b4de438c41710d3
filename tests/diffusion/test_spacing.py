"""Where the steps of a run begin: spacings by name, for every solver, and timesteps of a user's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import (
    CLEAN,
    SPACINGS,
    ddim_timesteps,
    karras_levels,
    levels_at,
    log_snr,
    noise_ratio,
    sigma_levels,
    spaced_levels,
)
from ldm.models.diffusion.solvers.registry import SOLVERS, levels_of, solver
from ldm.sampling.engine import Recipe
from tests.helpers.golden_sampler import SHAPE, model
from tests.helpers.toy import ABAR, node_noise

MEASURES = {
    "time": lambda level: level.t + 1,
    "quad": lambda level: (level.t + 1) ** 0.5,
    "logsnr": lambda level: log_snr(level.abar),
    "karras": lambda level: noise_ratio(level.abar) ** (1 / 7),
}
OWN = (981, 700, 420, 301, 55, 7)
SAMPLERS = (DDIMSampler, PLMSSampler, DPMSolverSampler)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("clean", [False, True])
def test_levels_are_even_in_the_measure_that_the_spacing_names(spacing, clean):
    levels = spaced_levels(ABAR, 8, spacing, clean)
    assert len(levels) == 9 and (levels[-1] == CLEAN) is clean
    trained = levels[:-1] if clean else levels
    assert trained[0].t == 999 and trained[-1].t == pytest.approx(0, abs=1e-9)
    gaps = torch.tensor([MEASURES[spacing](level) for level in trained], dtype=torch.float64).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(len(gaps)), rtol=1e-6, atol=0)
    assert spaced_levels(ABAR, 1, spacing, clean)[0].t == 999


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_every_spacing(name):
    """All but those that have a spacing in their name; the steps are as many, and go down."""
    spacings = [spacing for spacing in SPACINGS if spacing in SOLVERS[name].spacings.grids]
    named = {"dpm++2m-karras": ["karras"], "euler-trailing": ["trailing"]}
    spacings = [*SOLVERS[name].spacings.grids] if name in named else spacings
    assert spacings == named.get(name, [*SPACINGS])
    grids = [levels_of(name, ABAR, 10, spacing) for spacing in spacings]
    assert len(set(grids)) == len(spacings)
    for levels in grids:
        assert len(levels) == 11 and all(a.abar < b.abar for a, b in pairwise(levels))
    usual = SOLVERS[name].spacing or SOLVERS[name].spacings.published
    assert levels_of(name, ABAR, 10) == levels_of(name, ABAR, 10, usual)


def test_published_grids_are_kept_under_their_spacing():
    assert [level.t for level in levels_of("ddim", ABAR, 10, "time")] == [*range(901, 0, -100), 0]
    assert levels_of("heun", ABAR, 10, "time") == sigma_levels(ABAR, 10)
    assert levels_of("dpm++2m-karras", ABAR, 10) == karras_levels(ABAR, 10)


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_timesteps_of_ones_own(name):
    levels = levels_of(name, ABAR, len(OWN), timesteps_at=OWN)
    assert [(level.t, level.abar) for level in levels[:-1]] == [(t, float(ABAR[t])) for t in OWN]
    assert levels[-1] == (CLEAN if SOLVERS[name].spacings.clean else (0, float(ABAR[0])))
    rule = solver(name, ABAR, len(OWN), noise=node_noise, timesteps_at=OWN)
    assert [node.t for node in rule.nodes if node.abar != node.abar_next] == [*OWN]


def test_the_published_timesteps_as_ones_own_are_the_published_run():
    timesteps = ddim_timesteps(10)[::-1]
    for name in ("ddim", "plms", "ddpm"):
        own = solver(name, ABAR, 10, noise=node_noise, timesteps_at=timesteps)
        assert own == solver(name, ABAR, 10, noise=node_noise)


def few_latents(sampler, steps: int, **given):
    c = torch.ones(1, 5, model().model.diffusion_model.context_dim)
    x_T = torch.ones(1, *SHAPE)
    return sampler.sample(steps, 1, SHAPE, c, x_T=x_T, verbose=False, **given)[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("where", [{"spacing": "karras"}, {"timesteps_at": OWN}], ids=["spacing", "own"])
def test_the_published_classes_take_both(sampler, where):
    made = few_latents(sampler(model()), 6, **where)
    rule = solver(sampler.solver, model().alphas_cumprod, 6, **where)
    denoiser = model().denoiser(torch.ones(1, 5, 24))
    *_, last = denoise(denoiser, rule, load_plan("off", len(rule.nodes)), torch.ones(1, *SHAPE))
    assert torch.equal(made, last.x)
    assert not torch.equal(made, few_latents(sampler(model()), 6))


def test_ddim_methods_follow_the_schedule_that_was_made():
    sampler = DDIMSampler(model())
    sampler.make_schedule(6, verbose=False, timesteps_at=OWN)
    assert sampler.ddim_timesteps == OWN[::-1]
    x0, noise = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(3))
    abar = model().alphas_cumprod[OWN[2]]
    torch.testing.assert_close(
        sampler.stochastic_encode(x0, 3, noise=noise), abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    )
    with pytest.raises(ValueError, match="ddim_discretize is not supported"):
        sampler.make_schedule(6, "quad", verbose=False, spacing="karras")


@pytest.mark.parametrize(
    "where, why",
    [
        ({"timesteps_at": (500, 500)}, "timesteps must fall strictly, as in 981,961,941; got 500 after 500"),
        ({"timesteps_at": (500, 600)}, "fall strictly.* got 600 after 500"),
        ({"timesteps_at": (1000, 600)}, "timesteps must be 1..999 for this model and solver; .* lands on 0; got 1000"),
        ({"timesteps_at": (600, 0)}, "timesteps must be 1..999 .* got 0"),
        ({"timesteps_at": (600, -5)}, "timesteps must be 1..999 .* got -5"),
        ({"timesteps_at": (600,)}, "steps must be the number of the timesteps, 1; got 2"),
        ({"spacing": "cosine"}, "must be time or logsnr or karras or quad for this solver; got 'cosine'"),
        ({"spacing": "quad", "timesteps_at": (5, 2)}, "must be left out where the timesteps are given; got 'quad'"),
    ],
)
def test_bad_places_say_why(where, why):
    with pytest.raises(ValueError, match=why):
        solver("ddim", ABAR, 2, **where)
    with pytest.raises(ValueError, match=why):
        few_latents(PLMSSampler(model()), 2, **where)


@pytest.mark.parametrize("steps", [0, 1001])
@pytest.mark.parametrize("clean", [False, True])
def test_no_more_steps_than_the_training_has_timesteps(steps, clean):
    with pytest.raises(ValueError, match=f"steps must be 1..1000, .*; got {steps}"):
        spaced_levels(ABAR, steps, "quad", clean)
    assert len(spaced_levels(ABAR, 1000, "quad", clean)) == 1001


def test_what_else_can_be_wrong():
    with pytest.raises(ValueError, match="at least one timestep"):
        levels_at(ABAR, ())
    with pytest.raises(ValueError, match="must be karras for this solver; got 'time'"):
        solver("dpm++2m-karras", ABAR, 5, spacing="time")
    # Where clean latents come after it, timestep 0 can be the last.
    assert solver("euler", ABAR, 2, timesteps_at=(600, 0)).nodes[-1].t == 0


def test_recorded_is_what_differs_from_images_made_before_there_was_a_choice():
    def recorded(**fields) -> dict:
        settings = Recipe(64, 64, **fields).settings()
        return {name: settings[name] for name in ("spacing", "timesteps_at") if name in settings}

    assert recorded() == recorded(spacing="time") == {}
    assert recorded(spacing="quad") == {"spacing": "quad"}
    assert recorded(sampler="dpm++2m-karras") == recorded(sampler="dpm-solver-3s") == {}
    assert recorded(sampler="dpm-solver++") == {"spacing": "quad"}
    assert recorded(sampler="dpm-solver++", spacing="time") == {"spacing": "time"}
    assert recorded(sampler="unipc", steps=2, timesteps_at=(500, 1)) == {"timesteps_at": [500, 1]}


def test_a_calibration_is_for_one_placement_of_the_steps():
    names = [
        Recipe(64, 64, **fields).solver_name
        for fields in (
            {},
            {"spacing": "time"},
            {"spacing": "quad"},
            {"timesteps_at": (9, 5)},
            {"timesteps_at": (9, 4)},
            {"sampler": "dpm-solver++"},
            {"sampler": "dpm-solver++", "spacing": "time"},
        )
    ]
    assert names[:3] == ["ddim", "ddim", "ddim-quad"] and names[5:] == ["dpm-solver++-quad", "dpm-solver++"]
    assert names[3].startswith("ddim-at-") and len(set(names[1:])) == 6
