"""YAML files that are found by name, such as protocols and tables: finding, reading and checking them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.cli import did_you_mean

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
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(names)}, or FILE.yaml"
                         f"{did_you_mean(name, names)}")
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


# What values may be

@dataclass(frozen=True)
class Kind:
    """`words` says what is accepted, `holds` whether a value is."""

    words: str
    holds: Callable[[Any], bool]


def number(words: str, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> Kind:
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= high)     # so neither nan nor true


def whole(low: int, high: int = SEEDS[-1]) -> Kind:
    words = f">= {low}" if high == SEEDS[-1] else f"in {low}..{high}"
    return Kind(f"a whole number {words}", lambda value: type(value) is int and low <= value <= high)


def choice(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


TEXT = Kind("a text", is_text)
NUMBER = number("a finite number")
SHARE = number("a number in 0..1", 0, 1)
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.words} or null", lambda value: value is None or kind.holds(value))


def check(place: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raises ValueError for the first value that is not of its kind; `place` comes before its name."""
    for name, kind in kinds.items():
        if name in values and not kind.holds(values[name]):
            raise ValueError(f"{place}{name} must be {kind.words}; got {values[name]!r}")


def known(name: str, content: Any, needed: set[str], optional: set[str]) -> None:
    """Raises ValueError unless content is a mapping with these keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a mapping; got {content!r}")
    if missing := needed - content.keys():
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}; needed: {', '.join(sorted(needed))}")
    if strange := content.keys() - needed - optional:
        raise ValueError(f"{name} has {', '.join(sorted(map(str, strange)))}; "
                         f"accepted: {', '.join(sorted(needed | optional))}")
