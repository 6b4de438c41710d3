"""Results that say what they are of: values with the protocol that gave them; only like is compared with like.

The protocol is everything that moves a number without being the thing that is measured: measure, network, its
weights, resize, number of pictures, reference. How the samples were made (plan, seeds, weights of the model) is what a
comparison is about; it is kept beside.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.protocols.protocol import identity
from ldm.cli.parser import Parser, command
from ldm.io.errors import BadInput, blame
from ldm.io.files import atomic_write, read_json
from ldm.io.kinds import MAPPING, TEXT, check


class ResultError(ValueError):
    """Results that can't be read, or can't be compared."""


@dataclass(frozen=True)
class Result:
    """What a measure said.

    values:   name -> number, or a list of two for an interval. Names are explicit: fid_real, fid_vs_plain, ...
    protocol: what the values can only be compared under, JSON values.
    samples:  how the measured pictures were made, JSON values: plan, seeds, weights, ...; None = not known.
    warnings: what to bear in mind, in words.
    settings: of what moves no value, such as how often samples were resampled for an interval; JSON values.
    """

    values: Mapping[str, Any]
    protocol: Mapping[str, Any]
    samples: Mapping[str, Any]
    warnings: Sequence[str] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol_sha256(self) -> str:
        return identity(self.protocol)

    def json(self) -> dict[str, Any]:
        return {"protocol_sha256": self.protocol_sha256, **asdict(self)}

    def write(self, path: str | Path) -> None:
        """The file appears whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_result(path: str | Path) -> Result:
    """A result that `Result.write` wrote.

    Raises:
        ResultError: not such a file, or one that was changed: its protocol no longer has the hash it says.
    """
    try:
        content = read_json(path)
        stated = content.pop("protocol_sha256")
        result = Result(**content)
        check("", vars(result), {"values": MAPPING, "protocol": MAPPING, "samples": MAPPING, "settings": MAPPING})
        check("", {"protocol_sha256": stated}, {"protocol_sha256": TEXT})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: not a result: {' '.join(str(error).split())}") from error
    if result.protocol_sha256 != stated:
        raise ResultError(f"{path}: its protocol is not the one that its hash {stated[:12]} names; it was changed")
    return result


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields under dotted names."""
    out: dict[str, Any] = {}
    for key, value in fields.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def comparable(results: Mapping[str, Result]) -> None:
    """Results, by name, may stand in one table.

    Raises:
        ResultError: their protocols differ; it names the fields, and what each result has there.
    """
    protocols = {name: flat(result.protocol) for name, result in results.items()}
    fields = dict.fromkeys(key for protocol in protocols.values() for key in protocol)
    differ = [
        key
        for key in fields
        if len({json.dumps(protocol.get(key), sort_keys=True) for protocol in protocols.values()}) > 1
    ]
    if differ:
        parts = (
            f"{key} ({', '.join(f'{name}: {protocol.get(key)}' for name, protocol in protocols.items())})"
            for key in differ
        )
        raise ResultError(f"different protocols can't be compared; they differ in {'; '.join(parts)}")


# The command line


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="results.py", description="Print results side by side, if they were measured alike.")
    p.add_argument("results", nargs="+", metavar="JSON", help="files that the measures wrote with --out")
    return p


def run(args: argparse.Namespace) -> None:
    with blame("JSON", (ResultError,)):
        results = {path: read_result(path) for path in args.results}
        comparable(results)
    # Where it is known of some only, they are refused.
    if any(result.protocol.get("prompts") is None for result in results.values()):
        print(
            "warning: it is not known which prompts the pictures are of; whether they are alike is yours to say",
            file=sys.stderr,
        )
    for path, result in results.items():
        print(f"{path}  " + "  ".join(f"{name} {shown(value)}" for name, value in result.values.items()))


def shown(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        return "(" + " to ".join(map(shown, value)) + ")"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def publish(result: Result, out: str | None) -> None:
    """Say the values and the warnings, then write the file: if that fails, they have been said."""
    for name, value in result.values.items():
        print(f"{name:24} {shown(value)}")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.flush()
    if out is not None:
        try:
            result.write(out)
        except OSError as error:
            raise BadInput(f"--out: can't write {out}: {error.strerror or error}; the values are above") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command("results.py", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
