"""What the code imports is what setup.py requires, for the part of the code that it is required for."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import Distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

# The extras that a file may import from, by the first of these that its path begins with; other files, from what
# is always installed. "" stands for that.
EXTRAS = {
    "ldm/training/": {"", "train"},
    "main.py": {"", "train"},
    "ldm/modules/encoders/": {"", "text"},
    "ldm/modules/efficientnet.py": {"", "train", "eval"},
    "ldm/retrieval/": {"", "retrieval"},
    "ldm/modules/losses/": {"", "train"},
    "ldm/io/video.py": {"", "video"},
    "evaluation/metrics/training.py": {"", "eval", "train"},
    "evaluation/": {"", "eval", "text"},
    "ldm/data/": {"", "train"},
    "ldm/profiling/diffusers_baseline.py": {"", "benchmark"},
    "ldm/profiling/networks.py": {"", "benchmark"},
    "tests/": {"", "test"},
    "setup.py": {"test"},
    "": {""},
}
NOT_IMPORTED = {
    "tensorboard": "Lightning's TensorBoardLogger writes with it",
    "pytest-xdist": "pytest's option -n",
    "ruff": "the lint",
}
IMPORTED_WITH = {"packaging": "pytest"}  # comes with the other, which is required
OPTIONAL = {"torchvision"}  # the networks of LPIPS, for who has one that fits the installed PyTorch
OURS = {"ldm", "evaluation", "scripts", "main", "tests"}
FILES = [
    path
    for top in ("ldm", "evaluation", "scripts", "tests", "main.py", "setup.py")
    for path in ([ROOT / top] if top.endswith(".py") else sorted((ROOT / top).rglob("*.py")))
]


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere in it, other than the standard library's, ours and optional ones."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names - OURS - OPTIONAL - sys.stdlib_module_names


@pytest.fixture(scope="module")
def required(tmp_path_factory) -> dict[str, set[str]]:
    """Names of distributions -> the extras that require them."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found: dict[str, set[str]] = {}
    for line in Distribution.at(next(folder.glob("*.egg-info"))).requires:
        requirement = Requirement(line)
        extra = str(requirement.marker).split('"')[1] if requirement.marker else ""
        found.setdefault(canonicalize_name(requirement.name), set()).add(extra)
    return found


@pytest.fixture(scope="module")
def distributions() -> dict[str, set[str]]:
    """Names of packages, as imported -> the installed distributions that have them."""
    return {name: set(map(canonicalize_name, found)) for name, found in packages_distributions().items()}


def test_what_is_imported_is_required(required, distributions):
    missing = []
    for path in FILES:
        file = str(path.relative_to(ROOT))
        extras = next(extras for start, extras in EXTRAS.items() if file.startswith(start))
        for package in imported(path):
            names = distributions.get(package, {canonicalize_name(package)}) | {IMPORTED_WITH.get(package, package)}
            if not extras & set().union(*(required.get(name, set()) for name in names)):
                missing.append(f"{file} imports {package}, which setup.py requires in none of {sorted(extras)}")
    assert not missing


def test_what_is_required_is_imported(required, distributions):
    used = {name for path in FILES for package in imported(path) for name in distributions.get(package, ())}
    assert set(required) - used == set(NOT_IMPORTED)
