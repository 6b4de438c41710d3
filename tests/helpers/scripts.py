"""Running the sampling scripts in this process."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.sampling.generate import read_manifest
from tests.helpers.paths import SCRIPTS


def load_script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Script:
    """A script's main with arguments that every call has; its images in folder / out."""

    def __init__(self, name: str, folder: Path, *common: str):
        self.name, self.folder, self.out = name, folder, folder / "out"
        self.main: Callable[[list[str]], int] = load_script(name).main
        self.common = [*common, "--outdir", str(self.out)]

    def __call__(self, *arguments: str) -> list[dict[str, Any]]:
        """Run it; the entries of the manifest that are new."""
        before = len(self.entries())
        assert self.main([*self.common, *arguments]) == 0
        return self.entries()[before:]

    def entries(self) -> list[dict[str, Any]]:
        return read_manifest(self.out / "manifest.jsonl")

    def pixels(self, entry: dict[str, Any]) -> np.ndarray:
        """(H, W, 3) levels."""
        return np.asarray(Image.open(self.out / entry["file"])).astype(int)

    def refusal(self, capsys: pytest.CaptureFixture, *arguments: str) -> str:
        """Run it; it must refuse in one line and leave nothing; that line."""
        kept = sorted(self.folder.rglob("*"))
        capsys.readouterr()
        assert self.main([*self.common, *arguments]) == 2
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert output.out == "" and sorted(self.folder.rglob("*")) == kept
        start = f"{self.name}.py: error: "
        assert line.startswith(start)
        return line.removeprefix(start)


def check_batches(script: Script, one: Sequence[str], other: Sequence[str]) -> list[np.ndarray]:
    """Two calls that differ in their batches alone make the same images, to a level; these."""
    shown = [script.pixels(entry) for entry in script(*one)]
    for path in (script.out / "samples").iterdir():
        path.unlink()
    script(*other)
    for entry, before in zip(script.entries(), shown, strict=True):
        assert np.abs(script.pixels(entry) - before).max() <= 1
    return shown


def check_laws(script: Script, *arguments: str) -> None:
    """With every node a key node a run is the plain one, and decoders in one batch are what each is alone; to a level.
    The plan changes images, so that this is seen."""
    made = []
    for plan, parallel in (("off", "1"), ("uniform:1", "1"), ("0", "1"), ("0", "8")):
        shutil.rmtree(script.out, ignore_errors=True)
        entries = script(*arguments, "--plan", plan, "--parallel", parallel)
        made.append(np.stack([script.pixels(entry) for entry in entries]))
    plain, every, serial, batched = made
    assert np.abs(every - plain).max() <= 1
    assert np.abs(batched - serial).max() <= 1 < np.abs(serial - plain).max()


def check_resume(script: Script, capsys: pytest.CaptureFixture, *arguments: str) -> None:
    """A second run finds all images and touches none; a lost one is made again, the same."""
    first = script(*arguments)
    files = {path: path.stat().st_mtime_ns for path in script.out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert script(*arguments) == []
    assert f"({0} made, {len(first)} found)" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in script.out.rglob("*") if path.is_file()}
    lost = script.out / first[-1]["file"]
    before = script.pixels(first[-1])
    lost.unlink()
    script(*arguments)
    assert f"(1 made, {len(first) - 1} found)" in capsys.readouterr().out
    assert np.abs(script.pixels(first[-1]) - before).max() <= 1
