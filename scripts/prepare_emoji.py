"""Make the emoji pictures and captions that models/ldm/emoji64 and emoji128 are trained on.

    python scripts/prepare_emoji.py --out data/emoji64
    python scripts/prepare_emoji.py --size 128 --out data/emoji128

fetches the emoji sets with the npm client (npm must be on the PATH; a set that is already there is reused),
puts each picture on white at 64x64 or 128x128 and writes `pictures.npy` and `captions.json` (COCO captions).
At 64 there are five sets; at 128 nine, skin tones too. Which concepts are kept is listed in
scripts/emoji_concepts.yaml, what is held out in heldout.yaml of the model's folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.cli.parser import Parser, command
from ldm.cli.setup import check_outdir
from ldm.io.errors import BadInput
from ldm.io.files import atomic_write, clean, read_json, read_text, read_yaml, unfinished

ROOT = Path(__file__).resolve().parent.parent
CONCEPTS = Path(__file__).with_name("emoji_concepts.yaml")
RENDERED = 256  # pixels at which SVG is rendered before it is scaled down
KEYWORDS = 5  # most captions of a picture besides its name
SHARED = 4  # a keyword of more concepts than this says too little
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


# --------------------------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    wanted: tuple[str, ...]  # what is unpacked: paths inside the package, folders end with /

    @property
    def folder(self) -> str:
        return f"{self.name.strip('@').replace('/', '-')}-{self.version}"


@dataclass(frozen=True)
class Style:
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
# these know their pictures by name alone
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

    @property
    def packages(self) -> list[Package]:
        return list(dict.fromkeys([*(s.package for s in self.styles), GOOGLE, OPENMOJI, EMOJILIB]))


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
    ROOT / "models/ldm/emoji64/heldout.yaml",
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
    ROOT / "models/ldm/emoji128/heldout.yaml",
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
    with unfinished(cache) as temporary:
        try:
            subprocess.run(
                ["npm", "pack", spec, "--silent", "--pack-destination", temporary],
                check=True,
                capture_output=True,
                text=True,
                timeout=900,
            )
            [archive] = Path(temporary).glob("*.tgz")
            with tarfile.open(archive) as tar:
                members = [m for m in tar if m.name.removeprefix("package/").startswith(package.wanted)]
                tar.extractall(temporary, members, filter="data")
            # the rename comes last, so that a folder in the cache is always a whole package
            (Path(temporary) / "package").rename(folder)
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
    return folder


def concept_id(hexcode: str) -> str:
    """One spelling of an emoji's code points in all packages: upper case, no variation selector."""
    return "-".join(p for p in hexcode.upper().split("-") if p != "FE0F")


def sources(style: Style, folder: Path, codes: Mapping[str, str]) -> dict[str, Path | str]:
    """Where each concept's picture comes from: a file, or SVG markup.

    Args:
        codes: code points by `plain` name, for the icon sets that know their pictures by name alone.
    """
    if style.package.wanted[0] == "icons.json":
        icons = read_json(folder / "icons.json")
        named = "chars.json" not in style.package.wanted
        return iconify(icons, chars_by_name(icons, codes) if named else read_chars(folder))
    pictures = folder / style.package.wanted[-1]
    return {concept_id(path.stem): path for path in sorted(pictures.iterdir())}


def read_chars(folder: Path) -> dict[str, str]:
    """Icon names of an Iconify icon set by code point."""
    return read_json(folder / "chars.json")


