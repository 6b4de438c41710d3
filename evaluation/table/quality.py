"""How good a row's pictures are: the measures of its protocol on the folder of its run, each kept there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import adm, clip_score, fid
from evaluation.metrics import ModelError
from evaluation.metrics.adm import NEIGHBOURS
from evaluation.metrics.command import PROTOCOL
from evaluation.metrics.result import Result, ResultError, flat, read_result
from evaluation.protocols.protocol import Protocol
from evaluation.runs.images import ImageError
from evaluation.table.now import changed_at, clip_now, content, network_now, real_now
from evaluation.table.spec import Cell
from ldm.io.errors import BadInput, blame, flags_named
from ldm.io.files import json_sha256

if TYPE_CHECKING:
    from evaluation.metrics.retrieval import RealImages

PAPERS_NETWORK, PAPERS_SCORE = "inception-2015", "hessel-b32"
SPELT = {"efficientnet-lite0": "EfficientNet-lite0"}
OTHERWISE = {
    "fid": "Fréchet distance",
    "sfid": "spatial Fréchet distance",
    "inception_score": "class score",
    "precision": "precision",
    "recall": "recall",
}  # what columns are with another network
ADM = ("sfid", "inception_score", "precision", "recall")  # columns that only the ADM suite has
LEAST = {"fid": 2, "adm": NEIGHBOURS + 1}  # pictures that a measure needs, if more than one
RESAMPLES = 100  # for intervals of Fréchet distances
REAL_TIER, RANK = 2, 5


@dataclass(frozen=True)
class Quality:
    """What measures need beside pictures.

    protocol:  of the pictures; `named` is its name or file. data: the folder of its data.
    shared:    a folder for what all runs of the protocol share.
    inception, clip: weights, where the protocol's measures need them.
    """

    protocol: Protocol
    named: str
    data: Path
    shared: Path
    inception: str | None = None
    clip: str | None = None
    device: str = "auto"

    @property
    def of_emoji(self) -> bool:
        """There is no CLIP-score of this protocol, but its data say what each picture shows."""
        return "clip_score" not in self.protocol.metrics

    def heads(self) -> dict[str, str]:
        """Columns that are another measure here than in the paper, with what they are."""
        extractor, found = self._extractor[0], {}
        if extractor not in ("", PAPERS_NETWORK):
            found = {name: f"{what} ({SPELT.get(extractor, extractor)})" for name, what in OTHERWISE.items()}
        if self.of_emoji:
            found["clip_score"] = f"concept retrieval R@{RANK}"
        elif self._variant != PAPERS_SCORE:
            found["clip_score"] = f"CLIP-score ({self._variant})"
        if found:
            found["ftc"] = f"distance × s / {f'R@{RANK}' if self.of_emoji else 'CLIP'}"
        return found

    @property
    def _extractor(self) -> tuple[str, str]:
        """The network of Fréchet distances, and its resize; of a protocol that has none, nothing."""
        metrics = self.protocol.metrics
        extractor, _, resize = (metrics.get("adm") or metrics.get("fid") or [""])[0].partition("/")
        return extractor, resize

    def network(self) -> list[str]:
        """Flags that name the network of Fréchet distances."""
        extractor, resize = self._extractor
        weights = ["--weights", self.inception] if self.inception else []
        return ["--extractor", extractor, "--resize", resize, "--device", self.device, *weights]

    def reference(self) -> list[str]:
        """The real pictures, or their statistics, as arguments of the measures."""
        return [f"{PROTOCOL}{self.named}", "--data", str(self.data)]

    def measures(self, columns: list[str]) -> dict[str, Callable[[Path, Path], None]]:
        """By name, what writes a result of a folder of pictures (first argument) into a file (second)."""
        found: dict[str, Callable[[Path, Path], None]] = {}
        if any(name in columns for name in ADM):
            found["adm"] = self._adm
        elif "fid" in columns:
            found["fid"] = self._fid
        if "clip_score" in columns:
            found["retrieval" if self.of_emoji else "clip_score"] = self._retrieval if self.of_emoji else self._clip
        return found

    def cells(self, columns: list[str], run: Path, missing: bool) -> tuple[dict[str, Cell], dict[str, Result]]:
        """The columns' values of a run that is complete, and the results that they are of.

        Args:
            missing: measure what is not in the run's folder; else it is left out.
        """
        results = {}
        for name, measure in self.measures(columns).items():
            out = run / f"{name}.json"
            if missing and not out.is_file():
                with quietly():
                    measure(run / "samples", out)
            if out.is_file():
                with blame("--runs", (ResultError,)):
                    results[name] = read_result(out)
        values = {key: value for result in results.values() for key, value in result.values.items()}
        named = {
            "fid": "fid_real",
            "sfid": "sfid_real",
            "clip_score": "R@5" if self.of_emoji else self._score(),
            **{name: name for name in ADM[1:]},
        }
        return {
            name: (values[named[name]], values.get(f"{named[name]}_interval"))
            for name in columns
            if values.get(named.get(name)) is not None
        }, results

    def now(self, columns: list[str], needed: bool) -> dict[str, dict[str, Any]]:
        """What results would say now of network, resize and real pictures, by measure.

        Args:
            needed: all that the measures need must be there, found out before pictures are made; else what is not
                there is left out.
        """
        say = {
            "fid": self._distance_now,
            "adm": self._distance_now,
            "clip_score": self._score_now,
            "retrieval": self._retrieval_now,
        }
        return {name: say[name](needed) for name in self.measures(columns)}

    def _distance_now(self, needed: bool) -> dict[str, Any]:
        if not self._extractor[0]:
            raise BadInput(
                f"TABLE: protocol {self.protocol.name} has no metrics fid or adm, which say the network "
                f"of Fréchet distances"
            )
        with self._metrics_blamed():
            args = fid.parser().parse_args(["", "", *self.network()])
        if needed and "reference" in self.protocol.metrics:
            need(self.data / self.protocol.metrics["reference"], self)
        found = {"extractor": args.extractor, "resize": args.resize}
        changed = changed_at(self.inception)
        if needed or changed:
            with blame("--inception", (ModelError,)):
                found |= network_now(args.extractor, args.weights, args.resize, changed)
        return found | ({} if (real := self._real_now()) is None else {"reference": {"sha256": real}})

    def _real_now(self) -> str | None:
        """The hash of the real pictures, if they are there."""
        name = self.protocol.metrics.get("reference", self.protocol.data.get("pictures"))
        if name is None or (changed := changed_at(self.data / name)) is None:
            return None
        with blame("--data", (ImageError,)):
            return real_now(self.named, self.data, (json_sha256(self.protocol.asked()), changed))

    def _score_now(self, needed: bool) -> dict[str, Any]:
        with self._metrics_blamed():
            args = clip_score.parser().parse_args(self._clip_flags(""))
        found = {"measure": self._score(), "resize": args.resize}
        if needed:
            from evaluation.metrics.clip_score import VARIANTS, load_variant

            if self.clip is None:
                raise BadInput(
                    f"--clip: needed for CLIP-score: a folder with config.json and weights of "
                    f"{VARIANTS[self._variant].model}, from huggingface.co"
                )
            with flags_named({"weights": "--clip"}):
                load_variant(args.variant, args.weights, args.vocabulary, args.device)
        if (changed := changed_at(self.clip)) is None:
            return found
        with blame("--clip", (ModelError,)):
            return found | {"features_sha256": clip_now(self.clip, changed)}

    def _retrieval_now(self, needed: bool) -> dict[str, Any]:
        if "pictures" in self.protocol.data:
            real = content(self.data / self.protocol.data["pictures"])
            return {} if real is None else {"real": real}
        raise BadInput(
            f"TABLE: protocol {self.protocol.name} has neither metrics clip_score nor pictures in which "
            f"concepts could be found"
        )

    def _metrics_blamed(self) -> AbstractContextManager[None]:
        """Names that no measure knows are the protocol's fault."""
        return renamed(
            dict.fromkeys(("--extractor", "--resize", "--variant"), f"TABLE: protocol {self.protocol.name}: metrics")
        )

    # The measures

    def _fid(self, pictures: Path, out: Path) -> None:
        self._run(
            fid,
            [
                *self.reference(),
                str(pictures),
                *self.network(),
                "--bootstrap",
                str(RESAMPLES),
                "--cache",
                str(self.shared),
                "--out",
                str(out),
            ],
        )

    def _adm(self, pictures: Path, out: Path) -> None:
        self._run(
            adm, [*self.reference(), str(pictures), *self.network(), "--bootstrap", str(RESAMPLES), "--out", str(out)]
        )

    def _clip(self, pictures: Path, out: Path) -> None:
        self._run(clip_score, [*self._clip_flags(str(pictures)), "--out", str(out)])

    def _run(self, measure: Any, argv: list[str]) -> None:
        with renamed(
            {
                "--weights": "--clip" if measure is clip_score else "--inception",
                "REFERENCE": "--data",
                "SAMPLES": "--runs",
                "--out": "--runs",
            }
        ):
            measure.run(measure.parser().parse_args(argv))

    @property
    def _variant(self) -> str:
        return self.protocol.metrics["clip_score"][0]

    def _score(self) -> str:
        return f"clip_score_{self._variant}"

    def _clip_flags(self, pictures: str) -> list[str]:
        return [pictures, "--variant", self._variant, "--weights", str(self.clip), "--device", self.device]

    def _retrieval(self, pictures: Path, out: Path) -> None:
        """Concept retrieval: see evaluation/metrics/retrieval.py; against real images of tiers 1 and 2."""
        from evaluation.metrics.retrieval import compute

        with flags_named({"samples": "--runs", "extractor": "features"}):
            result = compute(pictures.parent, real_set(self.data), rank=RANK)
        with blame("--runs", (OSError,)):
            result.write(out)


