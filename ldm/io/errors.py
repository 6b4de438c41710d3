"""Errors for bad input, and parts of their one-line messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


class BadInput(Exception):
    """Input of the user that can't be used. The message is one line that names the argument."""


class SettingError(ValueError):
    """A setting of a call can't be used.

    setting: its name in that call; a command names its own flag for it, see `flags_named`.
    problem: in words.
    """

    def __init__(self, setting: str, problem: str, *others: str):
        """others: further settings that the problem names; {NAME} in it stands for the setting NAME."""
        self.setting, self._text, self._others = setting, problem, others
        self.problem = self._worded(str)
        super().__init__(f"{setting}: {self.problem}")

    def _worded(self, name: Callable[[str], str]) -> str:
        text = self._text
        for other in self._others:
            text = text.replace(f"{{{other}}}", name(other))
        return text

    def message(self, name: Callable[[str], str]) -> str:
        """The setting and the problem, with what `name` makes of the names of settings, such as flags."""
        return f"{name(self.setting)}: {self._worded(name)}"

    def moved(self, setting: str, before: str = "") -> SettingError:
        """The same problem of another setting, with words before it."""
        return SettingError(setting, before + self._text, *self._others)


def shown(value: Any) -> str:
    """The value for a message, shortened if it is long or deeply nested."""
    return _SHORT.repr(value)


def some(names: Iterable[str], limit: int = 8) -> str:
    """' (a, b, ... and 3 more)', or nothing for no names."""
    names = sorted(names)
    more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})" if names else ""


def one_line(error: BaseException) -> str:
    """The message of an error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def blame(flag: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Such errors inside the block become a BadInput that names this argument."""
    try:
        yield
    except BrokenPipeError:
        raise
    except errors as error:
        raise BadInput(f"{flag}: {' '.join(str(error).split())}") from error


@contextmanager
def fault_of(setting: str, errors: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Such errors inside the block become a SettingError of this setting."""
    try:
        yield
    except (SettingError, BrokenPipeError):
        raise
    except errors as error:
        raise SettingError(setting, one_line(error)) from error


@contextmanager
def flags_named(names: Mapping[str, str]) -> Iterator[None]:
    """A SettingError inside the block becomes a BadInput that names the flag: the one in `names`, or --SETTING."""
    try:
        yield
    except SettingError as error:
        raise BadInput(error.message(lambda setting: names.get(setting, f"--{setting}"))) from error


def did_you_mean(given: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known name; empty if none is similar."""
    near = get_close_matches(given, sorted(names), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