def plain(name: str) -> str:
    """A name as sets with different spellings share it: 'T-Rex', 't_rex' and 'trex' are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def codes_by_name(charted: Iterable[Mapping[str, str]], emoji: list[dict], openmoji: list[dict]) -> dict[str, str]:
    """Code points by plain name; where sources disagree the first one counts: icon sets, CLDR, Unicode."""
    named = [(name, code) for chars in charted for code, name in chars.items()]
    named += [(e["annotation"], e["hexcode"]) for e in openmoji]
    named += [(name, e["unified"]) for e in emoji for name in (e["name"] or "", *e["short_names"])]
    codes: dict[str, str] = {}
    for name, code in named:
        codes.setdefault(plain(name), concept_id(code))
    return codes


def chars_by_name(icons: dict, codes: Mapping[str, str]) -> dict[str, str]:
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


def iconify(icons: dict, chars: Mapping[str, str]) -> dict[str, str]:
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


def picture(source: Path | str, size: int) -> np.ndarray:
    """The picture on white, (size, size, 3) uint8."""
    if isinstance(source, Path) and source.suffix == ".svg":
        source = read_text(source)
    if isinstance(source, str):
        import resvg_py

        source = io.BytesIO(
            resvg_py.svg_to_bytes(svg_string=source, width=RENDERED, height=RENDERED, skip_system_fonts=True)
        )
    from ldm.io.images import opened  # needs PyTorch; --help must answer at once

    with opened(source) as image:
        image = image.convert("RGBA")
    # white first, then scaling: transparent pixels hold arbitrary colours that scaling would pull in
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


# --------------------------------------------------------------------------------------------- words

MASS = frozenset(
    """
    bacon bread broccoli butter cereal coffee coral corn cutlery denim dna dung eyewear fire fog fondue
    garbage garlic grain ice judo kale karate lettuce lipstick luggage maize meat milk money oatmeal oden
    pasta poop popcorn porridge ramen rice sake salt soap spaghetti sushi tempura tennis thread timber
    trash treasure underwear vhs wheat whisky wood yarn""".split()
)
PLURAL = frozenset("dice children men women people teeth".split())
PREPOSITION = re.compile(r" (?:of|with|without|on|in|from|for|at|over|behind|blowing|holding|rolling|licking|and) ")
COLOURS = frozenset("black blue brown green orange pink purple red white yellow".split())
NO_ARTICLE = re.compile(r"(?:a|an|the|two|three|santa|mount|saturn|planet earth)(?= |$)")


def head_noun(name: str) -> str:
    """The word that decides between singular and plural: 'slice of pizza' -> 'slice'."""
    return PREPOSITION.split(name, maxsplit=1)[0].split()[-1]


def is_plural(noun: str) -> bool:
    return noun in PLURAL or (noun.endswith("s") and not noun.endswith(("ss", "us", "os")))


def phrase(name: str) -> str:
    """A name as one says it: 'Dog Face' -> 'a dog face', 'eyes' -> 'eyes', 'bread' -> 'bread'."""
    name = " ".join(re.sub(r"[“”\"!:,]", " ", name.lower().replace("’", "'").replace("_", " ")).split())
    noun = head_noun(name)
    if NO_ARTICLE.match(name) or noun in MASS or is_plural(noun):
        return name
    an = re.match(r"(?!one\b|one-|uni|eu|us|uf)[aeiou]|x-ray|hour|suv", name)
    return f"{'an' if an else 'a'} {name}"


def full_caption(words: str, style: str) -> str:
    return f"{words}, {style} style"


def telling(
    keywords: Iterable[str], name: str, accepted: Container[str], shared: Mapping[str, int], named: Container[str]
) -> list[str]:
    """The accepted keywords that point at this concept: of few concepts, and in no other concept's name."""
    own = words_of(name)
    return [
        k
        for k in keywords
        if k in accepted and shared[k] <= SHARED and all(w in own or w not in named for w in words_of(k))
    ]


def words_of(name: str) -> list[str]:
    return re.split(r"[ -]", name.lower())


# --------------------------------------------------------------------------------------------- concepts


@dataclass(frozen=True)
class Concept:
    id: str
    name: str  # CLDR name, as emoji_concepts.yaml lists it
    category: str
    tier: int
    phrases: tuple[str, ...]  # what captions say: the name, then keywords
    base: str  # the concept without skin tone, with which it is held out
    groups: tuple[str, ...]  # what captions say that leave the concept open: 'a heart', 'an animal'


def concepts_of(listed: dict, emoji: list[dict], openmoji: list[dict], lib: dict[str, list[str]]) -> list[Concept]:
    """Every concept that is kept, in the order of the emoji charts.

    Raises:
        BadInput: emoji_concepts.yaml lists a name or a group that no emoji has.
    """
    annotated = {concept_id(entry["hexcode"]): entry for entry in openmoji}
    by_id = {concept_id("-".join(f"{ord(c):X}" for c in char)): words for char, words in lib.items()}
    entries = {
        concept_id(e["unified"]): e
        for e in sorted(emoji, key=lambda e: e["sort_order"])
        if e["category"] not in ("Flags", "Component")
    }
    names = {id: annotated[id]["annotation"] if id in annotated else e["name"].lower() for id, e in entries.items()}
    check_listed(listed, set(names.values()), {e["subcategory"] for e in entries.values()})
    tiers = {id: tier_of(names[id], e["subcategory"], listed) for id, e in entries.items()}
    captioned = [id for id in entries if tiers[id] < 3]
    keywords = {id: agreed_keywords(annotated.get(id), by_id.get(id, ())) for id in captioned}
    shared = Counter(k for found in keywords.values() for k in set(found))
    named = {w for id in captioned for w in words_of(names[id])}

    def phrases(id: str) -> tuple[str, ...]:
        own = listed["names"].get(names[id], [names[id]])
        if tiers[id] == 3:
            return (phrase(own[0]),)
        found = telling(keywords[id], names[id], set(listed["keywords"]), shared, named)
        if entries[id]["subcategory"].startswith("face-") and "face" in own[0]:
            found = [f"{k} face" for k in found]
        return tuple(dict.fromkeys(map(phrase, own + found)))[: 1 + KEYWORDS]

    return [
        Concept(
            id,
            names[id],
            e["category"],
            tiers[id],
            phrases(id),
            id,
            colourless(names[id], tiers[id]) + tuple(listed["groups"].get(e["subcategory"], ())),
        )
        for id, e in entries.items()
        if e["category"] != "Symbols" or tiers[id] < 3
    ]


