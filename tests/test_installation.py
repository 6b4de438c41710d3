"""What setup.py installs is all that the code reads: looked up from an installed copy, in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

LOOK_UP = """
import evaluation.protocols.protocol, evaluation.table.cost, evaluation.table.spec
import evaluation.recognition, evaluation.figures
import ldm
from ldm.cli.arguments import CLASS_NAMES, EMOJI64
from ldm.models.diffusion.propagation.load import load_plan, plan_names
from ldm.checkpoint.published import load_manifest
from ldm.io.files import PROJECT_ROOT, find_file

installed = evaluation.__file__.removesuffix("evaluation/__init__.py")
assert ldm.__file__.startswith(installed) and str(PROJECT_ROOT).startswith(installed), (ldm.__file__, PROJECT_ROOT)
assert len(load_plan("faster-diffusion", 50).keys) == 9
for name in plan_names():
    load_plan(name, 50)
for name in evaluation.protocols.protocol.protocol_names():
    protocol = evaluation.protocols.protocol.load_protocol(name)
    assert (PROJECT_ROOT / protocol.defaults["config"]).is_file(), protocol.defaults
assert len(evaluation.table.spec.table_names()) >= 8
for model in load_manifest().values():
    assert (PROJECT_ROOT / model.config).is_file(), model.config
for path in (*EMOJI64, CLASS_NAMES, evaluation.table.cost.SD_V1, EMOJI64[0].parent / "prompts.txt",
             EMOJI64[0].parent / "heldout.yaml", EMOJI64[0].parent / "tokenizer.json"):
    assert path.is_file() and str(path).startswith(installed), path
try:
    ldm.load("sd-v1-5")
except FileNotFoundError as error:  # there are no scripts to get them by
    assert "; put https://" in str(error) and "scripts" not in str(error), error
images = ldm.load("emoji64").images(["a red heart, noto style"], plan="auto:9", steps=50)
print(images[0].size)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What `pip install .` copies, without building a wheel."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def test_the_installed_copy_finds_its_files(installed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LOOK_UP],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[-2] == "(64, 64)"


@pytest.fixture(scope="module")
def for_code() -> set[str]:
    """The committed files that the code reads from the project's folders."""
    listed = subprocess.run(["git", "ls-files", "configs", "models"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    return {file for file in listed.stdout.split() if not file.endswith((".md", ".png"))}


def test_all_committed_data_is_installed_and_no_downloaded_weights(installed, for_code):
    place = installed / "ldm" / "_project"
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} == for_code


def test_a_source_distribution_has_the_same_files(for_code, tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    sources = next(tmp_path.glob("*.egg-info/SOURCES.txt")).read_text().split("\n")
    assert {file for file in sources if file.startswith(("configs/", "models/"))} == for_code
