"""scripts/benchmark_loading.py: a model is written and loaded in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers.scripts import load_script

main = load_script("benchmark_loading").main
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


def test_measures_a_config_and_leaves_nothing_behind(tmp_path, capsys):
    """A model of 16 MB: the process itself weighs more, which misses the bar and is said by the exit code."""
    model = {"target": "torch.nn.Linear", "params": {"in_features": 2000, "out_features": 2000}}
    OmegaConf.save(OmegaConf.create({"model": model}), tmp_path / "c.yaml")
    (tmp_path / "out").mkdir()
    assert main(["--config", str(tmp_path / "c.yaml"), "--dir", str(tmp_path / "out"), "--case", "fp16.ckpt"]) == 1
    name, size, *_, weights, ratio = re.findall(r"^fp16.ckpt.*(?= \()", capsys.readouterr().out, re.M)[0].split()
    assert (float(size), float(weights)) == (0.01, 0.02) and float(ratio) > 1.6
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "args, why",
    [
        (["--config", "missing.yaml"], "--config: missing.yaml: no such file"),
        (["--config", "x.yaml", "--dir", "missing"], "--dir: missing: no such directory"),
        (["--config", "x.yaml", "--case", "fp8.ckpt"], "--case: invalid choice: 'fp8.ckpt'"),
    ],
)
def test_bad_input(args, why, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