def skin_tones(concepts: Iterable[Concept], emoji: list[dict]) -> list[Concept]:
    """Tier 4: each concept in each skin tone, where the tone is one for the whole picture."""
    variants = {concept_id(e["unified"]): e.get("skin_variations", {}) for e in emoji}
    return [
        Concept(
            concept_id(variants[c.id][code]["unified"]),
            f"{c.name}: {tone} skin tone",
            c.category,
            4,
            (f"{c.phrases[0]} with {tone} skin tone",),
            c.id,
            (c.phrases[0], *c.groups),
        )
        for c in concepts
        for code, tone in SKIN_TONES.items()
        if code in variants[c.id]
    ]


def colourless(name: str, tier: int) -> tuple[str, ...]:
    """What to call a concept so that its colour is left open: 'red heart' -> 'a heart'; () if it names none."""
    rest = " ".join(w for w in name.split() if w not in COLOURS)
    return (phrase(rest),) if tier < 3 and rest not in ("", name) else ()


def tier_of(name: str, subcategory: str, listed: dict) -> int:
    if any(name in names for names in listed["tier1"].values()):
        return 1
    kept = subcategory in listed["subcategories"] and name not in listed["dropped"]
    return 2 if kept or name in listed["extra"] else 3


def check_listed(listed: dict, known: set[str], subcategories: set[str]) -> None:
    every = [n for names in listed["tier1"].values() for n in names]
    every += [*listed["iconic"], *listed["extra"], *listed["dropped"], *listed["names"]]
    for what, unknown in (("names", set(every) - known), ("groups", set(listed["groups"]) - subcategories)):
        if unknown:
            raise BadInput(f"{CONCEPTS.name} lists {what} that no emoji has: {', '.join(sorted(unknown))}")


def agreed_keywords(annotated: dict | None, lib: Iterable[str]) -> list[str]:
    """Keywords on which both sources agree, in emojilib's order (most telling first)."""
    if annotated is None:
        return []
    tags = {t.strip().lower() for t in f"{annotated['tags']},{annotated['openmoji_tags']}".split(",")}
    return [k for k in (w.replace("_", " ").lower() for w in lib) if k in tags]


# --------------------------------------------------------------------------------------------- the split


def share(*key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(key).encode()).digest()[:8], "big") / 2**64


def choose_heldout(concepts: list[Concept], iconic: Iterable[str], model: str, styles: Sequence[str]) -> str:
    """The text of heldout.yaml: about 5 % of the concepts of tiers 1 and 2, and 3 % of the other pairs."""
    captioned = [c for c in concepts if c.tier < 3]
    held = {c.id for c in captioned if c.name not in set(iconic) and share("concept", c.id) < 0.06}
    lines = [
        f"# Kept out of the training of {model}. scripts/prepare_emoji.py obeys this file.",
        "concepts:   # in no style",
    ]
    lines += [f'  "{c.id}": {json.dumps(c.name)}' for c in captioned if c.id in held]
    lines += ["pairs:      # not in these styles"]
    for concept in captioned:
        without = [s for s in styles if share("pair", concept.id, s) < 0.03]
        if without and concept.id not in held:
            lines.append(f'  "{concept.id}": [{", ".join(without)}]   # {concept.name}')
    return "\n".join(lines) + "\n"


def split_of(concept: str, style: str, heldout: dict) -> str:
    """'heldout_concept', 'heldout_pair' or 'train'."""
    if concept in heldout["concepts"]:
        return "heldout_concept"
    return "heldout_pair" if style in heldout["pairs"].get(concept, ()) else "train"


# --------------------------------------------------------------------------------------------- the dataset


