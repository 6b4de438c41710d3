"""The published checkpoints listed in `models/published.yaml`, and which of them are downloaded."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from ldm.checkpoint.file import CheckpointError, weight_format
from ldm.io.errors import shown
from ldm.io.files import PROJECT_ROOT, AboveZero, FileError, Schema, Text, file_sha256, parse, read_yaml

MANIFEST = PROJECT_ROOT / "models" / "published.yaml"


class ManifestError(ValueError):
    """An invalid list of published checkpoints."""


def _address(url: str) -> str:
    """Raises ValueError unless it is an http or https address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and re.fullmatch(r"\S+", url)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"should be an http or https address; got {url!r}")
    return url


def _inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"should lie inside the project; got {path}")
    return path


class Published(Schema):
    """A published checkpoint; see the head of `models/published.yaml` for its fields."""

    name: Text
    about: Text
    config: Text
    licence: Text
    path: Annotated[Text, AfterValidator(_inside)]
    urls: Annotated[list[Annotated[str, AfterValidator(_address)]], Field(min_length=1)]
    gb: AboveZero | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    def file(self, root: Path = PROJECT_ROOT) -> Path:
        return root / self.path

    def status(self, root: Path = PROJECT_ROOT, verify: bool = False) -> str:
        """Whether the file is there: "absent" or "present".

        With `verify`, which reads the file: "verified", "wrong" (another SHA-256, truncated, or not a file of weights)
        or "unverifiable" (readable, but its SHA-256 is not known).
        """
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


def load_manifest(path: str | Path = MANIFEST) -> dict[str, Published]:
    """The entries of a manifest by name, in its order.

    Raises:
        FileNotFoundError: no such file.
        ManifestError: not YAML, or an entry has a missing, unknown or invalid field.
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
    except ValueError as error:
        raise ManifestError(f"{path}: {error}") from error


def _entry(name: str, entry: Any) -> Published:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} should be a mapping; got {shown(entry)}")
    return parse(Published, {"name": name, **entry}, name)


@cache
def published_sha256(path: Path) -> str | None:
    """The SHA-256 of the weights that are published for this place in the project; None if it is not known."""
    return next((model.sha256 for model in load_manifest().values() if model.file() == path), None)
