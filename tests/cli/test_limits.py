"""What comes from outside has limits: counts, lists, environment variables, names; none ends in a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import re

import pytest
from PIL import Image

import ldm
from evaluation import fid
from evaluation.runs.processes import launched
from ldm.cli.parser import (
    LARGEST_SIDE,
    MOST,
    MOST_STEPS,
    Parser,
    command,
    count,
    parallel,
    side,
    step_count,
    torchrun_ranks,
)
from ldm.cli.pipeline import BATCH_PIXELS, SHEET_PIXELS, check_amount, sheet_fits
from ldm.cli.setup import Processes
from ldm.cli.tasks import image_items, resized_start
from ldm.io.errors import BadInput, SettingError
from ldm.sampling.engine import Sizes
from tests.helpers.scripts import Script, load_script
from tests.helpers.tiny_models import write_model

LONG = "x" * 5000


@pytest.mark.parametrize(
    "kind, most", [(count, MOST), (side, LARGEST_SIDE), (step_count, MOST_STEPS), (parallel, MOST)]
)
def test_counts_have_a_limit(kind, most):
    assert kind(str(most)) == most
    for text in (str(most + 1), "4294967296", "9" * 5000, "0", "-1", "1e9", "nan", "inf", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"whole number in 1\.\.{most}"):
            kind(text)


def test_too_many_lines_are_blamed_on_a_flag(tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("x\n" * (MOST + 1))
    line = Script("txt2img", tmp_path).refusal(capsys, "--from-file", str(tmp_path / "lines.txt"))
    assert line.startswith(f"--n_samples: {MOST + 1} subjects x 1 images of each")


@pytest.mark.parametrize("subjects, repeat, samples", [(1, 10**6, 10**6), (1000, 1, 1001), (1, 1, 10**6 + 1)])
def test_no_run_makes_more_images_than_it_can_list(subjects, repeat, samples):
    total = subjects * repeat * samples
    with pytest.raises(SettingError, match=f"^n_samples: .* are {total}; one run makes {MOST} at"):
        image_items([{"prompt": "x"}] * subjects, samples, seed=0, repeat=repeat)
    assert len(image_items([{"prompt": "x"}] * 3, 2, seed=0, repeat=4)) == 24


def test_a_batch_and_a_sheet_have_a_limit():
    side = int(BATCH_PIXELS**0.5)
    check_amount(1, (side, side), 1)
    check_amount(5, (side, side), 1)
    with pytest.raises(SettingError, match="^batch_size: 2 images of .* at a time"):
        check_amount(5, (side, side), 2)
    with pytest.raises(SettingError, match="^batch_size: 1 images"):
        check_amount(1, (side, side + 1), 9)
    with pytest.raises(SettingError, match="^compare: 1000 images of 64 x 64"):
        check_amount(1000, (64, 64), 1, compare=True)
    assert sheet_fits(SHEET_PIXELS // 4, (2, 2)) and not sheet_fits(SHEET_PIXELS // 4 + 1, (2, 2))


def test_no_image_is_enlarged_to_a_size_that_nothing_makes():
    sizes = Sizes(channels=4, factor=8, multiple=64, default=512)
    assert resized_start(Image.new("RGB", (70, 70)), sizes, None, 128).shape == (3, 64, 128)
    with pytest.raises(SettingError, match="^H: 16384 x 16384 pixels are more than 67108864, the most of one image"):
        resized_start(Image.new("RGB", (70, 70)), sizes, 16384, 16384)


def test_images_that_do_not_fit_into_memory_are_refused_before_the_first_step(tmp_path, capsys, monkeypatch):
    config, ckpt = map(str, write_model(tmp_path))
    (tmp_path / "meminfo").write_text("MemTotal: 500000 kB\nMemAvailable: 100000 kB\n")
    monkeypatch.setattr("ldm.profiling.cost.MEMINFO", tmp_path / "meminfo")
    script = Script("txt2img", tmp_path, "--config", config, "--ckpt", ckpt, "--steps", "1", "--n_samples", "1")
    for plan in ("off", "0"):
        line = script.refusal(capsys, "--plan", plan, "--H", "768", "--W", "1024")
        start, _, rest = line.partition("at least ")
        assert start == "--n_samples: 1 image of 1024 x 768 pixels at a time need "
        need, _, rest = rest.partition(" ")
        assert 0.1 < float(need) < 1 and rest == "GB, 0.1 GB are free; expected fewer or smaller images"
    with pytest.raises(ValueError, match="^batch_size: 1 image of 32 x 16384 pixels at a time need at least"):
        ldm.load(config=config, ckpt=ckpt, device="cpu").images(["an owl"], H=16384, W=32, steps=1)
    assert script("--H", "32", "--W", "16"), "smaller images fit"


# The environment


@pytest.mark.parametrize(
    "env",
    [
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-1"},
        {"WORLD_SIZE": "1.5"},
        {"WORLD_SIZE": "9" * 5000},
        {"WORLD_SIZE": "99999999999"},
        {"RANK": "x"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
    ],
    ids=str,
)
def test_an_environment_that_can_not_be_is_refused(monkeypatch, env):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Processes(*torchrun_ranks()) == Processes(0, 1, 0)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=rf"^environment variable {name}: expected a whole number in"):
        Processes(*torchrun_ranks())


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    assert Processes(*torchrun_ranks()) == Processes(0, 1, 0)


@pytest.mark.parametrize(
    "env", [{"LOCAL_WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}], ids=str
)
def test_torchrun_that_says_what_can_not_be(env):
    assert launched({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}) == (2, 3)
    with pytest.raises(BadInput, match="^environment variable .*WORLD_SIZE: expected"):
        launched({"TORCHELASTIC_RUN_ID": "1", **env})


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NNODES": "0"},
        {"SLURM_NTASKS": "many"},
        {"SLURM_NTASKS_PER_NODE": "-3"},
        {"SLURM_NNODES": "2", "SLURM_NTASKS": "1"},
    ],
    ids=str,
)
def test_slurm_that_says_what_can_not_be(env):
    assert launched({"SLURM_NTASKS": "6", "SLURM_NNODES": "2"}) == (3, 2)
    with pytest.raises(BadInput, match="^environment variable SLURM_.*: expected"):
        launched({"SLURM_NTASKS": "2", **env})


# What a command line says


def raising(error: Exception):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 5000), "File name too long: 'xxx"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_or_the_user_can_not_do_is_one_short_line(capsys, error, said):
    assert command("x.py", raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x.py: error: ") and said in line and len(line) < 2100


@pytest.mark.parametrize(
    "arguments, flag",
    [
        (["--outdir", LONG], "--outdir"),
        (["--config", LONG], "--config"),
        (["--ckpt", LONG], "--ckpt"),
        (["--from-file", LONG], "--from-file"),
        (["--plan", LONG + ".yaml"], "--plan"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_name_that_no_file_can_have_is_blamed_on_its_flag(tmp_path, capsys, arguments, flag):
    assert load_script("txt2img").main(["--outdir", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"txt2img.py: error: {flag}: ") and "xxx...(" in line and len(line) < 1000
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--config", "--ckpt", "--from-file", "--plan"])
def test_links_in_a_loop_are_blamed_on_their_flag(tmp_path, capsys, flag):
    for name, target in (("one.yaml", "two.yaml"), ("two.yaml", "one.yaml")):
        (tmp_path / name).symlink_to(tmp_path / target)
    assert load_script("txt2img").main(["--outdir", str(tmp_path / "out"), flag, str(tmp_path / "one.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"txt2img.py: error: {flag}: ") and "one.yaml" in line


@pytest.mark.parametrize("argument", ["--scale=1e300", "--scale=-1001", "--noise-weight=1e300", "--noise-weight=101"])
def test_weights_that_only_overflow_are_blamed_on_their_flag(tmp_path, capsys, argument):
    flag, _, value = argument.partition("=")
    line = Script("txt2img", tmp_path).refusal(capsys, argument)
    assert line.startswith(flag) and re.search(rf": expected a number in .*; got '{value}'$", line)


@pytest.mark.parametrize(
    "arguments, named", [([".", LONG], "SAMPLES"), ([".", ".", "--out", LONG], "--out")], ids=["samples", "out"]
)
def test_a_measure_blames_such_a_name_on_its_argument(capsys, arguments, named):
    assert fid.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"fid.py: error: {named}: ")


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        command("x.py", raising(RuntimeError("a bug")))


def test_arguments_that_are_not_utf_8_are_refused():
    parser = Parser()
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt", "Größe 猫"]).prompt == "Größe 猫"
    with pytest.raises(BadInput, match=r"'a\\udcff': not UTF-8"):
        parser.parse_args(["--prompt", "a\udcff"])
