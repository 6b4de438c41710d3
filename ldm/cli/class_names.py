"""Classes as users name them: by number, or by a name from a list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.io.errors import did_you_mean
from ldm.io.files import read_lines

Names = Mapping[str, Sequence[int]]  # class numbers by name, folded


def read_names(path: str | Path) -> Names:
    """The classes that a whole line names, or one of its synonyms, which are separated by commas.

    Args:
        path: a text file, one line for each class from class 0.

    Raises:
        OSError, ValueError: the file can't be read, or is empty.
    """
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty; expected one name per line")
    names: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        for name in {folded(part) for part in (line, *line.split(","))} - {""}:
            names.setdefault(name, []).append(index)
    return names


def folded(name: str) -> str:
    """In lower case, with single spaces."""
    return " ".join(name.lower().split())


def find_class(text: str, names: Names, classes: int) -> int:
    """The class, 0..classes-1, that a number or a name stands for.

    Raises:
        ValueError: no such class, or more than one of this name.
    """
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        found: Sequence[int] = [int(text)]
    else:
        found = names.get(folded(text), [])
        if not found and not names:
            raise ValueError(f"{text!r} is no number, and this model's classes have no names; give a file of them")
        if not found:
            raise ValueError(f"{text!r} is the name of no class{did_you_mean(folded(text), names)}")
        if len(found) > 1:
            raise ValueError(f"{text!r} names classes {', '.join(map(str, found))}; give the number")
    if not 0 <= found[0] < classes:
        raise ValueError(f"expected 0..{classes - 1}, the classes of this model; got {found[0]}")
    return found[0]
