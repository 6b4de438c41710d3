"""What the measures raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.io.errors import one_line


class ModelError(ValueError):
    """A network that cannot be had."""


class ImageError(ValueError):
    """Images or statistics that can't be measured."""


@contextmanager
def reading(path: str | Path, problem: str) -> Iterator[None]:
    """Whatever is raised inside becomes a ImageError that names the file: one that is damaged can fail in any way."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{path}: {problem}: {one_line(error)}") from error
