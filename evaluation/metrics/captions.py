"""The prompts that images were made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.runs.images import ImageError, ImageFolder, Images, settings_of
from ldm.io.errors import one_line
from ldm.io.files import parse_json_lines, read_json, read_lines, read_text

FILE_KEYS, TEXT_KEYS = ("file", "file_name", "image"), ("prompt", "caption", "text")


def prompts_of(images: Images, prompts: str | Path | Sequence[str] | None) -> list[str]:
    """The prompt of each image, in their order.

    Args:
        prompts: a prompt per image, in their order; or a file: text with a prompt per line in the order of the images;
            JSON lines with a file and a prompt each (such as manifest.jsonl); a JSON object file -> prompt. Its file
            names are paths in the images' folder, or names that fit one image only. None = what is stored in the
            images.

    Raises ImageError: no such file, images without a prompt, a file named twice, a name that fits several images, or
    another number of prompts than of images.
    """
    if prompts is None:
        files = images.files if isinstance(images, ImageFolder) else []
        stored = [(settings_of(file) or {}).get("prompt") for file in files]
        if not stored or None in stored:
            raise ImageError(f"{images.path}: images that don't state their prompt; name a file with the prompts")
        return stored
    if not isinstance(prompts, str | Path):
        check_number(prompts, images, f"{len(prompts)} prompts", "as many")
        return list(prompts)
    path = Path(prompts)
    try:
        if path.suffix == ".json":
            named = from_json(read_json(path, unrepeated))
        elif path.suffix == ".jsonl":
            named = from_json([entry for _, entry in parse_json_lines(read_text(path))])
        else:
            lines = [line.strip() for line in read_lines(path) if line.strip()]
            check_number(lines, images, f"{path}: has {len(lines)} prompts", "one line for each")
            return lines
    except ImageError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ImageError(f"{path}: not prompts: {one_line(error)}") from error
    return matched(named, images, path)


def matched(named: dict[str, str], images: Images, path: str | Path) -> list[str]:
    """The prompt of each image from those of files, by path or else by name, since a folder may have been moved."""
    others: dict[str, list[str]] = {}
    for file in named.keys() - {*images.names}:
        others.setdefault(Path(file).name, []).append(file)
    alike = Counter(Path(name).name for name in images.names if name not in named)
    found = {name: [name] if name in named else others.get(Path(name).name, []) for name in images.names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise ImageError(f"{path}: no prompt for {len(missing)} of {len(images.names)} images, such as {missing[0]}")
    for name, files in found.items():
        if name not in named and (len(files) > 1 or alike[Path(name).name] > 1):
            raise ImageError(
                f"{path}: {', '.join(sorted(files)[:2])}: by name fits several, such as {name}; "
                "expected paths in the folder of the images"
            )
    return [named[files[0]] for files in found.values()]


def check_number(prompts: Sequence[str], images: Images, what: str, expected: str) -> None:
    """Raise ImageError unless there is a prompt for each image."""
    if len(prompts) != len(images.names):
        raise ImageError(f"{what} for {len(images.names)} images in {images.path}; expected {expected}")


def from_json(content: Any) -> dict[str, str]:
    """Files -> prompts, from a JSON object or a list of entries."""
    if isinstance(content, dict):
        pairs = content.items()
    else:
        pairs = ((first(entry, FILE_KEYS), first(entry, TEXT_KEYS)) for entry in content)
    named = unrepeated((Path(file).as_posix(), text) for file, text in pairs)
    if not all(isinstance(text, str) for text in named.values()):
        raise ValueError("expected a text for every file")
    return named


def unrepeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping, in which no name may stand twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice; expected each once")
        found[name] = value
    return found


def first(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The entry's value under the first of these keys that it has."""
    found = next((entry[key] for key in keys if key in entry), None)
    if found is None:
        raise ValueError(f"an entry without {' or '.join(keys)}: it has {', '.join(entry)}")
    return found
