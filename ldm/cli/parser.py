"""What the command lines share: one-line errors that name the argument, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from ldm.io.errors import BadInput, SettingError, blame, did_you_mean
from ldm.io.files import clean, unfinished

PACKAGE = "faster-diffusion-ldm"
LONGEST_WORD, LONGEST_MESSAGE = 200, 2000  # characters of an error message
MEMORY = "can't allocate memory"  # what PyTorch says where the machine has not enough of it
GO_ON = "stopped; the same command goes on from here"
MOST_PROCESSES = 65536
NEGATIVE = re.compile(r"-\.?\d[\d.,e+-]*$")  # values, not flags: -1, -1e-3, -12,-12

Settings = TypeVar("Settings")


class _Modules:
    """The modules of a package, each imported when it is first used: so a script answers --help without PyTorch."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> ModuleType:
        if name.startswith("_"):
            raise AttributeError(name)
        return import_module(f"{self._package}.{name}")


cli, profiling = _Modules("ldm.cli"), _Modules("ldm.profiling")


class Parser(argparse.ArgumentParser):
    """Raises BadInput instead of ending the process; takes no shortened flags.

    intermixed: positional arguments may stand between flags.
    """

    def __init__(self, intermixed: bool = False, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._negative_number_matcher = NEGATIVE
        self.intermixed = intermixed
        self.add_argument("--version", action=Version, nargs=0, help="print the versions and exit")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parse = self.parse_intermixed_args if self.intermixed else super().parse_args
        return parse(args, namespace)

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
        return own.union(*(parser.flags() for parser in self._subparsers_below()))

    def _subparsers_below(self) -> list[Parser]:
        below = (action.choices.values() for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return [parser for parsers in below for parser in parsers]

    def flag(self, setting: str) -> str:
        """The flag of a setting or what the help calls it, else the flag of its name, or its own name."""
        same = (f"--{setting}", f"--{setting.replace('_', '-')}")
        named = next((flag for flag in same if flag in self.flags()), setting)
        for action in self._actions:
            if action.dest == setting and action.option_strings:
                long = [flag for flag in action.option_strings if flag.startswith("--")]
                return next((flag for flag in long if flag in same), (long or action.option_strings)[0])
            if action.dest == setting and isinstance(action.metavar, str):
                return action.metavar
        return next((flag for flag in (p.flag(setting) for p in self._subparsers_below()) if flag != setting), named)


class Version(argparse.Action):
    """Prints the versions; they are looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        print(", ".join(f"{package} {installed(package)}" for package in (PACKAGE, "torch")))
        parser.exit()


def installed(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def settings_from(args: argparse.Namespace, kind: Callable[..., Settings], **others: Any) -> Settings:
    """A dataclass whose fields have the values of the arguments of the same names, or the others' values."""
    names = [field.name for field in fields(kind) if field.name not in others]
    return kind(**{name: getattr(args, name) for name in names}, **others)


# Types of arguments


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


def whole(low: int, high: int, accepted: str = "a whole number") -> Callable[[str], Any]:
    """An argparse type: a whole number in low..high. What is counted has a limit, so that no count takes all memory."""
    return number(int, low, high, f"{accepted} in {low}..{high}")


MOST = 1_000_000  # images of one run, and whatever else is counted
MOST_STEPS = 10_000  # of a solver; no training has more timesteps
LARGEST_SIDE = 2**14  # pixels of an image, or positions of a latent
SMALLEST_TILE = 16  # pixels; with smaller ones decoding takes forever

count = whole(1, MOST)
step_count = whole(1, MOST_STEPS)
side = whole(1, LARGEST_SIDE)
scale_value = number(float, -1000, 1000, "a number in -1000..1000")
finite = number(float, -sys.float_info.max, sys.float_info.max, "a finite number")


def parallel(text: str) -> int | None:
    """An argparse type: a whole number, or None for auto."""
    return None if text == "auto" else whole(1, MOST, "auto or a whole number")(text)


def interval(text: str) -> tuple[float, float]:
    """An argparse type: two timesteps, LOW,HIGH."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be LOW,HIGH, two timesteps such as 200,800; got {text!r}")
    return finite(low), finite(high)


def two(kind: Callable[[str], int]) -> Callable[[str], tuple[int, int]]:
    """An argparse type: two of a kind, A,B."""

    def parse(text: str) -> tuple[int, int]:
        first, comma, second = text.partition(",")
        if not comma:
            raise argparse.ArgumentTypeError(f"expected two numbers such as 1024,768; got {text!r}")
        return kind(first), kind(second)

    return parse


def thresholds(text: str) -> tuple[float, float]:
    """An argparse type: two numbers of at least 0, LOW,HIGH."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"must be LOW,HIGH, two numbers such as 100,200; got {text!r}")
    one = number(float, 0, sys.float_info.max, "a number >= 0")
    return one(low), one(high)


def timesteps(text: str) -> tuple[int, ...]:
    """An argparse type: training timesteps, T,T,..."""
    one = whole(0, MOST_STEPS)
    return tuple(map(one, text.split(",")))


def weighted_file(text: str) -> tuple[str, float]:
    """An argparse type: FILE or FILE:WEIGHT."""
    path, colon, weight = text.rpartition(":")
    try:
        float(weight)
    except ValueError:
        path = ""
    return (path, scale_value(weight)) if path else (text, 1.0)


# Numbers in the environment


def stated(env: Mapping[str, str], name: str, default: int, low: int, high: int = MOST_PROCESSES) -> int:
    """A number in low..high that an environment variable states; the default if it is not set, or empty.

    Raises:
        BadInput: another value.
    """
    try:
        return whole(low, high)(env.get(name) or default)
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"environment variable {name}: {error}; torchrun and SLURM set it") from None


def torchrun_ranks() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, as torchrun states them; without it one process, alone.

    Raises:
        BadInput: what it states can't be.
    """
    size = stated(os.environ, "WORLD_SIZE", 1, 1)
    rank, local = (stated(os.environ, name, 0, 0, size - 1) for name in ("RANK", "LOCAL_RANK"))
    return rank, size, local


# The run of a command


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


def run_command(
    parser: Parser,
    run: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    stopped: str = "stopped",
) -> int:
    """Parse a command line and do its work; errors name arguments by their flags.

    Args:
        parser: with the command's name as `prog`.
        run: does the work; its result, if it has one, is the exit code.
        argv: None = the process's.
        stopped: what to say if the user interrupts it.

    Returns:
        The exit code.
    """
    code: int | None = 0

    def work() -> None:
        nonlocal code
        try:
            code = run(parser.parse_args(argv))
        except SettingError as error:
            raise BadInput(error.message(parser.flag)) from error

    return command(parser.prog, work, stopped) or code or 0


def command(name: str, run: Callable[[], None], stopped: str = "stopped") -> int:
    """Do the work of a command line; its exit code.

    Args:
        name: of the script, for messages.
        run: does the work.
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
        what = readable(str(error)) or "a list"
        print(f"{name}: error: not enough memory for all of it at a time: {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    return 0


# Places to write


def check_output(path: str | None, flag: str = "--out") -> None:
    """It must be possible to write the file; found out before the work.

    Raises:
        BadInput: it is not.
    """
    if path is None:
        return
    with blame(flag, (OSError,)):  # a name that no file can have
        place = next(p for p in Path(path).absolute().parents if p.exists())
        if Path(path).is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
            raise BadInput(f"{flag}: can't write {path}; expected a file in a writable directory")


def check_outdir(outdir: Path, flag: str = "--outdir") -> None:
    """It must be possible to write there; nothing is left behind by finding out.

    Raises:
        BadInput: it is not.
    """
    with blame(flag, (OSError,)):  # a name that no file can have
        place = next(p for p in (outdir, *outdir.absolute().parents) if p.exists())
    if not place.is_dir():
        raise BadInput(f"{flag}: {place} is a file; expected a directory")
    try:
        clean(place)
        with unfinished(place):
            pass
    except OSError as error:
        raise BadInput(f"{flag}: can't write to {outdir}: {error.strerror}") from error
