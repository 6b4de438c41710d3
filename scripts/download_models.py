"""Download published checkpoints to where the scripts look for them.

    python scripts/download_models.py --list
    python scripts/download_models.py sd-v1-5 kl-f8
    python scripts/download_models.py --verify

A download that was stopped goes on with the same command. Each model has a licence of its own, see --list.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import urlsplit

from ldm.checkpoint.published import MANIFEST, Published, load_manifest
from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame, did_you_mean
from ldm.util import PROJECT_ROOT

# What can be said of a file whose publisher states no SHA-256.
UNPROVEN = "no published SHA-256 to hold it to; its size, first bytes and table of contents are those of weights"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to download, list or verify")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="say what there is and what is here (default: of all)")
    what.add_argument("--verify", action="store_true", help="hold files that are here to their SHA-256 (default: all)")
    parser.add_argument(
        "--root",
        default=PROJECT_ROOT,
        type=Path,
        metavar="DIR",
        help="folder that the models' paths start from (default: the project)",
    )
    parser.add_argument("--manifest", default=MANIFEST, metavar="YAML", help="(default: models/published.yaml)")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[Published]:
    with blame("--manifest"):
        manifest = load_manifest(args.manifest)
    for name in args.names:
        if name not in manifest:
            raise BadInput(f"NAME: {name!r} is not one of {', '.join(manifest)}{did_you_mean(name, manifest)}")
    return [manifest[name] for name in args.names or manifest]


def show(models: list[Published], root: Path) -> None:
    for model in models:
        size = "size unknown" if model.gb is None else f"{model.gb:.2f} GB"
        print(f"{model.name:25} {model.status(root):8} {size:13} {model.about}")
        print(f"{'':25} {model.licence}; {model.path}; {', '.join(sorted({urlsplit(u).netloc for u in model.urls}))}")


def verify(models: list[Published], root: Path, named: bool) -> list[str]:
    """What is wrong; absent files are, if they were asked for by name."""
    meaning = {
        "absent": "not here",
        "verified": "as published",
        "wrong": "NOT the published file; delete it and download it again",
        "unverifiable": f"here; {UNPROVEN}",
    }
    wrong = []
    if not named and all(model.status(root) == "absent" for model in models):
        print("none of the published models is here; --list shows them")
    for model in models:
        status = model.status(root, verify=True)
        if status != "absent" or named:
            print(f"{model.path}: {meaning[status]}", flush=True)
        if status == "wrong" or (status == "absent" and named):
            wrong.append(model.name)
    return wrong


def download(model: Published, root: Path) -> None:
    """From the first mirror that has it."""
    from tqdm import tqdm

    from ldm.checkpoint.download import DownloadError, fetch

    target, failures = model.file(root), []
    if target.is_file():
        print(f"{target}: is here (--verify holds it to its SHA-256)")
        return
    print(f"{model.name}: {model.about}. Licence: {model.licence}", flush=True)
    for url in model.urls:
        with tqdm(desc=model.name, unit="B", unit_scale=True, disable=None) as bar:

            def progress(done: int, total: int | None, bar: tqdm = bar) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                fetch(url, target, model.sha256, progress)
                print(f"{target}: {'as published' if model.sha256 else 'here; ' + UNPROVEN}")
                return
            except DownloadError as error:
                failures.append(f"{url}: {error}")
    raise BadInput(
        f"{model.name}: no mirror has it: {'; '.join(failures)}. If you get the file elsewhere, put it at {target}"
    )


def run(args: argparse.Namespace) -> list[str]:
    models = chosen(args)
    with blame("--root", (OSError,)):
        if args.list:
            show(models, args.root)
            return []
        if args.verify:
            return verify(models, args.root, named=bool(args.names))
        if not args.names:
            raise BadInput("NAME: name the models to download; --list shows what there is")
        for model in models:
            download(model, args.root)
    return []


def main(argv: list[str] | None = None) -> int:
    wrong: list[str] = []
    code = command(
        "download_models.py", lambda: wrong.extend(run(arguments(argv))), "stopped; the same command goes on from here"
    )
    return code or (1 if wrong else 0)


if __name__ == "__main__":
    sys.exit(main())
