"""Fetch large files over HTTP: an interrupted transfer goes on where it stopped, a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ldm.files import atomic_write, file_sha256

TIMEOUT = 30            # seconds without a byte
BLOCK = 1 << 20
AGENT = "faster-diffusion-ldm"
REASONS = {401: "asks for a login", 403: "refuses access", 404: "not there", 410: "gone"}


class DownloadError(OSError):
    """A file that could not be had from an address."""


def fetch(url: str, target: Path, sha256: str | None = None,
          progress: Callable[[int, int | None], None] = lambda done, total: None) -> None:
    """Download `url` to `target`.

    What came so far is kept beside the target in a `.part` file, whose name holds the address and the server's
    version of the file: a later call goes on with it, unless the file has changed there. A transfer that breaks off
    is taken up again as long as each attempt gets further.

    Args:
        url: http or https; if it ends in .zip, its one .ckpt file becomes the target.
        target: file to write; its folder is made.
        sha256: what the target's content must have, hexadecimal; None = not known.
        progress: called with the bytes so far and in all (None = the server does not say).

    Raises:
        DownloadError: no connection, an error of the server, a web page in place of a file, another content than
            `sha256`, or an archive without exactly one checkpoint. The message says which, not the address.
    """
    part = _fetch_part(url, target, progress)
    try:
        if urlsplit(url).path.endswith(".zip"):
            with atomic_write(target) as temporary:
                _unpack(part, temporary)
                _check(temporary, sha256)
            part.unlink()
        else:
            _check(part, sha256)
            part.replace(target)
    except DownloadError:
        part.unlink(missing_ok=True)
        raise


def _fetch_part(url: str, target: Path, progress: Callable[[int, int | None], None]) -> Path:
    """All bytes of `url`, in a part file."""
    reached = -1
    while True:
        with _open(url) as answer:
            target.parent.mkdir(parents=True, exist_ok=True)
            part, total = _part_file(url, target, answer), _length(answer)
            have = part.stat().st_size if total is not None and part.is_file() else 0
            if have == 0:
                _copy(answer, part, 0, total, progress)
        if have and have != total:
            with _open(url, have) as answer:
                _copy(answer, part, have if _continues(answer, have) else 0, total, progress)
        size = part.stat().st_size
        if size == total or total is None:
            return part
        if size > total:
            part.unlink()
            raise DownloadError(f"{size} bytes came where the server had announced {total}; thrown away")
        if size <= reached:
            raise DownloadError(f"the transfer broke off at {size} of {total} bytes; try again to go on from there")
        reached = size


def _open(url: str, start: int = 0) -> http.client.HTTPResponse:
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        raise DownloadError(f"HTTP {error.code}, {REASONS.get(error.code, error.reason)}") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise DownloadError(f"no connection ({getattr(error, 'reason', None) or error})") from error
    if answer.headers.get_content_type() == "text/html":
        answer.close()
        raise DownloadError("a web page, not a file")
    return answer


def _length(answer: http.client.HTTPResponse) -> int | None:
    length = answer.headers.get("Content-Length")
    return None if length is None else int(length)


def _part_file(url: str, target: Path, answer: http.client.HTTPResponse) -> Path:
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
    identity = hashlib.sha256(f"{url} {version} {_length(answer)}".encode()).hexdigest()
    return target.with_name(f"{target.name}.{identity[:12]}.part")


def _continues(answer: http.client.HTTPResponse, start: int) -> bool:
    """Whether the server sends what was asked for; one that knows no ranges sends everything."""
    return answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {start}-")


def _copy(answer: http.client.HTTPResponse, part: Path, start: int, total: int | None,
          progress: Callable[[int, int | None], None]) -> None:
    """Append to the part from `start` on; a transfer that breaks off leaves what has come."""
    done = start
    with part.open("ab" if start else "wb") as file:
        while block := _next(answer, total):
            file.write(block)
            done += len(block)
            progress(done, total)


def _next(answer: http.client.HTTPResponse, total: int | None) -> bytes:
    """The next bytes; none at the end, or where the transfer broke off, which the number of bytes tells."""
    try:
        return answer.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        if total is None:
            raise DownloadError(f"the transfer broke off ({error})") from error
        return b""


def _check(file: Path, sha256: str | None) -> None:
    if sha256 is not None and (found := file_sha256(file)) != sha256:
        raise DownloadError(f"another file than expected, thrown away: its SHA-256 is {found}, not {sha256}")


def _unpack(archive: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as files:
            names = [name for name in files.namelist() if name.endswith(".ckpt")]
            if len(names) != 1:
                raise DownloadError(f"expected an archive with one .ckpt file; got {len(names)} of them")
            with files.open(names[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"not a zip archive, or a damaged one ({error})") from error
