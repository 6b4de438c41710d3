"""Download weights over HTTP. Interrupted transfers are resumed, files are written atomically, and anything that is not
a file of weights is discarded.

No library does this: pooch 1.9 begins an interrupted file anew. huggingface_hub 2.4 serves its own site only, where
fewer than half of the mirrors are; it resumes without If-Range, so a file that changed meanwhile is joined of two
versions, and it compares no SHA-256.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ldm.checkpoint.file import CheckpointError, weight_format
from ldm.io.files import alone, atomic_write, destination, file_sha256

TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 20
AGENT = "faster-diffusion-ldm"
REASONS = {401: "asks for a login", 403: "refuses access", 404: "not there", 410: "gone"}

Progress = Callable[[int, "int | None"], None]


class DownloadError(OSError):
    """A download that failed."""


class _OtherVersion(DownloadError):
    """The file on the server is not the one that the partial download is of."""


def fetch_any(
    urls: Sequence[str], target: Path, sha256: str | None = None, progress: Progress = lambda done, total: None
) -> None:
    """Download weights from the first address that has them; arguments as for `fetch`.

    Raises:
        DownloadError: none has them, with what each said.
        OSError: something that is no file stands at the target.
    """
    failures = []
    for url in urls:
        try:
            return fetch(url, target, sha256, progress)
        except DownloadError as error:
            failures.append(f"{url}: {error}")
    raise DownloadError(f"no mirror has it: {'; '.join(failures)}")


def fetch(url: str, target: Path, sha256: str | None = None, progress: Progress = lambda done, total: None) -> None:
    """Download weights from `url` to `target`.

    The partial download is kept beside the target in a `.part` file, whose name identifies the address and the
    server's version of the file. A later call resumes it, unless the file has changed on the server. A transfer that
    breaks off is resumed as long as each attempt gets further. If the server states no version (a strong ETag or
    Last-Modified), two parts might be of two files, so the download begins anew.

    Args:
        url: http or https; if it ends in .zip, its one .ckpt file becomes the target.
        target: file to write; its folder is created, links are followed.
        sha256: of the target's content, hexadecimal; None = not known. Size, first bytes and table of contents are
            always checked, see `weight_format`.
        progress: called with the bytes so far and the total (None = the server does not state it).

    Raises:
        DownloadError: no connection, an error of the server, no space on the disk, not a file of weights, another
            SHA-256, an archive without exactly one checkpoint, or another process is downloading it. The message
            says which, but not the address.
        OSError: the target exists and is not a file.
    """
    target = destination(target)
    with _whole_part(url, target, progress) as part:
        try:
            if urlsplit(url).path.endswith(".zip"):
                with atomic_write(target) as temporary:
                    _unpack(part, temporary)
                    _check(temporary, sha256)
            else:
                _check(part, sha256)
                part.replace(target)
        except DownloadError:
            part.unlink(missing_ok=True)
            raise
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.part"):  # of other versions and mirrors
        with alone(left) as mine:
            if mine:
                left.unlink()


@contextmanager
def _whole_part(url: str, target: Path, progress: Progress) -> Iterator[Path]:
    """Yield a part file with all bytes of `url`; during the block no other process uses it."""
    reached = -1
    while True:
        with _transfer(url, target, progress) as (part, total):
            size = part.stat().st_size
            if total in (size, None):
                yield part
                return
            if size > total:
                part.unlink()
                raise DownloadError(f"{size} bytes received, {total} announced; discarded")
            if size <= reached:
                raise DownloadError(f"the transfer broke off at {size} of {total} bytes; try again to resume it")
            reached = size


@contextmanager
def _transfer(url: str, target: Path, progress: Progress) -> Iterator[tuple[Path, int | None]]:
    """One attempt: yield the part file, and its final size in bytes (None = not known)."""
    with _open(url) as answer:
        version, total = _version(answer), _length(answer)
        target.parent.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(f"{url} {version} {total}".encode()).hexdigest()
        part = target.with_name(f"{target.name}.{identity[:12]}.part")
        with alone(part) as mine:
            if not mine:
                raise DownloadError("another process is downloading it; wait for that one")
            have = part.stat().st_size if total is not None and version is not None else 0
            if have == 0 or have > total:
                _copy(answer, part, 0, total, progress)
            elif have < total:
                answer.close()
                _go_on(url, part, have, version, total, progress)
            yield part, total


def _go_on(url: str, part: Path, have: int, version: str, total: int, progress: Progress) -> None:
    """Fetch the bytes from `have` on; all of them if the server does not support ranges."""
    try:
        with _open(url, have, version) as answer:
            header = "ETag" if version.startswith('"') else "Last-Modified"
            if answer.headers.get(header) not in (version, None):
                raise _OtherVersion("the file has changed on the server meanwhile; try again, it begins anew")
            if answer.status == 206:
                _check_range(answer, have, total)
            _copy(answer, part, have if answer.status == 206 else 0, total, progress)
    except _OtherVersion:
        part.unlink()
        raise


def _open(url: str, start: int = 0, version: str | None = None) -> http.client.HTTPResponse:
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            raise _OtherVersion(
                "the server does not have the rest of the file (HTTP 416); try again, it begins anew"
            ) from error
        raise DownloadError(f"HTTP {error.code}, {REASONS.get(error.code, error.reason)}") from error
    except (URLError, OSError, http.client.HTTPException) as error:
        raise DownloadError(f"no connection ({getattr(error, 'reason', None) or error})") from error
    except ValueError as error:  # an address that the server redirects to
        raise DownloadError(f"the server redirects to an invalid address ({error})") from error
    encoding = answer.headers.get("Content-Encoding", "identity")
    if answer.headers.get_content_type() == "text/html" or encoding != "identity":
        answer.close()
        raise DownloadError(
            "a web page, not a file"
            if encoding == "identity"
            else f"a response compressed with {encoding}, which was not requested"
        )
    return answer


def _length(answer: http.client.HTTPResponse) -> int | None:
    length = answer.headers.get("Content-Length")
    if length is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", length.strip()):
        raise DownloadError(f"the server's answer is damaged: Content-Length {length!r}")
    return int(length)


def _version(answer: http.client.HTTPResponse) -> str | None:
    """The server's version of a file. A weak ETag (W/) is none, since different bytes may share it."""
    etag = answer.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")


