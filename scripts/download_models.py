"""Download published checkpoints to where the scripts look for them.

    python scripts/download_models.py --list
    python scripts/download_models.py sd-v1-5 kl-f8
    python scripts/download_models.py --verify

To continue a download that was stopped, run the same command again. Each model has its own licence, see --list.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tqdm import tqdm

from ldm.cli.parser import GO_ON, Parser, run_command
from ldm.io.errors import BadInput, did_you_mean, fault_of
from ldm.io.files import PROJECT_ROOT

if TYPE_CHECKING:
    from ldm.checkpoint.published import Published

# What can be said of a file whose publisher states no SHA-256.
UNPROVEN = "no published SHA-256 to hold it to; its size, first bytes and table of contents are those of weights"


def parser() -> Parser:
    p = Parser(prog="download_models.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help="models to download, list or verify")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="list all models and show which of them are on this machine")
    what.add_argument(
        "--verify", action="store_true", help="check the SHA-256 of files (default: of all that are here)"
    )
    p.add_argument(
        "--root",
        default=PROJECT_ROOT,
        type=Path,
        metavar="DIR",
        help="folder that the models' paths start from (default: the project)",
    )
    p.add_argument("--manifest", metavar="YAML", help="list of the models (default: models/published.yaml)")
    return p


def chosen(manifest: Mapping[str, Published], names: Sequence[str]) -> list[Published]:
    """The models of these names; without names all."""
    for name in names:
        if name not in manifest:
            raise BadInput(f"NAME: {name!r} is not one of {', '.join(manifest)}{did_you_mean(name, manifest)}")
    return [manifest[name] for name in names or manifest]


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


def download_model(model: Published, root: Path, fetch: Callable[..., None]) -> None:
    """Download a model unless it is here; `fetch` is `ldm.checkpoint.download.fetch_any`."""
    target = model.file(root)
    if target.is_file():
        print(f"{target}: is here (--verify checks its SHA-256)")
        return
    print(f"{model.name}: {model.about}. Licence: {model.licence}", flush=True)
    with tqdm(desc=model.name, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            fetch(model.urls, target, model.sha256, progress)
        except OSError as error:
            raise BadInput(f"{model.name}: {error}. If you get the file elsewhere, put it at {target}") from error
    print(f"{target}: {'as published' if model.sha256 else 'here; ' + UNPROVEN}")


def run(args: argparse.Namespace) -> int:
    """List, verify or download; 1 if a file is not as published."""
    from ldm.checkpoint import download, published

    with fault_of("manifest"):
        manifest = published.load_manifest(args.manifest or published.MANIFEST)
    models = chosen(manifest, args.names)
    with fault_of("root", (OSError,)):
        if args.list:
            show(models, args.root)
            return 0
        if args.verify:
            return int(bool(verify(models, args.root, named=bool(args.names))))
        if not args.names:
            raise BadInput("NAME: name the models to download; --list shows what there is")
        for model in models:
            download_model(model, args.root, download.fetch_any)
    return 0


main = partial(run_command, parser(), run, stopped=GO_ON)

if __name__ == "__main__":
    sys.exit(main())
