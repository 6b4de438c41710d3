"""YAML files that are named by their stem, such as protocols and tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.io.errors import did_you_mean
from ldm.io.files import read_yaml


def names_in(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.yaml")]


def find_file(kind: str, name: str, folder: Path, names: tuple[str, ...]) -> Path:
    """The file of one of the names in the folder, or the .yaml file of that path. Raises ValueError: neither; `kind`
    says of what."""
    path = folder / f"{name}.yaml" if name in names else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(
            f"unknown {kind} {name!r}; accepted: {', '.join(names)}, or FILE.yaml{did_you_mean(name, names)}"
        )
    return path


@contextmanager
def reading(kind: str, path: Path) -> Iterator[dict[str, Any]]:
    """The file's content; errors inside the block become a ValueError that names the file. Raises ValueError: it can't
    be read, or is not of the kind."""
    try:
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise ValueError(f"the file should be a mapping; got {type(content).__name__}")
        yield content
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a {kind}: {' '.join(str(error).split())}") from None
