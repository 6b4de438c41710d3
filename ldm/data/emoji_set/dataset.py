"""The dataset: images and captions of concepts in styles, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.data.emoji import read_dataset
from ldm.data.emoji_set.concepts import Concept, concepts_of, skin_tones
from ldm.data.emoji_set.drawings import codes_by_name, draw, read_chars, sources
from ldm.data.emoji_set.packages import Recipe, Style, fetch
from ldm.data.emoji_set.phrases import full_caption
from ldm.io.errors import SettingError, did_you_mean
from ldm.io.files import atomic_write, read_json, read_yaml, write_file


def share(*key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256("/".join(key).encode()).digest()[:8], "big") / 2**64


def choose_heldout(concepts: Sequence[Concept], iconic: Iterable[str], model: str, styles: Sequence[str]) -> str:
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


def split_of(concept: str, style: str, heldout: Mapping[str, Any]) -> str:
    """'heldout_concept', 'heldout_pair' or 'train'."""
    if concept in heldout["concepts"]:
        return "heldout_concept"
    return "heldout_pair" if style in heldout["pairs"].get(concept, ()) else "train"


def build(
    recipe: Recipe,
    concepts: Sequence[Concept],
    found: Mapping[Style, Mapping[str, Path | str]],
    heldout: Mapping[str, Any],
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Images, each (size, size, 3) uint8, and the COCO captions that belong to them."""
    drawings: list[np.ndarray] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, style in enumerate(recipe.styles, start=1):
        drawn = sorted((c for c in concepts if c.id in found[style]), key=lambda c: c.tier)
        seen = set()
        for concept in tqdm(drawn, desc=style.name, leave=False, disable=None):
            drawing = draw(found[style][concept.id], recipe.size)
            digest = hashlib.sha256(drawing).digest()
            if digest in seen:  # some sets draw one image for several people or families
                continue
            seen.add(digest)
            row = len(images)
            drawings.append(drawing)
            images.append(image_entry(row, number, style, concept, recipe.size, heldout))
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
    return drawings, {
        "info": {"description": "Emoji pictures on white with captions", "version": "1"},
        "licenses": [license_entry(i, style) for i, style in enumerate(recipe.styles, start=1)],
        "images": images,
        "annotations": annotations,
    }


def image_entry(
    row: int, license: int, style: Style, concept: Concept, size: int, heldout: Mapping[str, Any]
) -> dict[str, Any]:
    """What the captions file says of an image."""
    return {
        "id": row,
        "file_name": f"{style.name.replace(' ', '_')}/{concept.id}.png",
        "height": size,
        "width": size,
        "license": license,
        "concept": concept.id,
        "name": concept.name,
        "style": style.name,
        "category": concept.category,
        "subgroup": concept.subgroup,
        "tier": concept.tier,
        "split": split_of(concept.base, style.name, heldout),
    }


def license_entry(number: int, style: Style) -> dict[str, Any]:
    """What the captions file says of a style's licence."""
    return {
        "id": number,
        "name": style.license,
        "url": style.url,
        "attribution": style.attribution,
        "package": f"{style.package.name}@{style.package.version}",
    }


def captions_of(concept: Concept, varied: bool) -> list[tuple[str, str]]:
    """Kind and words of each caption: the name first."""
    name, *keywords = concept.phrases
    groups = [g for g in concept.groups if g not in concept.phrases] if varied else []
    return [("name", name), *(("keyword", k) for k in keywords), *(("group", g) for g in groups)]


def write_images(path: Path, images: Sequence[np.ndarray]) -> None:
    """One .npy file, written image by image: at 128 all of them in one array would be 1 GB more of memory."""
    with atomic_write(path) as temporary:
        stored = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(images), *images[0].shape))
        for row, drawing in enumerate(images):
            stored[row] = drawing
        stored.flush()


def write_files(dataset: Path, out: Path, only: str | None = None, max_tier: int | None = None) -> int:
    """Write the images of a dataset as PNG files, with their names as captions and their terms, as any folder of images
    has them: a folder for each style; how many.

    only: those of a split or of a concept; None = all.
    max_tier: those of tiers 1 to this; None = all.

    Raises:
        ValueError: the dataset can't be read, or none of its images is asked for. SettingError: it has no such split
            or concept.
    """
    pixels, coco = read_dataset(dataset)
    named = {note["image_id"]: note["caption"] for note in reversed(coco["annotations"])}  # the first one is the name
    terms = {one["id"]: f"{one['name']}\n{one['attribution']}\n{one['url']}\n" for one in coco["licenses"]}
    chosen = [image for image in coco["images"] if only in (None, image["split"], image["name"])]
    if not chosen:
        names = {image["name"] for image in coco["images"]}
        raise SettingError("only", f"{only!r} is no split or concept in {dataset}{did_you_mean(only, names)}")
    chosen = [image for image in chosen if max_tier is None or image["tier"] <= max_tier]
    if not chosen:
        which = "image" if only is None else f"image of {only}"
        raise ValueError(f"no {which} in {dataset} is of tiers 1 to {max_tier}")
    lines: dict[Path, list[str]] = {}
    for image in tqdm(chosen, desc="files", leave=False, disable=None):
        path = out / image["file_name"]
        if path.parent not in lines:
            write_file(path.parent / "LICENSE", terms[image["license"]])
        lines.setdefault(path.parent, []).append(json.dumps({"file_name": path.name, "text": named[image["id"]]}))
        with atomic_write(path) as temporary:
            Image.fromarray(pixels[image["id"]]).save(temporary, format="png")
    for folder, described in lines.items():
        write_file(folder / "metadata.jsonl", "\n".join(described) + "\n")
    return len(chosen)


def prepare(recipe: Recipe, out: Path, cache: Path, concepts_file: Path) -> dict[str, Any]:
    """Make the dataset in a folder; its COCO captions.

    Args:
        cache: folder of the fetched packages.
        concepts_file: which concepts are kept; scripts/emoji_concepts.yaml.

    Raises:
        BadInput: a package can't be fetched, or a name or a group is listed that no emoji has.
    """
    cache.mkdir(parents=True, exist_ok=True)
    folders = {p: fetch(p, cache) for p in tqdm(recipe.packages, desc="packages", leave=False, disable=None)}
    listed = read_yaml(concepts_file)
    emoji, openmoji, lib = (read_json(folders[p] / p.wanted[0]) for p in recipe.names)
    concepts = concepts_of(listed, emoji, openmoji, lib)
    if not recipe.heldout.exists():
        text = choose_heldout(concepts, listed["iconic"], recipe.heldout.parent.name, [s.name for s in recipe.styles])
        write_file(recipe.heldout, text.encode())
    if recipe.varied:
        concepts += skin_tones(concepts, emoji)
    charted = [read_chars(folders[p]) for p in recipe.packages if "chars.json" in p.wanted]
    codes = codes_by_name(charted, emoji, openmoji)
    found = {s: sources(s, folders[s.package], codes) for s in recipe.styles}
    images, captions = build(recipe, concepts, found, read_yaml(recipe.heldout))
    write_images(out / "pictures.npy", images)
    write_file(out / "captions.json", json.dumps(captions, ensure_ascii=False).encode())
    return captions
