"""The packages that the project asks for, and which of them are here; works without them."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from ldm.cli.parser import PACKAGE


@dataclass(frozen=True)
class Finding:
    """What a look at the installation finds.

    kind: "ok", "note" or "FAULT".
    text: what was found.
    hint: how to fix a fault.
    """

    kind: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.kind:6}{self.text}" + (f"\n      -> {self.hint}" if self.hint else "")


def packages() -> Iterator[Finding]:
    """The versions that the project asks for, as the installation knows them."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        wanted = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding("FAULT", f"{PACKAGE} is not installed", "pip install -e . in the project's folder")
        return
    missing: dict[str, list[str]] = {}
    found = []
    for line in wanted:
        name, extra = re.match(r"[\w.-]+", line)[0], re.search(r"""extra == ['"](\w+)""", line)
        try:
            found += [] if extra else [f"{name} {metadata.version(name)}"]
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.setdefault(extra[1] if extra else "", []).append(name)
    yield Finding("ok", ", ".join(found))
    for extra, names in missing.items():
        if extra:
            yield Finding("note", f"for pip install -e '.[{extra}]': {', '.join(names)} not installed")
        else:
            yield Finding("FAULT", f"not installed: {', '.join(names)}", "pip install -e . in the project's folder")
