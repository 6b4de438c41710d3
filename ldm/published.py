"""The published checkpoints that `models/published.yaml` lists, and which of them are here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.files import file_sha256
from ldm.util import PROJECT_ROOT

MANIFEST = PROJECT_ROOT / "models" / "published.yaml"


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
        if not self.urls or not all(re.match("https?://", url) for url in self.urls):
            raise ManifestError(f"{self.name}: urls must be http or https addresses; got {list(self.urls)}")
        if Path(self.path).is_absolute() or ".." in Path(self.path).parts:
            raise ManifestError(f"{self.name}: path must lie inside the project; got {self.path}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ManifestError(f"{self.name}: sha256 must be 64 hexadecimal digits; got {self.sha256}")

    def file(self, root: Path = PROJECT_ROOT) -> Path:
        return root / self.path

    def status(self, root: Path = PROJECT_ROOT, verify: bool = False) -> str:
        """"absent", "present", or with `verify`, which reads the file: "verified", "wrong" or "unverifiable"."""
        if not self.file(root).is_file():
            return "absent"
        if not verify:
            return "present"
        if self.sha256 is None:
            return "unverifiable"
        return "verified" if file_sha256(self.file(root)) == self.sha256 else "wrong"


def load_manifest(path: str | Path = MANIFEST) -> dict[str, Published]:
    """The entries of a manifest by name, in its order.

    Raises:
        FileNotFoundError: no such file.
        ManifestError: not YAML, or an entry lacks a field, has one that is not known, or one of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a list of published checkpoints")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ManifestError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
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
        raise ManifestError(f"{name}: unknown {', '.join(sorted(map(str, unknown)))}; "
                            f"known: {', '.join(sorted(known))}")
    if missing := known - {"gb", "sha256"} - set(entry):
        raise ManifestError(f"{name}: without {', '.join(sorted(missing))}")
    return Published(name, **{**entry, "urls": tuple(map(str, entry["urls"]))})
