"""YAML files that are found by name, such as protocols and tables: finding, reading and checking them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

SEEDS = range(2 ** 32)


def names_in(folder: Path) -> list[str]:
    return [path.stem for path in folder.glob("*.yaml")]


def find_file(kind: str, name: str, folder: Path, names: tuple[str, ...]) -> Path:
    """The file of one of the names in the folder, or the .yaml file of that path.

    Raises:
        ValueError: neither; `kind` says of what.
    """
    path = folder / f"{name}.yaml" if name in names else Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(names)}, or FILE.yaml")
    return path


@contextmanager
def reading(kind: str, path: Path) -> Iterator[Any]:
    """The file's content; what is found wrong with it inside the block is said with the file's name.

    Raises:
        ValueError: it can't be read, or is not of the kind.
    """
    try:
        yield yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a {kind}: {' '.join(str(error).split())}") from None


def whole(name: str, value: Any, low: int = 0) -> None:
    """Raises ValueError unless it is a whole number from low to 2^32-1."""
    if type(value) is not int or value not in SEEDS or value < low:
        raise ValueError(f"{name} must be a whole number >= {low}; got {value!r}")


def finite(name: str, value: Any) -> None:
    """Raises ValueError unless it is a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}")


def words(name: str, value: Any) -> None:
    """Raises ValueError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text; got {value!r}")


def known(name: str, content: Any, needed: set[str], optional: set[str]) -> None:
    """Raises ValueError unless content is a mapping with these keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a mapping; got {content!r}")
    if missing := needed - content.keys():
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}; needed: {', '.join(sorted(needed))}")
    if strange := content.keys() - needed - optional:
        raise ValueError(f"{name} has {', '.join(sorted(map(str, strange)))}; "
                         f"accepted: {', '.join(sorted(needed | optional))}")