def build(
    recipe: Recipe, concepts: list[Concept], found: Mapping[Style, dict[str, Path | str]], heldout: dict
) -> tuple[list[np.ndarray], dict]:
    """Pictures, each (size, size, 3) uint8, and the COCO captions that belong to them."""
    pictures, images, annotations = [], [], []
    for number, style in enumerate(recipe.styles, start=1):
        drawn = sorted((c for c in concepts if c.id in found[style]), key=lambda c: c.tier)
        seen = set()
        for concept in tqdm(drawn, desc=style.name, leave=False, disable=None):
            drawing = picture(found[style][concept.id], recipe.size)
            digest = hashlib.sha256(drawing).digest()
            if digest in seen:  # some sets draw one picture for several people or families
                continue
            seen.add(digest)
            row = len(images)
            pictures.append(drawing)
            images.append(
                {
                    "id": row,
                    "file_name": f"{style.name.replace(' ', '_')}/{concept.id}.png",
                    "height": recipe.size,
                    "width": recipe.size,
                    "license": number,
                    "concept": concept.id,
                    "name": concept.name,
                    "style": style.name,
                    "category": concept.category,
                    "tier": concept.tier,
                    "split": split_of(concept.base, style.name, heldout),
                }
            )
            for kind, words in captions_of(concept, recipe.varied):
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": row,
                        "phrase": words,
                        "caption": full_caption(words, style.name),
                        "kind": kind,
                    }
                )
    licenses = [
        {
            "id": i,
            "name": s.license,
            "url": s.url,
            "attribution": s.attribution,
            "package": f"{s.package.name}@{s.package.version}",
        }
        for i, s in enumerate(recipe.styles, start=1)
    ]
    return pictures, {
        "info": {"description": "Emoji pictures on white with captions", "version": "1"},
        "licenses": licenses,
        "images": images,
        "annotations": annotations,
    }


def captions_of(concept: Concept, varied: bool) -> list[tuple[str, str]]:
    """Kind and words of each caption: the name first."""
    name, *keywords = concept.phrases
    groups = [g for g in concept.groups if g not in concept.phrases] if varied else []
    return [("name", name), *(("keyword", k) for k in keywords), *(("group", g) for g in groups)]


def write(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_pictures(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """One .npy file, written picture by picture: at 128 all of them in one array would be 1 GB more of memory."""
    with atomic_write(path) as temporary:
        stored = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(pictures), *pictures[0].shape))
        for row, drawing in enumerate(pictures):
            stored[row] = drawing
        stored.flush()


def prepare(recipe: Recipe, out: Path, cache: Path) -> dict:
    """Make the dataset in `out`; returns the COCO captions."""
    cache.mkdir(parents=True, exist_ok=True)
    folders = {p: fetch(p, cache) for p in tqdm(recipe.packages, desc="packages", leave=False, disable=None)}
    listed = read_yaml(CONCEPTS)
    emoji, openmoji, lib = (read_json(folders[p] / p.wanted[0]) for p in (GOOGLE, OPENMOJI, EMOJILIB))
    concepts = concepts_of(listed, emoji, openmoji, lib)
    if not recipe.heldout.exists():
        text = choose_heldout(concepts, listed["iconic"], recipe.heldout.parent.name, [s.name for s in recipe.styles])
        write(recipe.heldout, text.encode())
    if recipe.varied:
        concepts += skin_tones(concepts, emoji)
    charted = [read_chars(folders[p]) for p in recipe.packages if "chars.json" in p.wanted]
    codes = codes_by_name(charted, emoji, openmoji)
    found = {s: sources(s, folders[s.package], codes) for s in recipe.styles}
    pictures, captions = build(recipe, concepts, found, read_yaml(recipe.heldout))
    write_pictures(out / "pictures.npy", pictures)
    write(out / "captions.json", json.dumps(captions, ensure_ascii=False).encode())
    return captions


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("resvg_py") is None:  # before anything is fetched
        raise BadInput('the package resvg-py is needed to draw SVG pictures: pip install -e ".[train]", or ".[eval]"')
    check_outdir(args.out, "--out")
    if args.cache is not None:
        check_outdir(args.cache, "--cache")
    try:
        images = prepare(RECIPES[args.size], args.out, args.cache or args.out / "packages")["images"]
    except OSError as error:
        raise BadInput(f"--out: {error}") from error
    for key in ("style", "tier", "category", "split"):
        print(f"{key}: " + ", ".join(f"{k} {n}" for k, n in sorted(Counter(i[key] for i in images).items())))
    print(f"{len(images)} pictures in {args.out}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Make the emoji dataset.")
    parser.add_argument("--size", type=int, choices=RECIPES, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the dataset (default: data/emoji64, or data/emoji128)")
    parser.add_argument("--cache", type=Path, help="folder of the fetched packages (default: OUT/packages)")
    args = parser.parse_args(argv)
    args.out = args.out or Path(f"data/emoji{args.size}")
    return args


def main(argv: list[str] | None = None) -> int:
    return command("prepare_emoji.py", lambda: run(arguments(argv)), "stopped; what was fetched is kept")


if __name__ == "__main__":
    sys.exit(main())
