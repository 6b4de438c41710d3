"""The captions of a folder of images: in metadata.jsonl there or in its subfolders, in captions.json, in the manifest
of a run of ours, or in a text file beside each image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.io.files import FileError, parse_json_lines, read_json, read_lines, read_text


def captions_of_all(root: Path, paths: Sequence[Path]) -> list[list[str]]:
    """The captions of each of the image files below a folder.

    Raises:
        ValueError: an image without a caption.
    """
    found = captions_below(root, paths)
    missing = [path for path in paths if not found.get(path)]
    if missing:
        raise ValueError(
            f"{missing[0]}: no caption ({len(missing)} of {len(paths)} images have none); expected them in "
            f"metadata.jsonl or captions.json in {root}, or in {missing[0].with_suffix('.txt').name} beside it"
        )
    return [found[path] for path in paths]


def captions_below(root: Path, paths: Sequence[Path]) -> dict[Path, list[str]]:
    """The captions of the image files that have some."""
    described = [folder / "metadata.jsonl" for folder in sorted({root, *(path.parent for path in paths)})]
    if found := [of_lines(file.parent, file, ("file_name", "text")) for file in described if file.is_file()]:
        return {path: captions for each in found for path, captions in each.items()}
    mapping, manifest = root / "captions.json", root / "manifest.jsonl"
    if mapping.is_file():
        return of_mapping(root, mapping)
    if manifest.is_file():
        return of_lines(root, manifest, ("file", "prompt"))
    texts = {path: path.with_suffix(".txt") for path in paths}
    return {
        path: [line.strip() for line in read_lines(text) if line.strip()]
        for path, text in texts.items()
        if text.is_file()
    }


def of_lines(root: Path, file: Path, names: tuple[str, str]) -> dict[Path, list[str]]:
    """`names`: of the entries of a line that hold path and caption."""
    path, text = names
    found: dict[Path, list[str]] = {}
    for number, entry in ((at + 1, entry) for at, entry in parse_json_lines(read_text(file))):
        if not isinstance(entry, dict) or not isinstance(entry.get(path), str) or text not in entry:
            raise FileError(f'{file}: line {number}: expected {{"{path}": PATH, "{text}": CAPTION}}')
        found.setdefault(root / entry[path], []).extend(as_captions(entry[text], f"{file}: line {number}"))
    return found


def of_mapping(root: Path, file: Path) -> dict[Path, list[str]]:
    content = read_json(file)
    if isinstance(content, dict) and "annotations" in content:
        return {root / name: captions for name, captions in of_coco(content, file).items()}
    if not isinstance(content, dict):
        raise FileError(f"{file}: expected {{PATH: CAPTION}}, or COCO's images and annotations")
    return {root / name: as_captions(value, f"{file}: {name}") for name, value in content.items()}


def of_coco(content: dict[str, Any], file: Path) -> dict[str, list[str]]:
    """File names and their captions, from the content of a COCO file."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for note in content["annotations"]:
            found[names[note["image_id"]]].append(str(note["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise FileError(f"{file}: not COCO's captions: {error!r}") from error
    return found


def as_captions(value: Any, place: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
        raise FileError(f"{place}: expected a caption, or a list of captions")
    return [text.strip() for text in values]
