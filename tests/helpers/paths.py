"""Where the project's files are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
GOLDENS = ROOT / "tests" / "goldens"
EMOJI64 = ROOT / "models" / "ldm" / "emoji64"
