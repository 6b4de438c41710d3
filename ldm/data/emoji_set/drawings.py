"""Where the drawing of each emoji is in a set, and how it becomes an image."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from ldm.data.emoji_set.packages import Style
from ldm.io.files import read_json, read_text
from ldm.io.images import opened

RENDERED = 256  # pixels at which SVG is rendered before it is scaled down
Entries = list[dict[str, Any]]  # of a set's JSON file


def concept_id(hexcode: str) -> str:
    """One spelling of an emoji's code points in all packages: upper case, no variation selector."""
    return "-".join(p for p in hexcode.upper().split("-") if p != "FE0F")


def sources(style: Style, folder: Path, codes: Mapping[str, str]) -> dict[str, Path | str]:
    """Where each concept's image comes from: a file, or SVG markup.

    Args:
        codes: code points by `plain` name, for the icon sets that know their images by name alone.
    """
    if style.package.wanted[0] == "icons.json":
        icons = read_json(folder / "icons.json")
        named = "chars.json" not in style.package.wanted
        return iconify(icons, chars_by_name(icons, codes) if named else read_chars(folder))
    images = folder / style.package.wanted[-1]
    return {concept_id(path.stem): path for path in sorted(images.iterdir())}


def read_chars(folder: Path) -> dict[str, str]:
    """Icon names of an Iconify icon set by code point."""
    return read_json(folder / "chars.json")


def plain(name: str) -> str:
    """A name as sets with different spellings share it: 'T-Rex', 't_rex' and 'trex' are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def codes_by_name(charted: Iterable[Mapping[str, str]], emoji: Entries, openmoji: Entries) -> dict[str, str]:
    """Code points by plain name; where sources disagree the first one counts: icon sets, CLDR, Unicode."""
    named = [(name, code) for chars in charted for code, name in chars.items()]
    named += [(e["annotation"], e["hexcode"]) for e in openmoji]
    named += [(name, e["unified"]) for e in emoji for name in (e["name"] or "", *e["short_names"])]
    codes: dict[str, str] = {}
    for name, code in named:
        codes.setdefault(plain(name), concept_id(code))
    return codes


def chars_by_name(icons: Mapping[str, Any], codes: Mapping[str, str]) -> dict[str, str]:
    """Icon names by code point for a set without: the icons whose name, or name without a number, is known."""
    names = [*icons["icons"], *icons.get("aliases", ())]
    chars: dict[str, str] = {}
    # FxEmoji's "dogside" is the whole dog, its "dog" the face
    whole = {name.removesuffix("side"): name for name in names if name.endswith("side")}
    spelled = {name: name + "face" if name in whole else name.removesuffix("side") for name in names}
    for spelling in (plain, lambda name: plain(re.sub(r"-\d+$", "", name))):
        for name in names:
            if (code := codes.get(spelling(spelled[name]))) is not None:
                chars.setdefault(code, name)
    return chars


def iconify(icons: Mapping[str, Any], chars: Mapping[str, str]) -> dict[str, str]:
    """SVG markup of each concept in an Iconify icon set."""

    def svg(name: str) -> str | None:
        name = icons.get("aliases", {}).get(name, {"parent": name})["parent"]
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )

    return {concept_id(code): markup for code, name in chars.items() if (markup := svg(name))}


def draw(source: Path | str, size: int) -> np.ndarray:
    """The image on white, (size, size, 3) uint8."""
    if isinstance(source, Path) and source.suffix == ".svg":
        source = read_text(source)
    if isinstance(source, str):
        source = io.BytesIO(
            resvg_py.svg_to_bytes(svg_string=source, width=RENDERED, height=RENDERED, skip_system_fonts=True)
        )
    with opened(source) as image:
        image = image.convert("RGBA")
    # white first, then scaling: transparent pixels hold arbitrary colours that scaling would pull in
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
