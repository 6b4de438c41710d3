"""What values from files (configs, plans, protocols, tables, run cards) may be; checked before they are used."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import Repr
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

SEEDS = range(2**32)
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
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= high)  # so neither nan nor true


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
        raise ValueError(
            f"{name} has {', '.join(sorted(map(str, strange)))}; accepted: {', '.join(sorted(needed | optional))}"
        )


# What an annotation states


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML or JSON file is of a type, as annotations state it; True for types that neither has.

    A whole number is a float, too; a truth value is not a number; NaN and infinity are none.
    """
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (int, float):
        return (
            isinstance(value, int if origin is int else int | float)
            and not isinstance(value, bool)
            and abs(value) < math.inf
        )
    if origin in (bool, str, NoneType):
        return isinstance(value, origin)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if origin in (Sequence, list, tuple):
        kinds = [arg for arg in args if arg is not Ellipsis]
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and (len(kinds) != 1 or all(fits(item, kinds[0]) for item in value))
        )
    return True


def in_words(hint: Any) -> str:
    """A type as `fits` knows it, for a user's eyes."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        NoneType: "null",
        Mapping: "a mapping",
        dict: "a mapping",
        Sequence: "a list",
        list: "a list",
        tuple: "a list",
    }
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, args))
    if origin is Literal:
        return " or ".join(map(str, args))
    return words.get(origin, getattr(origin, "__name__", str(origin)))
