"""Which text each measured picture was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation.runs.errors import PictureError
from evaluation.runs.images import Folder, Pictures, settings_of
from ldm.io.errors import one_line
from ldm.io.files import parse_json_lines, read_json, read_lines, read_text

FILE_KEYS, TEXT_KEYS = ("file", "file_name", "image"), ("prompt", "caption", "text")


def prompts_of(pictures: Pictures, path: str | Path | None) -> list[str]:
    """A text for each picture, in their order.

    Args:
        path: a text file with one prompt per line, in the order of the pictures; JSON lines with a file and a prompt
            each (such as manifest.jsonl); a JSON object file -> prompt; None = what is in the pictures themselves.
            A file is a path in the pictures' folder, or another with the same name if only one has it.

    Raises:
        PictureError: no such file, pictures without a prompt, a file named twice, a name that fits several, or as
            many lines as there are not pictures.
    """
    if path is None:
        return from_settings(pictures)
    try:
        if Path(path).suffix not in (".json", ".jsonl"):
            return from_lines(read_lines(path), pictures, path)
        named = (
            from_json(read_json(path, unrepeated))
            if Path(path).suffix == ".json"
            else from_json([entry for _, entry in parse_json_lines(read_text(path))])
        )
    except PictureError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PictureError(f"{path}: not prompts: {one_line(error)}") from error
    return matched(named, pictures, path)


def matched(named: dict[str, str], pictures: Pictures, path: str | Path) -> list[str]:
    """By path, and where that is not there by name, since a folder may have been moved."""
    others: dict[str, list[str]] = {}
    for file in named.keys() - {*pictures.names}:
        others.setdefault(Path(file).name, []).append(file)
    alike = Counter(Path(name).name for name in pictures.names if name not in named)
    found = {name: [name] if name in named else others.get(Path(name).name, []) for name in pictures.names}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise PictureError(
            f"{path}: no prompt for {len(missing)} of {len(pictures.names)} pictures, such as {missing[0]}"
        )
    for name, files in found.items():
        if name not in named and (len(files) > 1 or alike[Path(name).name] > 1):
            raise PictureError(
                f"{path}: {', '.join(sorted(files)[:2])}: by name fits several, such as {name}; "
                "expected paths in the folder of the pictures"
            )
    return [named[files[0]] for files in found.values()]


def from_lines(lines: list[str], pictures: Pictures, path: str | Path) -> list[str]:
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) != len(pictures.names):
        raise PictureError(
            f"{path}: has {len(lines)} prompts for {len(pictures.names)} pictures in {pictures.path}; "
            f"expected one line for each"
        )
    return lines


def from_json(content: Any) -> dict[str, str]:
    """Files -> prompts."""
    if isinstance(content, dict):
        pairs = content.items()
    else:
        pairs = ((first(entry, FILE_KEYS), first(entry, TEXT_KEYS)) for entry in content)
    named = unrepeated((Path(file).as_posix(), text) for file, text in pairs)
    if not all(isinstance(text, str) for text in named.values()):
        raise ValueError("expected a text for every file")
    return named


def unrepeated(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice; expected each once")
        found[name] = value
    return found


def first(entry: dict[str, Any], keys: tuple[str, ...]) -> Any:
    found = next((entry[key] for key in keys if key in entry), None)
    if found is None:
        raise ValueError(f"an entry without {' or '.join(keys)}: it has {', '.join(entry)}")
    return found


def from_settings(pictures: Pictures) -> list[str]:
    files = pictures.files if isinstance(pictures, Folder) else []
    prompts = [(settings_of(file) or {}).get("prompt") for file in files]
    if not prompts or None in prompts:
        raise PictureError(f"{pictures.path}: pictures that don't say their prompt; name a file with the prompts")
    return prompts
