"""scripts/benchmark_images.py: real processes on a tiny model, and the table of their medians."""

from __future__ import annotations

import json
import re

import pytest

from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import write_model

benchmark = load_script("benchmark_images")


def test_each_row_runs_in_new_processes_and_is_compared_with_the_first(tmp_path, capsys):
    config, ckpt = write_model(tmp_path)
    options = ["--", "--config", str(config), "--ckpt", str(ckpt), "--steps", "4"]
    assert (
        benchmark.main(
            [
                "--rows",
                "off",
                "0@2",
                "--images",
                "2",
                "--repeats",
                "1",
                "--further",
                "1",
                "--json",
                str(tmp_path / "times.json"),
                *options,
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert re.search(
        r"^images: 2 +first, s +further, s\noff( +\d+\.\d{3}){2}\n0@2( +\d+\.\d{3}){2}\n"
        r"off / 0@2( +\d+\.\d\d){2}$",
        out,
        re.M,
    )
    kept = json.loads((tmp_path / "times.json").read_text())
    assert [len(times) for times in kept["seconds"]["2"].values()] == [1, 1] and kept["options"] == options[1:]


def test_the_table_has_medians_and_multiples_of_the_first_row():
    shown = benchmark.table(4, {"off": [(4.0, 2.0), (6.0, 3.0), (9.0, 2.5)], "fast": [(2.0, 1.0)] * 3})
    assert [line.split()[-2:] for line in shown.splitlines()[1:]] == [
        ["6.000", "2.500"],
        ["2.000", "1.000"],
        ["3.00", "2.50"],
    ]


@pytest.mark.parametrize(
    "args, why",
    [
        (["--images", "0"], "--images: expected a whole number in 1.."),
        (["--repeats", "1e9"], "--repeats: "),
        (["--json", "n" * 5000], "--json: "),
        (["--json", f"{__file__}/times.json"], "--json: can't write"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_is_run(capsys, args, why):
    assert benchmark.main(args) == 2
    assert f"error: {why}" in capsys.readouterr().err


def test_what_txt2img_refuses_is_said_in_a_line(tmp_path, capsys):
    assert benchmark.main(["--rows", "off", "fastest", "--images", "1", "--repeats", "1", "--", "--steps", "none"]) == 2
    why = "--steps/--ddim_steps/--num_inference_steps: expected a whole number in 1..10000; got 'none'"
    assert capsys.readouterr().err == f"benchmark_images.py: error: --rows off: txt2img.py: error: {why}\n"
