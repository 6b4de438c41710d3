"""evaluation/cost.py: the paper's column of GFLOPs, and what a user sees."""

from __future__ import annotations

import pytest

from evaluation.cost import main
from evaluation.table.cost import SD_V1, counts, published, read_unet
from ldm.checkpoint import load_config, load_model
from ldm.models.diffusion.propagation.load import load_plan
from ldm.sampling.engine import Engine, Recipe, Sizes, Task
from ldm.sampling.task import Text

EMOJI = "models/ldm/emoji64/config.yaml"


@pytest.fixture(scope="module")
def sd():
    unet, side, tokens = read_unet(SD_V1)
    assert tokens == 77
    return unet, counts(unet, (side, side), 2, tokens)


@pytest.mark.parametrize(
    "steps, plan, gflops",
    [(50, "off", 37050), (50, "faster-diffusion", 27350), (20, "off", 14821), (20, "faster-diffusion", 11743)],
)
def test_table_1_of_the_paper_within_a_tenth_of_a_percent(sd, steps, plan, gflops):
    unet, units = sd
    plan = load_plan(plan, steps)
    assert units["paper"].run(plan) / 1e9 == pytest.approx(gflops, rel=0.001)
    assert published(unet, (64, 64), 2, plan) == gflops


def test_one_skipped_encoder_in_both_counts(sd):
    _, units = sd
    assert units["paper"].encode / 1e9 == pytest.approx(236.491 + 0.004, abs=0.002)  # fvcore; time embedding
    assert units["paper"].whole / 1e9 == pytest.approx(741.053 + 0.004, abs=0.002)
    assert units["exact"].encode / 1e9 == pytest.approx(261.440 - 1.363, abs=0.001)  # keys and values once


def test_prints_where_the_paper_differs(capsys):
    assert main(["--config", str(SD_V1), "--plan", "off", "uniform-1", "deepcache:5", "--steps", "50"]) == 0
    plain, uniform, deepcache = capsys.readouterr().out.partition("run, GMAC")[2].splitlines()[1:4]
    assert plain.split()[-2:] == ["37050", "+0.01%"]
    assert uniform.endswith("DIFFERS") and " 31011 " in uniform
    assert "37050" not in deepcache and not deepcache.endswith("%")


@pytest.mark.parametrize(
    "config, tokens",
    [
        (EMOJI, 16),
        ("configs/latent-diffusion/cin256-v2.yaml", 1),
        ("models/ldm/celeba256/config.yaml", None),
        ("configs/latent-diffusion/txt2img-1p4B-eval.yaml", 77),
        ("models/ldm/layout2img-openimages256/config.yaml", 92),
        ("configs/retrieval-augmented-diffusion/rdm-imagenet.yaml", 4),
        ("configs/retrieval-augmented-diffusion/768x768.yaml", 1),
    ],
)
def test_tokens_come_from_the_config(config, tokens):
    assert read_unet(config)[2] == tokens


def test_the_shipped_model_costs_what_its_runs_say(capsys):
    """The exact count of cost.py is that of the engine, which knows the tokens by encoding a text."""
    model, sizes = load_model(EMOJI, "models/ldm/emoji64/model.safetensors"), Sizes.of(load_config(EMOJI).model)
    plan = load_plan("faster-diffusion", 50)
    engine = Engine(model, sizes, Recipe(64, 64, scale=2.0), plan, Task(Text()))
    assert main(["--config", EMOJI, "--plan", "faster-diffusion"]) == 0
    printed = capsys.readouterr().out.partition("run, GMAC")[2].splitlines()[1].split()
    assert printed[4] == f"{engine.unit.run(plan, images=[2] * 50) / 1e9:.1f}" == "16.9"


def test_another_model_has_no_row_in_the_paper(capsys):
    assert main(["--config", EMOJI, "--plan", "off", "deepcache:3:2", "--steps", "50"]) == 0
    printed = capsys.readouterr().out
    assert "37050" not in printed and "shallow node, 2 outer blocks" in printed


@pytest.mark.parametrize(
    "args, why",
    [
        (["--config", "none.yaml"], "--config: none.yaml: no such file"),
        (["--config", EMOJI, "--plan", "fast"], "--plan: unknown plan 'fast'"),
        (["--config", EMOJI, "--plan", "online:0.1"], "--plan: online:0.1 decides during a run"),
        (["--config", EMOJI, "--size", "7", "7"], "--config, --size: x must have height and width that are multiples"),
        (["--config", EMOJI, "--steps", "0"], "--steps: expected a whole number in 1..10000"),
    ],
)
def test_bad_input(capsys, args, why):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
