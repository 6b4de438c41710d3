"""Count the project's files that a run enters: in which a function is called, not those that are only imported.

    python -m tests.files_entered --list

One run each of scripts/txt2img.py, evaluation/fid.py and, with two rows, evaluation/tables.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from evaluation import fid, tables
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_data import write_data

MOST = {"txt2img": 35, "FID": 12, "table of two rows": 45}


class Entered:
    """A profile function that keeps the files of the project whose functions are called, in `files`.

    What is called while a module is imported is not the run's.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._importing = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        if frame.f_code.co_name == "<module>":
            self._importing += 1 if event == "call" else -1
        elif event == "call" and not self._importing:
            self.files.add(frame.f_code.co_filename)

    def of_project(self) -> list[str]:
        """Paths from the project's folder, without those of the tests."""
        paths = (Path(file) for file in self.files)
        inside = (path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT))
        return sorted(path.as_posix() for path in inside if path.parts[0] != "tests")


def files_entered(call: Callable[[], int]) -> tuple[int, list[str]]:
    """What call() returns, and the project's files that it enters."""
    entered = Entered()
    threading.setprofile(entered)
    sys.setprofile(entered)
    try:
        code = call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return code, entered.of_project()


def commands(folder: Path) -> dict[str, Callable[[], int]]:
    """The three commands, on the model that ships and four images; the second and third read what the first made."""
    prompt = ["--prompt", "a red heart", "--n_samples", "4", "--steps", "4", "--outdir", str(folder / "txt2img")]
    data = write_data(_made(folder / "data"), side=64)
    how = {"sampler": "ddim", "steps": 4}
    table = {
        "title": "Two rows",
        "source": "none",
        "columns": ["fid", "gflops"],
        "protocol": {"emoji": "emoji64"},
        "rows": [
            {"label": "plain", "plain": True, **how, "plan": "off"},
            {"label": "propagated", **how, "plan": "0,2"},
        ],
    }
    (folder / "two.yaml").write_text(yaml.safe_dump(table))
    network = ["--extractor", "efficientnet-lite0", "--device", "cpu"]
    images = str(folder / "txt2img" / "samples")
    rows = ["--world", "emoji", "--data", str(data), "--runs", str(folder / "runs"), "--count", "4"]
    rows += ["--timed", "0", "--device", "cpu"]
    return {
        "txt2img": lambda: load_script("txt2img").main(prompt),
        "FID": lambda: fid.main([*network, "--cache", str(folder / "cache"), images, images]),
        "table of two rows": lambda: tables.main([str(folder / "two.yaml"), *rows]),
    }


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main(argv: list[str] | None = None) -> int:
    """Print the counts; 1 if one is larger than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="also print the files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, command in commands(Path(folder)).items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
                code, found[name] = files_entered(command)
            if code:
                sys.exit(f"{name}: {errors.getvalue()}")
    for name, files in found.items():
        print(f"{name:<20}{len(files):>3} files entered, at most {MOST[name]}")
        if args.list:
            print(*(f"    {file}" for file in files), sep="\n")
    return int(any(len(files) > MOST[name] for name, files in found.items()))


if __name__ == "__main__":
    sys.exit(main())
