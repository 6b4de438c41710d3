"""Files that come from outside, read with care; files that are written whole or not at all.

Text is UTF-8, with or without a byte order mark. Its lines end where editors end them (LF, CR LF or CR), and nowhere
else: a separator such as U+2028 belongs to its line. Only regular files are read: a FIFO or a device may never end.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and so nothing is cleaned
    fcntl = None

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

MOST_BYTES = 1 << 30  # of a text
MOST_DEPTH = 64  # of lists and mappings in each other
MOST_VALUES = 20_000_000  # in all of them; where YAML refers to a value again, it counts again
UNFINISHED, LOCK = ".unfinished-", ".lock"
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a block device",
}


class FileError(ValueError):
    """A file that can't be read; the message is one line and begins with the file's name."""


class NotAFile(OSError):
    """What stands at a path is no regular file; the message is one line."""

    def __init__(self, path: str | Path, found: str) -> None:
        super().__init__(errno.EINVAL, f"{found}; expected a file", str(path))
        self.found = found

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # from one process to another
        return NotAFile, (self.filename, self.found)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


# Reading


def kind(path: str | Path) -> str | None:
    """What stands at a path, links followed, if it is no regular file: "a folder", "a FIFO", ...

    Raises:
        OSError: nothing is there.
    """
    mode = os.stat(path).st_mode
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a special file")


def check_regular(path: str | Path) -> None:
    """To be called before a file is opened.

    Raises:
        OSError: nothing is there, or no regular file.
    """
    if found := kind(path):
        raise NotAFile(path, found)


def read_bytes(path: str | Path) -> bytes:
    """The content of a text file.

    Raises:
        OSError: it is not there, or no regular file. FileError: it is larger than any text is.
    """
    check_regular(path)
    if (size := os.stat(path).st_size) > MOST_BYTES:
        raise FileError(f"{path}: {size} bytes; a text has {MOST_BYTES} at most")
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
    """The lines of what `read_text` read."""
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, line: int = 1) -> Any:
    """The value of a JSON text.

    Args:
        pairs: makes an object of its names and values; None = a dict, where of repeated names the last counts.
        line: number of the text's first line, for messages.

    Raises:
        FileError: not JSON, nested too deep, or with half a character (a lone surrogate).
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
            raise FileError("not JSON: half a character, a lone surrogate") from None
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
        FileError: a line is not JSON; it says which.
    """
    values = []
    for number, line in enumerate(split_lines(text)):
        if line.strip():
            values.append((number, parse_json(line, line=number + 1)))
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, made of plain values only.

    Raises:
        FileError: not YAML, nested too deep, or with references that make too much of it.
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_text(path)
    with _named(path):
        parse_yaml(text)  # a bound on what follows
        try:
            return OmegaConf.load(io.StringIO(text))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
            raise FileError(f"not a YAML config: {' '.join(str(error).split())}") from None


@contextmanager
def _named(place: str | Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(f"{place}: {error}") from None


def _check_size(value: Any) -> None:
    """Raise FileError if lists and mappings lie too deep in each other, or hold too much."""
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
    """SHA-256 of the content of files, one after the other, hexadecimal.

    Raises:
        OSError: one is not there, or no regular file.
    """
    digest = hashlib.sha256()
    for path in paths:
        check_regular(path)
        with Path(path).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def json_sha256(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys, hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# Writing


def destination(path: str | Path) -> Path:
    """Where a file of this name is to be written: links are followed.

    Raises:
        OSError: the links lead nowhere, or to something that is no file.
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
    """Yield a temporary path; what is written there is at `path` only if the block succeeds.

    A link is followed. A device or a FIFO gets the bytes; it stays what it is. A file may be read by whom the umask
    says, even if its writer makes files for their owner alone, as safetensors does.

    Args:
        keep: a file of that name stays what it is, so that of several writers one wins.

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
        temporary.chmod(place.stat().st_mode & 0o666)  # of a new folder that is 0o777 without the umask
        if keep:
            with suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)


@contextmanager
def _written_to(path: Path) -> Iterator[Path]:
    """A temporary path whose content goes to a FIFO or device in the end."""
    # Not to wait for ever for a reader.
    target = os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb")
    with target, tempfile.TemporaryDirectory() as folder:
        os.set_blocking(target.fileno(), True)
        temporary = Path(folder) / f"content{path.suffix}"
        yield temporary
        with temporary.open("rb") as content:
            shutil.copyfileobj(content, target)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A new folder in the folder, for what is not ready yet; it is deleted in the end. Its lock shows others that its
    process is alive (`clean`)."""
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
        # Before it was locked, another process took it for a dead one's.


def _lock(stream: IO[bytes], wait: bool = True) -> bool:
    """Lock an open file against other processes until it is closed; whether that worked. A killed process's locks end
    with it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError:  # another process has it, or the file system knows no locks
        return False


def clean(folder: str | Path) -> None:
    """Delete what killed processes left unfinished in a folder; what living ones are at stays."""
    for left in Path(folder).glob(f"{UNFINISHED}*"):
        try:
            with (left / LOCK).open("rb+") as lock:
                dead = _lock(lock, wait=False)
        except FileNotFoundError:  # without a lock there is nothing in it yet, or some of it is deleted already
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
    """A file opened to read it and to add lines; other processes that want to wait until the block ends.

    Raises:
        OSError: it can't be opened, or is no regular file.
    """
    if os.path.exists(path):
        check_regular(path)
    with open(path, "a+b") as stream:
        _lock(stream)
        yield stream


@contextmanager
def alone(path: str | Path) -> Iterator[bool]:
    """Whether no other process is in such a block for this file, which is made; where there are no locks, it is
    taken for granted. The block may rename or delete the file.

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
    """Lock an open file, unless another process has."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system knows no locks
        pass
    return True


def add_line(stream: IO[bytes], line: bytes) -> None:
    """Add a line at the end; what a crash left of the last one stays by itself."""
    if stream.seek(0, os.SEEK_END) > 0:
        stream.seek(-1, os.SEEK_END)
        line = line if stream.read(1) == b"\n" else b"\n" + line
    stream.write(line + b"\n")
