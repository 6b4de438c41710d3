"""What the files of a row hold now, each read once: by it what was made of others is told from what is the row's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.selection import Prompt


def content(path: Path) -> str | None:
    """Hash of a file's content; None if it is not there."""
    return _hash(path, path.stat().st_mtime_ns) if path.exists() else None


@lru_cache
def _hash(path: Path, changed: int) -> str:
    """Weights have gigabytes; `changed` says whether the file is the same."""
    from ldm.checkpoint import fingerprint

    return fingerprint(path)


@lru_cache
def prompts_of(argv: tuple[str, ...], changed: tuple[str, int]) -> list[Prompt]:
    """The prompts of a protocol, as evaluation/generate.py chooses them.

    Args:
        argv: of that command line. changed: says whether protocol and data are the same.
    """
    from evaluation.generate import parse, select_prompts

    return select_prompts(*parse([*argv, "--out", "."]))
