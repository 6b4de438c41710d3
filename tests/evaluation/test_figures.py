"""evaluation/figures.py: every kind of figure from end to end."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from evaluation.figures import KINDS, OF_ALL, main
from tests.helpers.tiny_models import WORDS, tiny_transformer, write_model

SMALLEST = {
    "samplers": ["--samplers", "dpm-solver++:3"],
    "times": ["--samplers", "ddim:3", "--repeats", "2"],
    "fewer-steps": ["--step-counts", "2"],
    "timeline": ["--plans", "uniform:2"],
    "tasks": ["--commands", "txt2img.py --prompt owl --steps 2 --n_samples 1 --skip_grid", "--plans", "off", "0"],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    config, ckpt = write_model(folder)
    (folder / "prompts.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return ["--config", str(config), "--ckpt", str(ckpt), "--prompts", str(folder / "prompts.txt")]


def smallest(kind: str) -> list[str]:
    steps = ["--steps", "3"] if "steps" in KINDS[kind].options else []
    return [kind, *steps, *(["--count", "1"] if KINDS[kind].count else []), *SMALLEST.get(kind, [])]


@pytest.mark.parametrize(
    "kind", [*(kind for kind in OF_ALL if kind != "pareto"), "tasks"]
)  # has test_figures_pareto.py
def test_every_kind_draws_any_model(kind, tiny, tmp_path):
    assert main([*smallest(kind), *tiny, "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / f"{kind}.png").width > 300
    assert "<svg" in (tmp_path / f"{kind}.svg").read_text(encoding="utf-8")
    record = json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))
    assert record["weights"] in record["caption"] and record["values"]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [f"{kind}.json", f"{kind}.png", f"{kind}.svg"]


def test_the_model_that_ships_needs_no_flag_and_gives_the_same_figure_twice(tmp_path):
    for name in "ab":
        assert main(["evolution", "--steps", "2", "--count", "1", "--out", str(tmp_path / name)]) == 0
    for suffix in ("svg", "png", "json"):
        one, two = ((tmp_path / name / f"evolution.{suffix}").read_bytes() for name in "ab")
        assert one == two
    values = json.loads((tmp_path / "a" / "evolution.json").read_text(encoding="utf-8"))["values"]
    assert [*values] == ["E8", "E4", "E2", "B", "D2", "D4", "D8"]


def test_the_blocks_of_a_transformer(tmp_path):
    model = tiny_transformer(tmp_path / "model", "configs/dit/dit-xl-2-256.yaml")
    for kind in ("evolution", "norms", "maps"):
        assert main([*smallest(kind), *model, "--out", str(tmp_path)]) == 0
        record = json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))
        assert [*record["values"].get("variance_shown", record["values"])] == ["E0", "E1", "D2"]
        assert "UNet" not in record["caption"]


def test_all_draws_what_is_not_left_out(tiny, tmp_path):
    left_out = [kind for kind in OF_ALL if kind not in ("norms", "timeline")]
    assert main(["all", "--steps", "2", "--count", "1", "--without", *left_out, *tiny, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["norms.json", "timeline.json"]


@pytest.mark.parametrize(
    "arguments, wrong",
    [
        (["pie"], "KIND: invalid choice: 'pie'"),
        (["evolution", "--steps", "1"], "--steps: a change from step to step needs at least 2 steps; got 1"),
        (["evolution", "--steps", "5000"], "--steps: "),
        (["evolution", "--out", "n" * 5000], "--out: "),
        (["norms", "--count", "41"], "--count: "),
        (["norms", "--prompts", "missing.txt"], "--prompts: "),
        (["samplers", "--steps", "5"], "unrecognized arguments: --steps 5; not every command has --steps"),
        (["times", "--steps", "5"], "unrecognized arguments: --steps 5; not every command has --steps"),
        (["samplers", "--samplers", "ddim"], "--samplers: expected SAMPLER:STEPS"),
        (["samplers", "--samplers", "magic:5"], "--samplers: expected SAMPLER:STEPS"),
        (["timeline", "--plans", "online:0.1"], "--plans: online:0.1 decides during the run"),
        (["tasks", "--commands", "none.py"], "--commands: none.py: no such file in scripts/; expected one such as "),
        (["tasks", "--commands", "txt2img.py --steps x"], "--commands: txt2img.py --steps x --plan off: txt2img.py: "),
        (["timeline", "--plans", "nothing"], "--plans: unknown plan 'nothing'"),
        (["norms", "--ckpt", "missing.ckpt"], "--ckpt: missing.ckpt: no such file"),
    ],
)
def test_bad_input_is_one_line(arguments, wrong, tmp_path, capsys):
    out = [] if arguments[0] == "pie" or "--out" in arguments else ["--out", str(tmp_path / "figure")]
    assert main([*arguments, *out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"figures.py: error: {wrong}")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_found_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["norms", "--out", str(tmp_path / "file" / "figure")]) == 2
    assert capsys.readouterr().err.startswith("figures.py: error: --out: ")
