"""The order of packages: a file imports only from its own package and those below; sampling imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

D, M, S = "ldm/models/diffusion", "ldm/modules", "ldm/sampling"
DM = f"{M}/diffusionmodules"
# Lowest first. A file belongs to the first package that its path begins with; files of one package may import
# each other.
PACKAGES = (
    "ldm/io/",
    f"{D}/schedule.py",
    "ldm/compatibility.py",
    "ldm/util.py",
    "ldm/lr_scheduler.py",
    "ldm/data/",
    "ldm/modules/",
    "ldm/checkpoint/",
    "ldm/models/",
    "ldm/profiling/",
    "ldm/retrieval/",
    "ldm/sampling/",
    "ldm/cli/",
    "ldm/api.py",
    "ldm/training/",
    "evaluation/protocols/",
    "evaluation/runs/",
    "evaluation/metrics/",
    "evaluation/table/",
    "evaluation/plots/",
    "",
)
FILES = sorted(
    str(path.relative_to(ROOT))
    for top in ("ldm", "scripts", "evaluation", "main.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
    if path.exists() and (path.name != "__init__.py" or "__all__" in path.read_text(encoding="utf-8"))
)
HEAVY = ("pytorch_lightning", "lightning", "torchvision", "transformers", "open_clip")


def place(file: str) -> int:
    """Where the file's package stands in the order."""
    return next(i for i, package in enumerate(PACKAGES) if file.startswith(package))


def imported(file: str) -> set[str]:
    """The project's files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by full name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.replace(".", "/") for name in names}
    return {path + end for path in paths for end in (".py", "/__init__.py")} & set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    for other in imported(file):
        assert place(other) <= place(file), f"{file} imports {other}, which stands above it"


def test_the_walk_sees_imports():
    assert f"{D}/loop.py" in imported(f"{D}/sampler.py")
    assert f"{DM}/util.py" in imported(f"{D}/denoiser.py")
    assert f"{D}/ddpm/__init__.py" in imported(f"{S}/engine.py")


def test_sampling_imports_nothing_heavy():
    """A conditioner that reads texts by the model's own tokenizer needs no library of texts."""
    modules = f"{D}/ddim {D}/ddpm {D}/solvers/registry {S}/engine {M}/encoders/modules".replace("/", ".").split()
    made = "sys.modules['ldm.modules.encoders.modules'].BERTEmbedder(32, 1, 50)"
    code = f"import sys, {', '.join(modules)}; {made}; print(*(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_there_is_one_denoising_loop():
    """Only the loop steps a rule."""
    stepping = [file for file in FILES if file.startswith(D) and "rule.step(" in (ROOT / file).read_text()]
    assert stepping == [f"{D}/loop.py"]


# Where a command line is read: what these functions are given they turn into settings.
OF_COMMANDS = {"ldm/cli/parser.py", "evaluation/metrics/command.py"}
LIBRARY = [file for file in FILES if file.startswith("ldm/") or file.count("/") > 1]  # no script, and no command


@pytest.mark.parametrize("file", [file for file in LIBRARY if file not in OF_COMMANDS])
def test_no_library_function_takes_the_arguments_of_a_command(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            taken = {ast.unparse(arg.annotation) for arg in given if arg.annotation is not None}
            assert not any("Namespace" in kind for kind in taken), f"{file}: {node.name}"


COMMANDS = {file for file in FILES if file not in LIBRARY}


@pytest.mark.parametrize("file", FILES)
def test_nothing_imports_a_command(file):
    assert not imported(file) & COMMANDS


def inner_imports(file: str) -> set[int]:
    """The lines of a file at which a function imports something."""
    functions = (node for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef))
    inside = (node for function in functions for node in ast.walk(function))
    return {node.lineno for node in inside if isinstance(node, ast.Import | ast.ImportFrom)}


def test_functions_import_what_is_slow_or_optional_and_no_more():
    """What a script needs beyond `cli`, so that --help answers at once; the other commands, optional packages."""
    found = {file: sorted(lines) for file in FILES if (lines := inner_imports(file))}
    assert sum(map(len, found.values())) <= 30, found
