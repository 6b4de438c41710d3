"""Names and errors as they stand in one-line messages."""

from __future__ import annotations

from collections.abc import Iterable


def some(names: Iterable[str], limit: int = 8) -> str:
    """' (a, b, ... and 3 more)', or nothing for no names."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})" if names else ""


def one_line(error: BaseException) -> str:
    """Its message, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