def _check_range(answer: http.client.HTTPResponse, start: int, total: int) -> None:
    stated = answer.headers.get("Content-Range") or ""
    if not re.fullmatch(rf"bytes {start}-{total - 1}/({total}|\*)", stated.strip()):
        raise _OtherVersion(
            f"the server sends other bytes than those asked for: Content-Range {stated!r}, expected "
            f"'bytes {start}-{total - 1}/{total}'; try again, it begins anew"
        )


def _check_room(folder: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        raise DownloadError(f"needs {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free in {folder}")


def _copy(answer: http.client.HTTPResponse, part: Path, start: int, total: int | None, progress: Progress) -> None:
    """Append to the part from `start` on; if the transfer breaks off, the part keeps what was received."""
    _check_room(part.parent, (total or 0) - start)
    done = start
    with part.open("ab" if start else "wb") as file:
        while block := _next(answer, total):
            file.write(block)
            done += len(block)
            progress(done, total)


def _next(answer: http.client.HTTPResponse, total: int | None) -> bytes:
    """The next bytes; none at the end, or if the transfer broke off, which the caller sees from the size."""
    try:
        return answer.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        if total is None:
            raise DownloadError(f"the transfer broke off ({error})") from error
        return b""


def _check(file: Path, sha256: str | None) -> None:
    try:
        weight_format(file)
    except CheckpointError as error:
        raise DownloadError(f"not a file of weights, discarded: {str(error).removeprefix(f'{file}: ')}") from error
    if sha256 is not None and (found := file_sha256(file)) != sha256:
        raise DownloadError(f"not the expected file, discarded: its SHA-256 is {found}, not {sha256}")


def _unpack(archive: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as files:
            found = [file for file in files.infolist() if file.filename.endswith(".ckpt")]
            if len(found) != 1:
                raise DownloadError(f"expected an archive with one .ckpt file; got {len(found)} of them")
            _check_room(target.parent, found[0].file_size)
            with files.open(found[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, BLOCK)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise DownloadError(f"not a zip archive, or a damaged one ({error})") from error
    except RuntimeError as error:  # a password, or a way to compress that Python does not know
        raise DownloadError(f"an archive that can't be unpacked ({error})") from error
