"""Every sampling script answers --help at once, and knows the published flags and those that all scripts share."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ldm.cli.arguments import SAMPLERS
from ldm.models.diffusion.solvers.registry import SOLVERS
from tests.helpers.paths import ROOT
from tests.helpers.processes import quick_help

SHARED = (
    "seed steps sampler plan parallel noise-weight noise-below noise-order compare config ckpt weights device "
    "precision outdir"
)
FLAGS = {
    "txt2img": "prompt outdir skip_grid skip_save ddim_steps plms dpm laion400m fixed_code ddim_eta n_iter H W C f "
    "n_samples n_rows scale from-file repeat",
    "img2img": "prompt init-img strength outdir skip_grid skip_save ddim_steps plms fixed_code ddim_eta n_iter C f "
    "n_samples n_rows scale from-file",
    "depth2img": "prompt init-img strength outdir skip_grid skip_save ddim_steps fixed_code ddim_eta n_iter C f "
    "n_samples n_rows scale from-file",
    "inpaint": "indir outdir steps prompt scale",
    "sample_diffusion": "resume n_samples eta vanilla_sample logdir custom_steps batch_size npz",
    "class_conditional": "classes class-names uncond_class n_samples scale ddim_steps ddim_eta",
    "superresolution": "images prompt noise_level n_samples ddim_steps ddim_eta scale",
    "layout2img": "boxes class-names n_samples H W ddim_steps ddim_eta",
    "semantic2img": "maps n_samples ddim_steps ddim_eta",
}


@pytest.mark.parametrize("name", FLAGS)
def test_help_answers_at_once(name):
    printed = quick_help(ROOT / "scripts" / f"{name}.py")
    for flag in f"{SHARED} {FLAGS[name]}".split():
        assert re.search(rf"--{flag}\b", printed), flag


def test_help_names_the_solvers():
    assert SAMPLERS == ", ".join(SOLVERS)


def test_short_published_flags():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "sample_diffusion.py"), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert all(re.search(rf"(?<![-\w]){flag}\b", done.stdout) for flag in ("-r", "-n", "-e", "-v", "-l", "-c"))
