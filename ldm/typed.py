"""Whether a value of a YAML or JSON file is of the type that an annotation states."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


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
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool) \
            and abs(value) < math.inf
    if origin in (bool, str, NoneType):
        return isinstance(value, origin)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping)
    if origin in (Sequence, list, tuple):
        kinds = [arg for arg in args if arg is not Ellipsis]
        return isinstance(value, Sequence) and not isinstance(value, str) and (
            len(kinds) != 1 or all(fits(item, kinds[0]) for item in value))
    return True


def in_words(hint: Any) -> str:
    """A type as `fits` knows it, for a user's eyes."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null",
             Mapping: "a mapping", dict: "a mapping", Sequence: "a list", list: "a list", tuple: "a list"}
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(in_words, args))
    if origin is Literal:
        return " or ".join(map(str, args))
    return words.get(origin, getattr(origin, "__name__", str(origin)))
