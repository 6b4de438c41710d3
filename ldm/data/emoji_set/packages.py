"""The emoji sets: their packages, styles and licences, and how they are fetched."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldm.io.errors import BadInput
from ldm.io.files import PROJECT_ROOT, clean, unfinished


@dataclass(frozen=True)
class Package:
    """A package of the npm registry."""

    name: str
    version: str
    wanted: tuple[str, ...]  # what is unpacked: paths inside the package, folders end with /

    @property
    def folder(self) -> str:
        return f"{self.name.strip('@').replace('/', '-')}-{self.version}"


@dataclass(frozen=True)
class Style:
    """A set of drawings."""

    name: str  # as captions say it
    package: Package
    license: str
    url: str
    attribution: str


GOOGLE = Package("emoji-datasource-google", "16.0.0", ("emoji.json", "img/google/64/"))
TWITTER = Package("emoji-datasource-twitter", "16.0.0", ("img/twitter/64/",))
FLUENT_3D = Package("@lobehub/fluent-emoji-3d", "1.1.0", ("assets/",))
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6", ("icons.json", "chars.json"))
OPENMOJI = Package("openmoji", "17.0.0", ("data/openmoji.json", "color/svg/"))
EMOJILIB = Package("emojilib", "4.0.3", ("dist/emoji-en-US.json",))
NOTO = Package("@iconify-json/noto", "1.2.9", ("icons.json", "chars.json"))
TWEMOJI = Package("@iconify-json/twemoji", "1.2.5", ("icons.json", "chars.json"))
OPENMOJI_ICONS = Package("@iconify-json/openmoji", "1.2.29", ("icons.json", "chars.json"))
# these know their images by name alone
NOTO_V1 = Package("@iconify-json/noto-v1", "1.2.5", ("icons.json",))
FLUENT = Package("@iconify-json/fluent-emoji", "1.2.7", ("icons.json",))
FXEMOJI = Package("@iconify-json/fxemoji", "1.2.2", ("icons.json",))
STREAMLINE = Package("@iconify-json/streamline-emojis", "1.2.4", ("icons.json",))

GOOGLE_URL, MICROSOFT_URL = "https://github.com/googlefonts/noto-emoji", "https://github.com/microsoft/fluentui-emoji"
MICROSOFT = "Fluent Emoji by Microsoft Corporation, packaged by"
FLUENT_3D_STYLE = Style("fluent 3d", FLUENT_3D, "MIT", MICROSOFT_URL, f"{MICROSOFT} LobeHub")
FLUENT_FLAT_STYLE = Style("fluent flat", FLUENT_FLAT, "MIT", MICROSOFT_URL, f"{MICROSOFT} Iconify")


@dataclass(frozen=True)
class Recipe:
    """What a dataset of one size is made of."""

    size: int  # pixels, as stored
    styles: tuple[Style, ...]
    varied: bool  # skin tones (tier 4), and captions that leave open what is drawn
    heldout: Path
    names: tuple[Package, Package, Package] = (GOOGLE, OPENMOJI, EMOJILIB)  # say what each emoji is

    @property
    def packages(self) -> list[Package]:
        return list(dict.fromkeys([*(s.package for s in self.styles), *self.names]))


EMOJI64 = Recipe(
    64,
    (
        Style("noto", GOOGLE, "Apache-2.0", GOOGLE_URL, "Noto Emoji by Google"),
        Style(
            "twemoji",
            TWITTER,
            "CC-BY-4.0",
            "https://github.com/jdecked/twemoji",
            "Twemoji by Twitter, Inc and other contributors",
        ),
        FLUENT_3D_STYLE,
        FLUENT_FLAT_STYLE,
        Style(
            "openmoji",
            OPENMOJI,
            "CC-BY-SA-4.0",
            "https://openmoji.org",
            "OpenMoji, the open-source emoji and icon project",
        ),
    ),
    False,
    PROJECT_ROOT / "models/ldm/emoji64/heldout.yaml",
)

EMOJI128 = Recipe(
    128,
    (
        Style("noto", NOTO, "Apache-2.0", GOOGLE_URL, "Noto Emoji by Google, packaged by Iconify"),
        Style("noto v1", NOTO_V1, "Apache-2.0", GOOGLE_URL, "Noto Emoji (v1) by Google, packaged by Iconify"),
        Style(
            "twemoji",
            TWEMOJI,
            "CC-BY-4.0",
            "https://github.com/jdecked/twemoji",
            "Twemoji by Twitter, Inc and other contributors, packaged by Iconify",
        ),
        Style("fluent", FLUENT, "MIT", MICROSOFT_URL, f"{MICROSOFT} Iconify"),
        FLUENT_FLAT_STYLE,
        FLUENT_3D_STYLE,
        Style(
            "openmoji",
            OPENMOJI_ICONS,
            "CC-BY-SA-4.0",
            "https://openmoji.org",
            "OpenMoji, the open-source emoji and icon project, packaged by Iconify",
        ),
        Style(
            "fxemoji",
            FXEMOJI,
            "Apache-2.0",
            "https://github.com/mozilla/fxemoji",
            "FxEmoji by Mozilla, packaged by Iconify",
        ),
        Style(
            "streamline",
            STREAMLINE,
            "CC-BY-4.0",
            "https://github.com/webalys-hq/streamline-vectors",
            "Streamline Emojis by Streamline, packaged by Iconify",
        ),
    ),
    True,
    PROJECT_ROOT / "models/ldm/emoji128/heldout.yaml",
)

RECIPES = {r.size: r for r in (EMOJI64, EMOJI128)}


def fetch(package: Package, cache: Path) -> Path:
    """The folder of the unpacked package, fetched with `npm pack` unless it is there already.

    Raises:
        BadInput: npm is not installed, the fetch failed, or the archive is broken.
    """
    folder = cache / package.folder
    if folder.is_dir():
        return folder
    spec = f"{package.name}@{package.version}"
    clean(cache)
    with unfinished(cache) as temporary, _explained(spec, package):
        command = ["npm", "pack", spec, "--silent", "--pack-destination", temporary]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
        [archive] = Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as tar:
            members = [m for m in tar if m.name.removeprefix("package/").startswith(package.wanted)]
            tar.extractall(temporary, members, filter="data")
        # the rename comes last, so that a folder in the cache is always a whole package
        (Path(temporary) / "package").rename(folder)
    return folder


@contextmanager
def _explained(spec: str, package: Package) -> Iterator[None]:
    """What can go wrong in a fetch, in words."""
    try:
        yield
    except FileNotFoundError as error:
        if error.filename == "npm":
            raise BadInput("npm is not installed; it comes with https://nodejs.org") from None
        raise BadInput(f"{spec} holds none of {', '.join(package.wanted)}") from None
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("npm error")]
        reason = lines[0] if lines else "npm gave no reason"
        raise BadInput(f"cannot fetch {spec}: {reason}") from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"npm took more than 15 minutes to fetch {spec}; try again") from None
    except (tarfile.TarError, ValueError) as error:
        raise BadInput(f"npm delivered a broken archive of {spec}: {error}") from None
