"""What bad input raises, and how names and errors stand in one-line messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class BadInput(Exception):
    """What the user gave can't be used; the message is one line that names the argument."""


class BadArgument(BadInput):
    """The fault of one argument, by its name in Python or as a flag; a command line shows the flag for the name."""

    def __init__(self, argument: str, problem: str):
        super().__init__(f"{argument}: {problem}")
        self.argument, self.problem = argument, problem


def some(names: Iterable[str], limit: int = 8) -> str:
    """' (a, b, ... and 3 more)', or nothing for no names."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})" if names else ""


def one_line(error: BaseException) -> str:
    """Its message, or its kind if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def blame(argument: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Such errors inside the block are the fault of this argument: its name in Python, or its flag.

    Raises:
        BadArgument: in their place.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except errors as error:
        raise BadArgument(argument, " ".join(str(error).split())) from error


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The end of an error message about a name that is none: the known name nearest to it; empty if none is near."""
    near = get_close_matches(given, sorted(names), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
