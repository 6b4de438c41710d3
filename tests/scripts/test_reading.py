"""Weights in prompts, and long ones, by scripts/txt2img.py."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.helpers.scripts import Script
from tests.helpers.tiny_models import write_model

COMMON = ["--steps", "2", "--n_samples", "1", "--skip_grid", "--plan", "off", "--seed-by-position"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    config, ckpt = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", str(config), "--ckpt", str(ckpt)]


def test_images_say_how_their_prompts_were_read(files, tmp_path, capsys):
    script = Script("txt2img", tmp_path, *files, *COMMON)
    (plain,) = script("--prompt", "a red heart")
    (one,) = script("--prompt", "a (red:1) heart", "--prompt-weights")
    (strong,) = script("--prompt", "a (red:3) heart", "--prompt-weights")
    assert "brackets" not in capsys.readouterr().out
    script("--prompt", "a (red:3) heart", "--seed", "7")
    assert "'a (red:3) heart': brackets are read as text, since weights are not" in capsys.readouterr().out
    (long,) = script("--prompt", "a red heart, noto style " * 5, "--prompt-chunks", "2")
    assert "1 of 1 prompts longer than the text encoder reads" in capsys.readouterr().out
    options = [{name: entry.get(name) for name in ("prompt_weights", "prompt_chunks")} for entry in (plain, one, long)]
    assert [*map(lambda options: [*options.values()], options)] == [[None, None], [True, None], [None, 2]]
    assert (script.pixels(plain) == script.pixels(one)).all()
    assert np.abs(script.pixels(strong) - script.pixels(one)).max() > 1


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--prompt", "a (red heart", "--prompt-weights"], r"--prompt: '\(' at character 3 has no partner"),
        (["--negative_prompt", "a]", "--prompt-weights"], r"--negative_prompt: '\]' at character 2 has no partner"),
        (["--prompt", "(a:99)", "--prompt-weights"], "--prompt: a weight must be 0..10; got 99"),
        (["--prompt-chunks", "0"], "--prompt-chunks: .*got '0'"),
    ],
)
def test_bad_prompts(arguments, why, files, tmp_path, capsys):
    line = Script("txt2img", tmp_path, *files, *COMMON).refusal(capsys, *arguments)
    assert re.match(why, line), line
