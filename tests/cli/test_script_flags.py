"""Every command answers --help at once; every sampling script knows the published flags and those that all share."""

from __future__ import annotations

import re

import pytest

from ldm.cli import arguments
from ldm.cli.arguments import SAMPLERS
from ldm.models.diffusion import schedule as spacing
from ldm.models.diffusion.solvers.registry import SOLVERS
from tests.helpers.paths import SCRIPTS
from tests.helpers.processes import COMMANDS, quick_help

SHARED = (
    "seed steps sampler spacing timesteps-at plan parallel noise-weight noise-below noise-order compare "
    "config ckpt weights device precision outdir"
)
FLAGS = {
    "txt2img": "prompt outdir skip_grid skip_save ddim_steps plms dpm laion400m fixed_code ddim_eta n_iter H W C f "
    "n_samples n_rows scale from-file repeat",
    "img2img": "prompt init-img strength outdir skip_grid skip_save ddim_steps plms fixed_code ddim_eta n_iter C f "
    "n_samples n_rows scale from-file",
    "depth2img": "prompt init-img strength outdir skip_grid skip_save ddim_steps fixed_code ddim_eta n_iter C f "
    "n_samples n_rows scale from-file",
    "prompt2prompt": "prompt edit init-img cross-steps self-steps reweight blend n_samples ddim_steps scale H W",
    "inpaint": "indir outdir steps prompt scale",
    "sample_diffusion": "resume n_samples eta vanilla_sample logdir custom_steps batch_size npz",
    "class_conditional": "classes class-names uncond_class n_samples scale ddim_steps ddim_eta",
    "superresolution": "images prompt noise_level n_samples ddim_steps ddim_eta scale",
    "layout2img": "boxes class-names n_samples H W ddim_steps ddim_eta",
    "knn2img": "prompt outdir skip_grid ddim_steps n_repeat plms ddim_eta n_iter H W n_samples n_rows scale from-file "
    "clip_type database use_neighbors knn query-image omit_query show-neighbors searcher",
    "semantic2img": "maps n_samples ddim_steps ddim_eta",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.stem)
def test_help_answers_at_once(command):
    assert quick_help(command).startswith(f"usage: {command.name} ")


@pytest.mark.parametrize("name", FLAGS)
def test_help_names_the_published_flags(name):
    printed = quick_help(SCRIPTS / f"{name}.py")
    for flag in f"{SHARED} {FLAGS[name]}".split():
        assert re.search(rf"--{flag}\b", printed), flag


def test_help_names_the_solvers_and_the_spacings():
    assert SAMPLERS == ", ".join(SOLVERS)
    assert arguments.SPACINGS == spacing.SPACINGS


def test_help_tells_the_default_spacing_of_every_solver():
    own = {name: solver.spacing or solver.spacings.published for name, solver in SOLVERS.items()}
    named = {name: spacing for spacing, names in arguments.USUAL_SPACINGS.items() for name in names}
    assert own == dict.fromkeys(SOLVERS, "time") | named


def test_short_published_flags():
    printed = quick_help(SCRIPTS / "sample_diffusion.py")
    assert all(re.search(rf"(?<![-\w]){flag}\b", printed) for flag in ("-r", "-n", "-e", "-v", "-l", "-c"))
