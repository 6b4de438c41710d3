"""Results: what they state, and which are compared."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from evaluation import results
from evaluation.metrics.result import Result, ResultError, read_result
from tests.helpers.measures import assert_one_line, load_json
from tests.helpers.paths import ROOT


def result(**changes) -> Result:
    return Result(
        {"fid_real": 1.5}, {"measure": "fid", "n": 10, "reference": {"sha256": "a", "n": 5}} | changes, {"plan": None}
    )


def test_results_of_one_protocol_are_compared_and_others_refused(tmp_path, capsys):
    result().write(tmp_path / "a.json")
    turned = dict(reversed(result().protocol.items()))
    Result({"fid_real": 2.5}, turned, {"plan": "uniform:4"}).write(tmp_path / "b.json")
    result(n=20, reference={"sha256": "b", "n": 5}).write(tmp_path / "c.json")
    a, b, c = (str(tmp_path / f"{name}.json") for name in "abc")
    assert results.main([a, b]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{a}  fid_real 1.5000", f"{b}  fid_real 2.5000"]
    assert "it is not known which prompts the images were made from" in captured.err
    for name in "ab":
        result(prompts="x").write(tmp_path / f"{name}.json")
    assert results.main([a, b]) == 0 and capsys.readouterr().err == ""
    result().write(tmp_path / "a.json")
    result().write(tmp_path / "b.json")
    assert results.main([a, b, c]) == 2
    err = capsys.readouterr().err
    assert_one_line(
        err, "JSON: different protocols can't be compared; they differ in n .*: 10, .*: 20.*reference.sha256"
    )
    assert "measure" not in err and "reference.n" not in err


def test_a_changed_result_is_not_one(tmp_path):
    result().write(tmp_path / "a.json")
    content = load_json(tmp_path / "a.json")
    content["protocol"]["n"] = 10_000
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ResultError, match="its protocol is not the one that its hash .* names"):
        read_result(tmp_path / "a.json")
    for damaged in (
        [],
        None,
        content | {"values": []},
        content | {"protocol": [1]},
        content | {"samples": None},
        content | {"protocol_sha256": 3},
    ):
        (tmp_path / "a.json").write_text(json.dumps(damaged))
        with pytest.raises(ResultError, match="a.json: not a result"):
            read_result(tmp_path / "a.json")


def test_a_full_disk_loses_no_value(tmp_path, capsys):
    """The system lets no file grow here, as a full disk would."""
    out = tmp_path / "a.json"
    out.write_text("before")
    code = (
        "import resource, signal, sys; from evaluation.metrics.command import publish;"
        "from evaluation.metrics.result import Result; from ldm.cli.parser import command;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
        "r = Result({'fid_real': 1.5}, {}, {});"
        f"sys.exit(command('fid.py', lambda: publish(r, {str(out)!r})))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout.split() == ["fid_real", "1.5000"]
    assert run.stderr.startswith(f"fid.py: error: --out: can't write {out}: File too large; the values are above")
    assert out.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
