"""The published checkpoints that `models/published.yaml` lists, and which of them are here."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm.checkpoint.weight_file import CheckpointError, weight_format
from ldm.io.files import FileError, file_sha256, read_yaml
from ldm.io.kinds import TEXT, check, number, optional
from ldm.util import PROJECT_ROOT

MANIFEST = PROJECT_ROOT / "models" / "published.yaml"
KINDS = dict.fromkeys(("about", "config", "licence", "path"), TEXT) | {
    "gb": optional(number("a positive number", sys.float_info.min)),
    "sha256": optional(TEXT),
}


class ManifestError(ValueError):
    """A list of published checkpoints that can't be used."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint; see the head of `models/published.yaml` for its fields."""

    name: str
    about: str
    config: str
    licence: str
    path: str
    urls: tuple[str, ...]
    gb: float | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        try:
            check(f"{self.name}: ", vars(self), KINDS)
        except ValueError as error:
            raise ManifestError(str(error)) from error
        if not self.urls or not all(map(_is_address, self.urls)):
            raise ManifestError(f"{self.name}: urls must be http or https addresses; got {list(self.urls)}")
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ManifestError(f"{self.name}: path must lie inside the project; got {self.path}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ManifestError(f"{self.name}: sha256 must be 64 hexadecimal digits; got {self.sha256}")

    def file(self, root: Path = PROJECT_ROOT) -> Path:
        return root / self.path

    def status(self, root: Path = PROJECT_ROOT, verify: bool = False) -> str:
        """ "absent", "present", or with `verify`, which reads the file: "verified", "wrong" (also: cut off, or no file
        of weights) or "unverifiable" (readable, but there is no SHA-256)."""
        if not self.file(root).is_file():
            return "absent"
        if not verify:
            return "present"
        if self.sha256 is None:
            try:
                weight_format(self.file(root))
            except CheckpointError:
                return "wrong"
            return "unverifiable"
        return "verified" if file_sha256(self.file(root)) == self.sha256 else "wrong"


def _is_address(url: Any) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and re.fullmatch(r"\S+", url) is not None
    except (ValueError, TypeError, AttributeError):
        return False


def load_manifest(path: str | Path = MANIFEST) -> dict[str, Published]:
    """The entries of a manifest by name, in its order.

    Raises:
        FileNotFoundError: no such file.
        ManifestError: not YAML, or an entry lacks a field, has one that is not known, or one of another kind.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; expected a list of published checkpoints")
    try:
        content = read_yaml(path)
    except (FileError, OSError) as error:
        raise ManifestError(str(error)) from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: expected entries by name; got a {type(content).__name__}")
    try:
        return {str(name): _entry(str(name), entry) for name, entry in content.items()}
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from error


def _entry(name: str, entry: Any) -> Published:
    known = {field.name for field in fields(Published)} - {"name"}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("urls"), list):
        raise ManifestError(f"{name}: expected an entry with a list of urls and {', '.join(sorted(known - {'urls'}))}")
    if unknown := set(entry) - known:
        raise ManifestError(
            f"{name}: unknown {', '.join(sorted(map(str, unknown)))}; known: {', '.join(sorted(known))}"
        )
    if missing := known - {"gb", "sha256"} - set(entry):
        raise ManifestError(f"{name}: without {', '.join(sorted(missing))}")
    return Published(name, **{**entry, "urls": tuple(entry["urls"])})
