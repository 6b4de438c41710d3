"""Key nodes by measurement: the search is exact, the measurement is what it says, the plan serves its own run only."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ldm.checkpoint import fingerprint
from ldm.cli.arguments import EMOJI64 as EMOJI64_FILES
from ldm.cli.calibrate import even, usable
from ldm.cli.settings import ModelSettings
from ldm.cli.setup import make_setup, run_facts
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.loop import State, denoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.propagation.calibration import Calibration, measure, read_calibration
from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of, load_plan
from ldm.models.diffusion.propagation.plan import Forecast, Plan
from ldm.models.diffusion.propagation.predict import Forecaster
from ldm.models.diffusion.propagation.search import NodeErrors, best_keys, exchange
from ldm.models.diffusion.schedule import Node
from ldm.sampling.engine import Recipe
from ldm.sampling.video import OneVideo
from tests.helpers import golden_sampler
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.toy import toy_denoiser, toy_inputs, toy_network, toy_rule


def total_error(errors, keys, keep=1):
    groups = pairwise((*keys, N_OF[errors]))
    return sum(float(errors(keys[: k + 1][-keep:], range(a + 1, b)).sum()) for k, (a, b) in enumerate(groups))


N_OF = {}  # nodes of a function made by `random_errors`


def random_errors(n, keep, seed):
    """Errors that depend on the last `keep` key nodes in no orderly way."""

    def errors(keys, nodes):
        return np.array([np.random.default_rng([seed, *keys[-keep:], j]).uniform() for j in nodes])

    N_OF[errors] = n
    return errors


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), keep=st.integers(1, 2), seed=st.integers(0, 2**20))
def test_the_best_keys_are_the_best_of_all(n, keep, seed):
    errors = random_errors(n, keep, seed)
    best = best_keys(errors, n, keep)
    for count, found in enumerate(best, start=1):
        assert len(found) == count and found[0] == 0
        everything = [(0, *rest) for rest in combinations(range(1, n), count - 1)]
        least = min(total_error(errors, each, keep) for each in everything)
        assert total_error(errors, found, keep) == pytest.approx(least)
    assert len(best) == n


def since_the_key(keys, nodes):
    return np.array([float(j - keys[-1]) for j in nodes])


def test_an_error_that_grows_evenly_gives_even_keys():
    assert best_keys(since_the_key, 12, 1)[3] == (0, 3, 6, 9)


def test_even_keys_are_those_of_uniform_plans():
    assert even(50, 9) == load_plan("uniform:6", 50).keys and even(50, 50) == tuple(range(50)) and even(50, 1) == (0,)
    assert even(50, 18) == (*load_plan("uniform:3", 50).keys, 49)


def test_log_snr_is_left_out_where_it_is_infinite():
    fine, last = Node(981, 0.5, 0.9), Node(999, 0.0, 0.5)
    tried = {"encoder": ["quadratic"], "skip": ["quadratic:logsnr:eps", "quadratic:timestep:eps"]}
    assert usable(tried, [fine]) == (tried, [])
    kept = {"encoder": ["quadratic"], "skip": ["quadratic:timestep:eps"]}
    assert usable(tried, [last, fine]) == (kept, ["quadratic:logsnr:eps"])


def test_exchange_ends_where_no_neighbour_is_better():
    target = (0, 4, 7, 11)

    def error_of(keys):
        assert len(keys) == 4 and all(a < b for a, b in pairwise((*keys, 12)))
        return sum((a - b) ** 2 for a, b in zip(keys, target, strict=True))

    assert exchange((0, 1, 2, 3), 12, error_of, sweeps=99) == (target, 0)
    assert exchange((0, 2, 5, 9), 12, error_of, sweeps=1)[1] < error_of((0, 2, 5, 9))
    assert exchange(target, 12, error_of) == (target, 0)


@pytest.mark.parametrize("level", ["encoder", "deepcache", "skip"])
def test_the_measured_error_is_that_of_one_wrong_node(level):
    """The value of an earlier node in place of one's own moves the latent by what was measured; of predictions, which
    enter linearly, any weighted sum does."""
    x, cond, uncond = toy_inputs(2)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10)
    products = measure(model, rule, x)[level]
    xs = [x, *(state.x for state in denoise(model, rule, load_plan("off", 10), x))]

    def moved(j, wrong):
        return float((xs[j + 1] - rule.step(State(xs[j]), j, wrong).x).square().mean())

    def decoded(features, j):
        return model.to_eps(model.decode([features], [rule.nodes[j].t])[0], xs[j], rule.nodes[j])

    features = [model.encode(xs[i], node.t) for i, node in enumerate(rule.nodes)]
    for i, j in ((0, 1), (3, 7), (2, 9)):
        if level == "skip":
            wrong = decoded(features[i], i)
        elif level == "encoder":
            wrong = decoded(features[i], j)
        else:
            inner = model.advance([features[i]], [rule.nodes[i].t], 1)[0].without_skips()
            wrong = decoded(model.refresh(inner, xs[j], rule.nodes[j].t, 1), j)
        errors = NodeErrors(products, Forecaster.of(Forecast(), rule.nodes))
        assert errors((0, i) if i else (0,), range(j, j + 1))[0] == pytest.approx(moved(j, wrong))
    if level == "skip":
        forecaster = Forecaster.of(Forecast.parse("quadratic:logsnr"), rule.nodes)
        weights = forecaster.weights([1, 2, 4], 6)
        wrong = sum(w * decoded(features[i], i) for w, i in zip(weights, (1, 2, 4), strict=True))
        assert NodeErrors(products, forecaster)((0, 1, 2, 4), range(6, 7))[0] == pytest.approx(moved(6, wrong))


def calibration(n=10, level="encoder", propagate="quadratic", rest=0.7, **changes):
    keys = [[*found] for found in best_keys(since_the_key, n, 1)]
    choice = {"level": level, "propagate": propagate, "keys": keys}
    return Calibration(**{"num_nodes": n, "rest": {level: rest}, "choices": [choice]} | changes)


def test_a_budget_buys_key_nodes():
    ten = calibration()
    assert ten.plan_within(1.0).plain
    assert len(ten.plan_within(0.73).keys) == 1
    for share in (0.75, 0.8, 0.91):
        keys = len(ten.plan_within(share).keys)
        assert 0.7 + 0.03 * keys <= share + 1e-9 < 0.7 + 0.03 * (keys + 1)
    with pytest.raises(ValueError, match=r"must lie in 0\.730\.\.1 .* got 0.7"):
        ten.plan_within(0.7)


def test_auto_plans_come_from_the_table_beside_the_weights(tmp_path):
    made = calibration(propagate="linear", made_for={"sampler": "ddim", "weights": "abc"})
    keys = [[*range(count)] for count in range(1, 11)]
    held = made.choices[0].model_copy(update={"propagate": "hold", "keys": keys, "errors": {"4": 0.1}})  # a whole run
    made.choices.append(held)
    made.save(tmp_path / "ddim-10.json")
    assert read_calibration(tmp_path / "ddim-10.json") == made
    run = RunFacts({"sampler": "ddim", "weights": "abc"}, tmp_path)
    assert load_plan("auto:5", 10, 3, run=run) == Plan(10, (0, 2, 4, 6, 8), 3, propagate="linear")
    assert load_plan("auto:5", 10, run=run, propagate="hold") == Plan(10, (0, 1, 2, 3, 4)), "found for that forecaster"
    assert [load_plan(f"auto:{count}", 10, run=run).propagate for count in (3, 4)] == ["linear", "hold"], (
        "by whole runs"
    )
    for spec, how, why in (
        ("auto:5", "cubic", "key timesteps of encoder for the forecasters linear, hold; got cubic"),
        ("skip:auto:5", None, "key timesteps of skip for none; got skip"),
        ("auto:11", None, r"keys must be 1\.\.10, the nodes of this run; got 11"),
    ):
        with pytest.raises(ValueError, match=why):
            load_plan(spec, 10, run=run, propagate=how)
    for share in ("auto:.8", "auto:0.8", "auto:80%", "auto:80.0%"):
        assert len(load_plan(share, 10, run=run).keys) == 3
    assert len(load_plan("auto:1", 10, run=run).keys) == 1
    assert len(load_plan("auto:100%", 10, run=run).keys) == 10
    for facts, nodes, why in (
        ({"sampler": "plms", "weights": "abc"}, 10, "for plms with 10 nodes; there is none"),
        ({"sampler": "ddim", "weights": "abc"}, 20, "for ddim with 20 nodes; there is one for 10"),
        ({"sampler": "ddim", "weights": "b"}, 10, "made for weights abc; this run's is b"),
        (
            {"sampler": "ddim", "weights": "abc", "additions": "lora a.pt 12 1.0, control"},
            10,
            "made for additions none; this run's is lora a.pt 12 1.0, control",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            load_plan("auto:5", nodes, run=RunFacts(facts, tmp_path))
    with pytest.raises(ValueError, match="the file of these weights is not known"):
        load_plan("auto:5", 10)


MADE = Recipe(64, 64, steps=10, scale=2.0, guidance_interval=(200, 800))


@pytest.mark.parametrize(
    "run, strength, why",
    [
        (replace(MADE, steps=20), 0.5, "made for steps 10; this run's is 20"),
        (MADE, 0.5, "made for strength 1.0; this run's is 0.5"),
        (replace(MADE, scale=7.5), 1.0, "made for scale 2.0; this run's is 7.5"),
        (replace(MADE, guidance_interval=None), 1.0, "made for guidance_interval 200, 800; this run's is none"),
        (replace(MADE, eta=1.0), 1.0, "made for eta 0.0; this run's is 1.0"),
        (replace(MADE, tome=0.5), 1.0, "made for tome 0.0; this run's is 0.5"),
    ],
    ids=str,
)
def test_a_calibration_is_for_the_run_that_was_measured(tmp_path, run, strength, why):
    for name, recipe in (("ddim-10-other", replace(MADE, scale=-1.0)), ("ddim-10", MADE)):
        calibration(made_for=json.loads(json.dumps({"sampler": "ddim", **recipe.facts()}))).save(
            tmp_path / f"{name}.json"
        )
    facts = {"sampler": "ddim"}
    assert load_plan("auto:5", 10, run=RunFacts(facts | MADE.facts(), tmp_path)), "the one of two that fits"
    (tmp_path / "ddim-10-other.json").unlink()
    with pytest.raises(ValueError, match=re.escape(f"calibration ddim-10.json was {why}")):
        load_plan("auto:5", 10, run=RunFacts(facts | run.facts(strength), tmp_path))


def test_a_calibration_is_for_the_network_without_a_lora_or_control(tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"changes")
    lora, made = ((str(tmp_path / "style.safetensors"), 0.5),), Recipe(64, 64, steps=50, scale=2.0).facts()
    bare, changed = (make_setup(ModelSettings(lora=files), EMOJI64_FILES) for files in ((), lora))
    assert len(load_plan("auto:9", 50, run=run_facts(bare, "ddim", made)).keys) == 9
    for run, what in (
        (run_facts(changed, "ddim", made), r"lora style.safetensors \w+ 0.5"),
        (run_facts(bare, "ddim", made, OneVideo(4)), "frames"),
    ):
        with pytest.raises(ValueError, match=f"made for additions none; this run's is {what}; plans are calibrated"):
            load_plan("auto:9", 50, run=run)


def test_published_samplers_refuse_a_calibration_of_other_timesteps(tmp_path, monkeypatch):
    model = golden_sampler.model()
    monkeypatch.setattr(model, "weights_file", tmp_path / "model.safetensors")
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, "uniform", verbose=False)
    made_for = {"timesteps": [float(t) for t in reversed(sampler.ddim_timesteps)], "eta": 0.0, "scale": 1.0}
    calibration(made_for=made_for).save(tmp_path / "calibration/ddim-10.json")
    given = {"cond": torch.ones(1, 5, 24), "shape": (1, *golden_sampler.SHAPE), "plan": "auto:5", "verbose": False}
    assert len(sampler.ddim_sampling(**given)[0]) == 1
    with pytest.raises(ValueError, match=r"made for scale 1.0; this run's is 3.0"):
        sampler.ddim_sampling(
            **given, unconditional_guidance_scale=3.0, unconditional_conditioning=torch.zeros(1, 5, 24)
        )
    sampler.make_schedule(10, "quad", verbose=False)
    with pytest.raises(ValueError, match=r"made for timesteps 901, 801, 701, 601, \.\.\.; this run's is "):
        sampler.ddim_sampling(**given)


@pytest.mark.parametrize(
    "level, rest, share, count, nodes",
    [("deepcache", 0.1, "46%", 4, "shallow"), ("skip", 0.0, "40%", 4, "skipped"), ("skip", 0.0, "4", 4, "skipped")],
)
def test_auto_goes_after_any_level(tmp_path, level, rest, share, count, nodes):
    calibration(level=level, rest=rest, propagate="linear").save(tmp_path / "ddim-10.json")
    plan = load_plan(f"{level}:auto:{share}", 10, run=RunFacts({"sampler": "ddim"}, tmp_path))
    assert len(plan.keys) == count and len(getattr(plan, nodes)) == 10 - count and plan.propagate == "linear"


def test_a_sampler_whose_name_begins_another_has_its_own_calibration(tmp_path):
    for sampler in ("dpm-solver-3s", "dpm-solver"):
        calibration(made_for={"sampler": sampler}).save(tmp_path / f"{sampler}-10.json")
    assert len(load_plan("auto:5", 10, run=RunFacts({"sampler": "dpm-solver"}, tmp_path)).keys) == 5
    calibration(made_for={"sampler": "euler-a"}).save(tmp_path / "euler-a-10.json")
    with pytest.raises(ValueError, match="for euler with 10 nodes; there is none"):
        load_plan("auto:5", 10, run=RunFacts({"sampler": "euler"}, tmp_path))


def test_facts_of_a_file_are_read_only_when_a_plan_needs_them(tmp_path):
    weights = tmp_path / "model.safetensors"
    run = RunFacts.of("ddim", weights)
    assert load_plan("faster-diffusion", 50, run=run)  # there is no such file
    weights.write_bytes(b"weights")
    calibration(made_for={"sampler": "ddim", "weights": fingerprint(weights)[:16]}).save(
        calibrations_of(weights) / "ddim-10.json"
    )
    assert len(load_plan("auto:5", 10, run=run).keys) == 5
    weights.write_bytes(b"others")
    with pytest.raises(ValueError, match="made for weights .* this run's is"):
        load_plan("auto:5", 10, run=run)


@pytest.mark.parametrize("sampler, nodes", [(DDIMSampler, 10), (PLMSSampler, 11), (DPMSolverSampler, 10)])
def test_published_samplers_take_auto_plans(sampler, nodes, tmp_path, monkeypatch):
    model = golden_sampler.model()
    given = {
        "S": 10,
        "batch_size": 1,
        "shape": golden_sampler.SHAPE,
        "conditioning": torch.ones(1, 5, 24),
        "verbose": False,
    }
    with pytest.raises(ValueError, match="load the model with"):
        sampler(model).sample(**given, plan="auto:5")
    monkeypatch.setattr(model, "weights_file", tmp_path / "model.safetensors")
    made = calibration(nodes, propagate="linear")
    made.save(tmp_path / "calibration" / f"{sampler.solver}-10.json")
    expected = made.plan(5)
    samples, _ = sampler(model).sample(**given, plan="auto:5")
    assert torch.equal(samples, sampler(model).sample(**given, plan=expected)[0])
    assert not torch.equal(samples, sampler(model).sample(**given)[0])


KEYS = [[0], [0, 1]]
GOOD = {"num_nodes": 2, "rest": {"encoder": 0.7}, "choices": [{"level": "encoder", "propagate": "hold", "keys": KEYS}]}


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "is no calibration"),
        ("[1]", "is no calibration"),
        (json.dumps(GOOD | {"num_nodes": 3}), "keys of encoder must be lists of 1, 2, ... 3"),
        (json.dumps(GOOD | {"rest": {}}), "rest must have the cost of encoder"),
        (json.dumps(GOOD | {"rest": {"encoder": 3}}), "rest.encoder should be less than 1; got 3"),
        (json.dumps(GOOD | {"choices": [GOOD["choices"][0] | {"propagate": "hald"}]}), "should be a forecaster"),
        (json.dumps(GOOD | {"choices": [GOOD["choices"][0] | {"level": "middle"}]}), "level should be"),
        (
            '{"num_nodes": 1, "eps": [[0]], "features": [[0]], "encoder": 0.3}',
            "has 'encoder', 'eps', 'features'; accepted: .*; scripts/calibrate_plan.py makes a new one",
        ),
    ],
)
def test_faulty_tables_say_why(tmp_path, text, why):
    (tmp_path / "ddim-2.json").write_text(text)
    with pytest.raises(ValueError, match=why):
        read_calibration(tmp_path / "ddim-2.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_calibration(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_nodes", -1),
        ("num_nodes", 2**40),
        ("num_nodes", True),
        ("num_nodes", 2.0),
        ("rest", 0.3),
        ("rest", {"encoder": float("nan")}),
        ("choices", {"0": 1}),
        ("choices", [{"level": "encoder", "propagate": "hold", "keys": [[0], [0, "b"]]}]),
        ("choices", [{"level": "encoder", "propagate": ["hold"], "keys": KEYS}]),
        ("made_for", None),
        ("made_for", ["ddim"]),
        ("how", 3),
    ],
    ids=str,
)
def test_values_of_another_kind_say_which(tmp_path, name, value):
    file = tmp_path / "ddim-2.json"
    file.write_text(json.dumps(GOOD))
    assert read_calibration(file).plan(1).keys == (0,)
    file.write_text(json.dumps(GOOD | {name: value}))
    with pytest.raises(ValueError, match=rf"ddim-2.json is no calibration: {name}(\.\w+)* should be "):
        read_calibration(file)


def test_predictions_that_overflow_end_in_one_line(tmp_path, capsys):
    weights = load_file(ROOT / "models/ldm/emoji64/model.safetensors")
    weights["model.diffusion_model.out.2.weight"] = torch.full_like(
        weights["model.diffusion_model.out.2.weight"], 1e38, dtype=torch.float32
    )
    save_file(weights, tmp_path / "model.safetensors")
    model = ["--config", str(ROOT / "models/ldm/emoji64/config.yaml"), "--ckpt", str(tmp_path / "model.safetensors")]
    plan = tmp_path / "plan.yaml"
    made = load_script("calibrate_plan").main(
        ["--steps", "2", "--keys", "1", "--n_samples", "1", "--out", str(plan), *model]
    )
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert made == 2 and line.startswith("calibrate_plan.py: error: --ckpt: latents are not finite")
    assert not plan.exists()


@pytest.mark.parametrize("flags", [["--guidance-reuse"], ["--guidance-forecast", "linear"]])
def test_a_calibration_needs_guidance_at_every_step(flags, tmp_path, capsys):
    assert load_script("calibrate_plan").main([*flags, "--out", str(tmp_path / "plan.yaml")]) == 2
    why = "a calibration is of runs with guidance at every step"
    assert f"error: {flags[0]}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, why",
    [
        (["--keys", "3", "11", "--steps", "10"], "--keys: keys must be 1..10, the nodes of this run; got 11"),
        (["--keys", "3", "4", "--out", "plan.yaml"], "--out: a plan file is of one --level and one number of --keys"),
        (["--level", "encoder", "skip", "--out", "plan.yaml"], "--out: a plan file is of one --level"),
        (
            ["--forecast", "spectrum"],
            "--forecast: key timesteps of encoder can be found for forecasters NAME[:AXIS] but",
        ),
        (
            ["--level", "skip", "--forecast", "linear:v"],
            "--forecast: key timesteps of skip can be found for forecasters",
        ),
        (["--forecast", "quartic"], "--forecast: a forecaster must be one of hold"),
        (["--level", "decoder"], "--level: invalid choice: 'decoder'"),
        (["--level", "skip", "--macs", "0.05", "--steps", "10"], "--macs: the share of MACs must lie in 0.100..1"),
        (
            ["--level", "skip", "--macs", "0", "--steps", "2", "--out", "x.yaml"],
            "--macs: the share of MACs must lie in",
        ),
    ],
)
def test_what_can_not_be_searched_says_why(flags, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_script("calibrate_plan").main(["--n_samples", "1", *flags]) == 2
    assert why in capsys.readouterr().err.splitlines()[-1] and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("out", ["n" * 5000, f"{__file__}/plan.yaml"])
def test_a_place_where_nothing_can_be_written_is_known_before_the_work(out, capsys):
    assert load_script("calibrate_plan").main(["--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("calibrate_plan.py: error: --out: ")


def test_the_script_makes_a_plan_that_beats_the_published_one_and_is_refused_elsewhere(tmp_path, capsys):
    """On the shipped model, copied so that its own table stays: 10 steps, one image."""
    shipped = ROOT / "models/ldm/emoji64"
    for name in ("config.yaml", "model.safetensors"):
        shutil.copy(shipped / name, tmp_path)
    model = ["--config", str(tmp_path / "config.yaml"), "--ckpt", str(tmp_path / "model.safetensors")]
    plan = tmp_path / "plan.yaml"
    command = [*model, "--steps", "10", "--keys", "3", "--n_samples", "1"]
    kept = {*tmp_path.iterdir()}
    assert load_script("calibrate_plan").main([*command, "--out", str(plan)]) == 0
    assert {*tmp_path.iterdir()} == kept | {plan}  # nothing beside the weights
    assert load_script("calibrate_plan").main(command) == 0
    printed = capsys.readouterr().out
    written = yaml.safe_load(plan.read_text())
    assert f"key timesteps {','.join(map(str, written['steps'][10]))} of 10" in printed
    facts = {"sampler", "weights", "timesteps", *Recipe(64, 64).facts()}
    assert written["made_for"].keys() == facts and written["propagate"] in printed
    table = read_calibration(tmp_path / "calibration/ddim-10-scale2.json")
    assert table.plan(3).keys == tuple(written["steps"][10]) and table.how["prompts"] == 1
    assert {choice.level for choice in table.choices} == {"encoder", "deepcache", "skip"}
    assert 0 < table.choice(count=3).errors["3"] and written["level"] == "encoder"

    def psnr(spec: str) -> float:
        assert (
            load_script("txt2img").main(
                [
                    *model,
                    "--steps",
                    "10",
                    "--plan",
                    spec,
                    "--noise-weight",
                    "0",
                    "--compare",
                    "--n_samples",
                    "1",
                    "--outdir",
                    str(tmp_path / "out"),
                ]
            )
            == 0
        )
        return float(re.search(r"([\d.]+) dB, ", capsys.readouterr().out)[1])  # the first row is the plan asked for

    published = "0,1,2"
    assert psnr(str(plan)) > psnr(published) + 5
    assert (
        load_script("txt2img").main(
            [
                *model,
                "--steps",
                "10",
                "--sampler",
                "dpm-solver++",
                "--plan",
                str(plan),
                "--outdir",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert "made for sampler ddim; this run's is dpm-solver++" in capsys.readouterr().err
