"""What values from files (plans, protocols, tables, run cards) may be; checked before they are used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

SEEDS = range(2 ** 32)
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """The value for a message: of a long one the beginning, of many levels the first."""
    return _SHORT.repr(value)


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
            raise ValueError(f"{place}{name} must be {kind.words}; got {shown(values[name])}")


def known(name: str, content: Any, needed: set[str], optional: set[str]) -> None:
    """Raises ValueError unless content is a mapping with these keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a mapping; got {shown(content)}")
    if missing := needed - content.keys():
        raise ValueError(f"{name} has no {', '.join(sorted(missing))}; needed: {', '.join(sorted(needed))}")
    if strange := content.keys() - needed - optional:
        raise ValueError(f"{name} has {', '.join(sorted(map(str, strange)))}; "
                         f"accepted: {', '.join(sorted(needed | optional))}")
