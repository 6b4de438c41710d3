"""What the files of a row hold now, each read once: by it what was made of others is told from what is the row's."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.protocols.prompts import Prompt


def changed_at(path: str | Path | None) -> int | None:
    """What says whether a file is still the same; None if it is not there."""
    return None if path is None or not Path(path).exists() else Path(path).stat().st_mtime_ns


def content(path: Path) -> str | None:
    """Hash of a file's content; None if it is not there."""
    return None if (changed := changed_at(path)) is None else _hash(path, changed)


@lru_cache
def _hash(path: Path, changed: int) -> str:
    from ldm.checkpoint import fingerprint

    return fingerprint(path)


@lru_cache
def prompts_of(argv: tuple[str, ...], changed: tuple[str, int | None]) -> list[Prompt]:
    """The prompts of a protocol, as evaluation/generate.py chooses them.

    Args:
        argv: of that command line. changed: says whether protocol and data are still the same, as below.
    """
    from evaluation.generate import parse, select_prompts

    return select_prompts(*parse([*argv, "--out", "."]))


@lru_cache
def network_now(name: str, weights: str | None, resize: str, changed: int | None) -> dict[str, Any]:
    """What results say of their network; see `evaluation.metrics.extractors.extractor`."""
    from evaluation.metrics.extractors import load_extractor, network_fields

    return network_fields(load_extractor(name, weights, resize, "cpu"))


@lru_cache
def clip_now(folder: str, changed: int) -> str:
    """Hash of the weights of a CLIP model."""
    from evaluation.metrics.clip import load_clip

    return content(load_clip(folder).weights)


@lru_cache
def real_now(named: str, data: Path, changed: tuple[str, int]) -> str | None:
    """The hash by which results name the real pictures of a protocol, or their statistics; `data`: their folder."""
    from evaluation.metrics.real_images import reference_images
    from evaluation.metrics.statistics import arrays_in, load_statistics
    from evaluation.protocols.protocol import load_protocol
    from evaluation.runs.images import open_images

    found = reference_images(load_protocol(named), data)
    if not isinstance(found, Path):
        return found.sha256()
    of = load_statistics(found)[1] if "mu" in arrays_in(str(found)) else None
    if of is not None:  # a file of ours says which pictures it is of
        return of.get("sha256")
    return content(found) if found.suffix == ".npz" else open_images(found).sha256()
