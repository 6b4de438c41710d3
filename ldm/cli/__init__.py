"""Command lines: arguments, checks, and the run that the sampling scripts share.

`from ldm import cli` gives all modules of this package, each imported when it is first used: so a script answers
--help without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
