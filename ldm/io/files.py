"""Files: read safely, their values checked, and written whole or not at all.

Text is UTF-8, with or without a byte order mark. Lines end with LF, CR LF or CR; other separators, such as U+2028, are
part of their line. Only regular files are read, because a FIFO or a device may never end.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ldm.io.errors import did_you_mean, shown

try:
    import fcntl
except ImportError:  # Windows: without locks, nothing is cleaned
    fcntl = None

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

INSTALLED_FILES = Path(__file__).resolve().parents[1] / "_project"  # where setup.py puts the folders beside ldm
# From here paths such as models/ldm/emoji64/config.yaml start, in a checkout as in an installation.
PROJECT_ROOT = INSTALLED_FILES if INSTALLED_FILES.is_dir() else INSTALLED_FILES.parents[1]
MOST_BYTES = 1 << 30  # of a text file
MOST_DEPTH = 64  # of nested lists and mappings
MOST_VALUES = 20_000_000  # in all of them; a value that YAML refers to again counts again
UNFINISHED, LOCK = ".unfinished-", ".lock"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
}


class FileError(ValueError):
    """A file that can't be read. The message is one line that begins with the file's name."""


class NotAFile(OSError):
    """A path that is not a regular file. The message is one line."""

    def __init__(self, path: str | Path, found: str) -> None:
        super().__init__(errno.EINVAL, f"{found}; expected a file", str(path))
        self.found = found

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # from one process to another
        return NotAFile, (self.filename, self.found)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


# Finding


def find_file(path: str | Path) -> Path:
    """A file that a config names, relative to the working directory or, if it is not there, to the project root.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    for candidate in (Path(path), PROJECT_ROOT / path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{path}: no such file, neither from {Path.cwd()} nor from {PROJECT_ROOT}")


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to the same place after following links; links in a loop lead to themselves."""
    return os.path.realpath(one) == os.path.realpath(other)


# Reading


def kind(path: str | Path) -> str | None:
    """What is at a path, after following links: "a folder", "a FIFO", ...; None for a regular file.

    Raises:
        OSError: nothing is there.
    """
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a special file")


def check_regular(path: str | Path) -> None:
    """Call this before opening a file.

    Raises:
        OSError: there is no file, or not a regular one.
    """
    if found := kind(path):
        raise NotAFile(path, found)


def read_bytes(path: str | Path) -> bytes:
    """The content of a text file.

    Raises:
        OSError: there is no file, or not a regular one. FileError: it has more than MOST_BYTES.
    """
    check_regular(path)
    if (size := os.stat(path).st_size) > MOST_BYTES:
        raise FileError(f"{path}: {size} bytes; a text file may have {MOST_BYTES} at most")
    return Path(path).read_bytes()


def read_text(path: str | Path) -> str:
    """The content of a text file, without a byte order mark; every line ends with LF.

    Raises:
        OSError, FileError: see `read_bytes`; also bytes that are not UTF-8.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path}: not UTF-8 text (byte {error.object[error.start]:#04x} at {error.start}); save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without their ends.

    Raises:
        OSError, FileError: see `read_text`.
    """
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    """Split the result of `read_text` into lines."""
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        pairs: builds an object from its names and values; None = a dict, in which the last of repeated names counts.
        line: number of the first line, for messages.

    Raises:
        FileError: not JSON, nested too deeply, or with a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise FileError(f"line {line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise FileError(f"line {line}: not JSON of at most {MOST_DEPTH} levels: nested deeper") from None
    except ValueError as error:  # a number of very many digits
        raise FileError(f"not JSON: {error}") from None
    _check_size(value)
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FileError("not JSON: a lone surrogate, half a character") from None
    return value


def read_json(path: str | Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises:
        OSError, FileError: see `read_text` and `parse_json`.
    """
    text = read_text(path)
    with _named(path):
        return parse_json(text, pairs)


def parse_json_lines(text: str) -> list[tuple[int, Any]]:
    """The values of JSON lines with their line numbers, from 0; empty lines are skipped.

    Raises:
        FileError: a line is not JSON; the message names it.
    """
    values = []
    for number, line in enumerate(split_lines(text)):
        if line.strip():
            values.append((number, parse_json(line, line=number + 1)))
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, made of plain values only.

    Raises:
        FileError: not YAML, nested too deeply, or too large after its references are resolved.
    """
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise FileError(f"not YAML of at most {MOST_DEPTH} levels: nested deeper") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"not YAML: {' '.join(str(error).split())}") from None
    _check_size(value)
    return value


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file; see `parse_yaml`.

    Raises:
        OSError, FileError: see `read_text` and `parse_yaml`.
    """
    text = read_text(path)
    with _named(path):
        return parse_yaml(text)


def read_config(path: str | Path) -> DictConfig | ListConfig:
    """A YAML file as OmegaConf reads it.

    Raises:
        OSError, FileError: see `read_yaml`.
    """
    import omegaconf  # slow, and most files are no configs

    text = read_text(path)
    with _named(path):
        parse_yaml(text)  # refuses what is nested too deeply or too large
        try:
            return omegaconf.OmegaConf.load(io.StringIO(text))
        except (yaml.YAMLError, omegaconf.errors.OmegaConfBaseException, ValueError, OSError) as error:
            raise FileError(f"not a YAML config: {' '.join(str(error).split())}") from None


@contextmanager
def _named(place: str | Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(f"{place}: {error}") from None


def _check_size(value: Any) -> None:
    """Raise FileError if lists and mappings are nested too deeply or hold too many values."""
    level, count = [[value]], 0
    for _ in range(MOST_DEPTH + 1):
        level = [
            child
            for held in level
            for child in (held.values() if isinstance(held, dict) else held)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
        count += sum(map(len, level))
        if count > MOST_VALUES:
            raise FileError(f"more than {MOST_VALUES} values")
    raise FileError(f"nested deeper than {MOST_DEPTH} levels")


def file_sha256(*paths: str | Path) -> str:
    """SHA-256 of the concatenated contents of files, hexadecimal.

    Raises:
        OSError: there is no such file, or not a regular one.
    """
    digest = hashlib.sha256()
    for path in paths:
        check_regular(path)
        with Path(path).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def json_sha256(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys, hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# Writing


def destination(path: str | Path) -> Path:
    """The path to write to, after following links.

    Raises:
        OSError: the links form a loop, or lead to something that is not a file.
    """
    path = Path(path)
    if path.exists() and (found := kind(path)):
        raise NotAFile(path, found)
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return path


@contextmanager
def atomic_write(path: str | Path, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path; its file is moved to `path` if the block succeeds.

    Links are followed. A device or a FIFO is written to, not replaced. The file's permissions follow the umask, also if
    its writer creates files for their owner alone, as safetensors does.

    Args:
        keep: do not replace an existing file, so that the first of several writers wins.

    Raises:
        OSError: it can't be written; a folder, socket or block device stands there; nobody reads the FIFO.
    """
    path = Path(path)
    if path.exists() and kind(path) in ("a FIFO", "a device"):
        with _written_to(path) as temporary:
            yield temporary
        return
    path = destination(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_once(path.parent)
    with unfinished(path.parent) as place:
        temporary = place / path.name
        yield temporary
        temporary.chmod(place.stat().st_mode & 0o666)  # a new folder's mode is 0o777 without the umask
        if keep:
            with suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)


def write_file(path: str | Path, content: bytes | str, keep: bool = False) -> None:
    """Write a file of these bytes, or of UTF-8 text, whole or not at all; see `atomic_write`."""
    with atomic_write(path, keep) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, values: Any, keep: bool = False) -> None:
    """Write JSON values, one a line; see `write_file`."""
    write_file(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n", keep)


@contextmanager
def _written_to(path: Path) -> Iterator[Path]:
    """Yield a temporary path; its content is written to a FIFO or device at the end."""
    # Without O_NONBLOCK, opening a FIFO would wait for a reader.
    target = os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb")
    with target, tempfile.TemporaryDirectory() as folder:
        os.set_blocking(target.fileno(), True)
        temporary = Path(folder) / f"content{path.suffix}"
        yield temporary
        with temporary.open("rb") as content:
            shutil.copyfileobj(content, target)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """Yield a new temporary folder inside `folder`, deleted at the end. A lock in it shows that this process is alive,
    see `clean`."""
    place, lock = _create(folder)
    try:
        yield place
    finally:
        lock.close()
        shutil.rmtree(place, ignore_errors=True)


def _create(folder: Path) -> tuple[Path, IO[bytes]]:
    while True:
        place = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
        place.mkdir()
        with suppress(FileNotFoundError):
            lock = (place / LOCK).open("xb")
            _lock(lock)
            if os.path.exists(lock.name):
                return place, lock
            lock.close()
        # Another process deleted it before it was locked.


def _lock(stream: IO[bytes], wait: bool = True) -> bool:
    """Lock an open file against other processes until it is closed or the process ends.

    Returns:
        whether that worked.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError:  # another process has it, or the file system knows no locks
        return False


def clean(folder: str | Path) -> None:
    """Delete the temporary folders of killed processes inside `folder`; those of running processes stay."""
    for left in Path(folder).glob(f"{UNFINISHED}*"):
        try:
            with (left / LOCK).open("rb+") as lock:
                dead = _lock(lock, wait=False)
        except FileNotFoundError:  # the lock is the first file to be written and may be the first to be deleted
            dead = True
        except OSError:  # another user's, or not ours
            dead = False
        if dead:
            shutil.rmtree(left, ignore_errors=True)


@cache
def _clean_once(folder: Path) -> None:
    clean(folder)


@contextmanager
def appending(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and appending; other processes that do so wait until the block ends.

    Raises:
        OSError: it can't be opened, or is not a regular file.
    """
    if os.path.exists(path):
        check_regular(path)
    with open(path, "a+b") as stream:
        _lock(stream)
        yield stream


@contextmanager
def alone(path: str | Path) -> Iterator[bool]:
    """Yield whether no other process is in such a block for this file, which is created if it is missing.

    Always True on systems without locks. The block may rename or delete the file.

    Raises:
        OSError: it can't be opened.
    """
    if fcntl is None:  # Windows renames no open file
        Path(path).touch()
        yield True
        return
    with open(path, "ab") as stream:
        # Another process may have renamed it before it was locked.
        yield _free(stream) and os.path.exists(path) and os.path.samestat(os.fstat(stream.fileno()), os.stat(path))


def _free(stream: IO[bytes]) -> bool:
    """Lock an open file; False if another process has locked it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system knows no locks
        pass
    return True


def add_line(stream: IO[bytes], line: bytes) -> None:
    """Append a line. If a crash left the last line unfinished, begin a new one."""
    if stream.seek(0, os.SEEK_END) > 0:
        stream.seek(-1, os.SEEK_END)
        line = line if stream.read(1) == b"\n" else b"\n" + line
    stream.write(line + b"\n")


# Types for the content of YAML and JSON files (plans, protocols, tables, run cards, ...), checked by pydantic. Values
# are not converted: "3" is not 3, true is not 1, NaN is not a number. An unknown name is an error.

T = TypeVar("T")


def _quoted(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"should be a text: in YAML off, on, yes and no need quotes; got {value}")
    return value


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), BeforeValidator(_quoted)]
Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[Number, Field(ge=0)]
AboveZero = Annotated[Number, Field(gt=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, lt=2**32)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Schema(BaseModel):
    """Base class: its fields are the names that a mapping in a file may have. Instances are immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, content: Any) -> Any:
        if isinstance(content, Mapping) and cls.model_config["extra"] == "forbid":
            check_names(content, cls.model_fields)
        return content


def check_names(names: Iterable[Any], accepted: Iterable[str]) -> None:
    """Raises ValueError for names that are not accepted."""
    accepted = list(accepted)
    if unknown := sorted({*map(str, names)} - {*accepted}):
        raise ValueError(
            f"has {', '.join(map(shown, unknown))}; accepted: {', '.join(accepted)}{did_you_mean(unknown[0], accepted)}"
        )


def parse(kind: type[T], content: Any, place: str = "") -> T:
    """The content of a file as a `Schema`, or as another type that pydantic knows.

    Args:
        place: where the content stands, for messages.

    Raises:
        ValueError: a wrong value; the message is one line that names the first one.
    """
    try:
        return TypeAdapter(kind).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(first_error(error, place)) from None


def first_error(error: ValidationError, place: str = "") -> str:
    """The first of pydantic's errors in one line: the name, what is accepted, what was given."""
    found = error.errors(include_url=False)[0]
    name = ".".join(filter(None, [place, *map(str, found["loc"])]))
    if found["type"] == "value_error":
        return f"{name} {found['ctx']['error']}".strip()
    if found["type"] == "missing":
        return f"{name} is missing"
    if found["type"] == "extra_forbidden":
        return f"{name} is not a name that is accepted here"
    mapping = found["type"] in ("model_type", "dict_type")
    wanted = "be a mapping" if mapping else found["msg"].partition(" should ")[2]
    problem = f" should {wanted}" if wanted else f": {found['msg']}"
    return f"{name or 'it'}{problem}; got {shown(found['input'])}"
