"""Every command answers --help at once; every sampling script knows the published flags and those that all share."""

from __future__ import annotations

import re

import pytest

from evaluation import figures
from ldm.cli import arguments
from ldm.cli.arguments import SAMPLERS
from ldm.models.diffusion import schedule as spacing
from ldm.models.diffusion.solvers.registry import SOLVERS
from tests.helpers.paths import ROOT, SCRIPTS
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


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "models").rglob("*.md")]
FLAG = r"(?<![\w-])--[A-Za-z][\w-]*"
# Of ruff, pip and torchrun; of published programs, where a page says that they are not taken; of main.py's settings.
OF_OTHERS = {"--check", "--no-deps", "--nproc_per_node", "--nproc-per-node", "--torchscript", "--ipex", "--bf16"}
OF_OTHERS |= {"--accelerator", "--max_epochs", "--key", "--data"}


def flags_of(name: str) -> set[str]:
    """The flags of the command with this file name."""
    command = next(command for command in COMMANDS if command.name == name)
    return figures.parser().flags() if name == "figures.py" else {*re.findall(FLAG, quick_help(command))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_that_a_page_names_are_there(page):
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))  # a command of several lines is one
    known = set().union(*(flags_of(command.name) for command in COMMANDS))
    assert {*re.findall(FLAG, text)} <= known | OF_OTHERS
    for name, line in re.findall(r"\bpython (?:scripts/|evaluation/|)(\w+\.py)\b([^\n`|#]*)", text):
        given = re.sub(r'"[^"]*"', "", line)  # in quotes stand texts, and commands that a figure runs
        assert {*re.findall(FLAG, given)} <= flags_of(name) | OF_OTHERS, f"{name}{line}"