def otherwise(result: Result, now: Mapping[str, Any]) -> str:
    """In words, that a result was not measured as it would be now; see `Quality.now`; nothing if it was."""
    kept = flat(result.protocol)
    differ = [f"{what}: {kept.get(what)}, now {value}" for what, value in flat(now).items() if kept.get(what) != value]
    return f"measured otherwise ({'; '.join(differ)})" if differ else ""


# The data

HOW_TO_GET = {
    "val2017": "val2017.zip of https://cocodataset.org/#download, unpacked there",
    "val2014": "val2014.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2017.json": "annotations_trainval2017.zip of https://cocodataset.org/#download, unpacked there",
    "captions_val2014.json": "annotations_trainval2014.zip of https://cocodataset.org/#download, unpacked there",
    "VIRTUAL_imagenet256_labeled.npz": "the reference batch of ImageNet 256 x 256 that is published with "
    "github.com/openai/guided-diffusion",
    "captions.json": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
    "pictures.npy": "python scripts/prepare_emoji.py --out data/emoji64 makes it",
}


def need(path: Path, quality: Quality) -> None:
    """A file or folder of the protocol's data must be there."""
    if not path.exists():
        raise BadInput(
            f"--data: {path} is not there, which {quality.protocol.name} needs: "
            f"{HOW_TO_GET.get(path.name, 'named by the protocol')}"
        )


@lru_cache(maxsize=1)
def real_set(data: Path) -> RealImages:
    """What retrieval finds: seen once by the network, for all rows."""
    from evaluation.metrics.retrieval import load_real_images

    with flags_named({"extractor": "features"}):
        return load_real_images(data, tier=REAL_TIER)


# Other command lines, used from here


@contextmanager
def quietly() -> Iterator[None]:
    """What other command lines print is no part of a table."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def renamed(flags: dict[str, str]) -> Iterator[None]:
    """Their flags under the names that they have here."""
    try:
        yield
    except BadInput as error:
        flag, colon, rest = str(error).partition(":")
        raise BadInput(f"{flags.get(flag, flag)}{colon}{rest}") from error
