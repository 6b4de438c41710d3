"""What the command lines share: one-line errors that name the argument, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from ldm.io.errors import BadInput, did_you_mean

PACKAGE = "faster-diffusion-ldm"
LONGEST_WORD, LONGEST_MESSAGE = 200, 2000  # characters of an error message
MEMORY = "can't allocate memory"  # what PyTorch says where the machine has not enough of it


class Parser(argparse.ArgumentParser):
    """Raises BadInput instead of ending the process; takes no shortened flags."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})
        self.add_argument("--version", action=Version, nargs=0, help="print the versions and exit")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise BadInput(
                    f"{ascii(argument)}: not UTF-8 text; neither images nor results could say what they are of"
                ) from None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown, hint = message.removeprefix("unrecognized arguments: "), ""
        if unknown != message:
            flag, known = unknown.partition(" ")[0].partition("=")[0], self.flags()
            hint = f"; not every command has {flag}" if flag in known else did_you_mean(flag, known)
        raise BadInput(message.removeprefix("argument ") + hint)

    def flags(self) -> set[str]:
        """All flags, also those of subcommands."""
        own = {flag for action in self._actions for flag in action.option_strings}
        below = (action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return own.union(*(parser.flags() for parsers in below for parser in parsers))


class Version(argparse.Action):
    """Prints the versions; they are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        found = []
        for package in (PACKAGE, "torch"):
            try:
                found.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                found.append(f"{package} not installed")
        print(", ".join(found))
        parser.exit()


def number(kind: type, low: float, high: float, accepted: str) -> Callable[[str], Any]:
    """An argparse type: a number in low..high, `accepted` in words."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {accepted}; got {text!r}")
        return value

    return parse


def readable(message: str) -> str:
    """An error message for a terminal: one line, without control characters, and with what is long in it cut.

    Messages repeat what was given, and a file name, a key of a checkpoint or a header can be anything.
    """
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in message).split())
    return _cut(re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: _cut(word[0], LONGEST_WORD), line), LONGEST_MESSAGE)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}...({len(text)} characters)...{text[-limit // 6 :]}"


def whole(low: int, high: int, accepted: str = "a whole number") -> Callable[[str], Any]:
    """An argparse type: a whole number in low..high. What is counted has a limit, so that no count takes all memory."""
    return number(int, low, high, f"{accepted} in {low}..{high}")


def command(name: str, run: Callable[[], None], stopped: str = "stopped") -> int:
    """Run a command line; its exit code.

    Args:
        name: of the script, for messages.
        run: parses the arguments and does the work.
        stopped: what to say if the user interrupts it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold what the terminal can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has seen enough, such as head; what is left goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BadInput, OSError) as error:  # a full disk, a name that no file can have: not a fault of the program
        print(f"{name}: error: {readable(str(error))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and MEMORY not in str(error):
            raise
        print(
            f"{name}: error: not enough memory for all of it at a time: {readable(str(error)) or 'a list'}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    return 0
