"""Key nodes by measurement: the search is exact, the measurement is what it says, the plan serves its own run only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ldm.checkpoint import fingerprint
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.propagation.calibration import Calibration, best_keys, measure, read_calibration
from ldm.models.diffusion.propagation.load import RunFacts, calibrations_of, load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.sampling.engine import Recipe
from tests.helpers import golden_sampler
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script
from tests.helpers.toy import toy_denoiser, toy_inputs, toy_network, toy_rule


def total_error(errors, keys):
    return sum(sum(errors[key][: stop - key]) for key, stop in zip(keys, (*keys[1:], len(errors)), strict=True))


@settings(max_examples=60)
@given(n=st.integers(1, 8), data=st.data())
def test_the_best_keys_are_the_best_of_all(n, data):
    errors = [[0.0, *data.draw(st.lists(st.floats(0, 10), min_size=n - 1 - i, max_size=n - 1 - i))] for i in range(n)]
    keys = data.draw(st.integers(1, n))
    found = best_keys(errors, keys)
    assert len(found) == keys and found[0] == 0
    everything = [(0, *rest) for rest in combinations(range(1, n), keys - 1)]
    assert total_error(errors, found) == pytest.approx(min(total_error(errors, each) for each in everything))


def test_an_error_that_grows_evenly_gives_even_keys():
    errors = [[float(j) for j in range(12 - i)] for i in range(12)]
    assert best_keys(errors, 4) == (0, 3, 6, 9)
    with pytest.raises(ValueError, match=r"keys must be 1\.\.12, the nodes of this run; got 13"):
        best_keys(errors, 13)


def test_the_measured_error_is_that_of_one_wrong_node():
    """Holding features at one node alone moves its latent by what the table says."""
    x, cond, uncond = toy_inputs(2)
    model, rule = toy_denoiser(toy_network(), cond, uncond, 2.0), toy_rule(10)
    eps, features = measure(model, rule, x)
    xs = [x, *(state.x for state in denoise(model, rule, load_plan("off", 10), x))]
    for i, j in ((0, 1), (3, 7), (2, 9)):
        held = model.encode(xs[i], rule.nodes[i].t)
        wrong = model.to_eps(model.decode([held], [rule.nodes[j].t])[0], xs[j], rule.nodes[j])
        right = model.to_eps(
            model.decode([model.encode(xs[j], rule.nodes[j].t)], [rule.nodes[j].t])[0], xs[j], rule.nodes[j]
        )
        with torch.no_grad():
            moved = rule.eta == 0 and (xs[j + 1] - stepped(rule, xs[j], j, wrong)).square().mean()
            assert torch.allclose(stepped(rule, xs[j], j, right), xs[j + 1])
        assert eps[i][j - i] == pytest.approx(float(moved), rel=1e-6)
        assert features[i][j - i] > 0
    assert all(row[0] == 0 for row in (*eps, *features))


def stepped(rule, x, i, eps):
    from ldm.models.diffusion.loop import State

    return rule.step(State(x), i, eps).x


def calibration(n=10, **changes):
    errors = [[float(j) for j in range(n - i)] for i in range(n)]
    return Calibration(**{"num_nodes": n, "eps": errors, "features": errors, "encoder": 0.3} | changes)


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
    made.save(tmp_path / "ddim-10.json")
    assert read_calibration(tmp_path / "ddim-10.json") == made
    run = RunFacts({"sampler": "ddim", "weights": "abc"}, tmp_path)
    assert load_plan("auto:5", 10, 3, run=run) == Plan(10, (0, 2, 4, 6, 8), 3, propagate="linear")
    assert load_plan("auto:5", 10, run=run, propagate="hold").propagate == "hold"
    for share in ("auto:.8", "auto:0.8", "auto:80%", "auto:80.0%"):
        assert len(load_plan(share, 10, run=run).keys) == 3
    assert len(load_plan("auto:1", 10, run=run).keys) == 1
    assert len(load_plan("auto:100%", 10, run=run).keys) == 10
    for facts, nodes, why in (
        ({"sampler": "plms", "weights": "abc"}, 10, "for plms with 10 nodes; there is none"),
        ({"sampler": "ddim", "weights": "abc"}, 20, "for ddim with 20 nodes; there is one for 10"),
        ({"sampler": "ddim", "weights": "b"}, 10, "made for weights abc; this run's is b"),
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


TABLE = '{"num_nodes": %d, "eps": [[0]], "features": [[0]], "encoder": %g}'


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "is no calibration"),
        ("[1]", "is no calibration"),
        (TABLE % (2, 0.3), "rows of 2"),
        (TABLE % (1, 3), "encoder should be less than 1; got 3"),
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
        ("eps", [[None, 1], [0]]),
        ("eps", {"0": 1}),
        ("features", [["a", "b"], "c"]),
        ("features", [[0, float("nan")], [0]]),
        ("encoder", "0.3"),
        ("propagate", ["hold"]),
        ("made_for", None),
        ("made_for", ["ddim"]),
        ("how", 3),
    ],
    ids=str,
)
def test_values_of_another_kind_say_which(tmp_path, name, value):
    good = {"num_nodes": 2, "eps": [[0, 1], [0]], "features": [[0, 1], [0]], "encoder": 0.3}
    file = tmp_path / "ddim-2.json"
    file.write_text(json.dumps(good))
    assert read_calibration(file).plan(1).keys == (0,)
    file.write_text(json.dumps(good | {name: value}))
    with pytest.raises(ValueError, match=rf"ddim-2.json is no calibration: {name}(\.\d\.\d)? should be "):
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


@pytest.mark.parametrize("out", ["n" * 5000, f"{__file__}/plan.yaml"])
def test_a_place_where_nothing_can_be_written_is_known_before_the_work(out, capsys):
    assert load_script("calibrate_plan").main(["--out", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("calibrate_plan.py: error: --out: ")


def test_the_script_makes_a_plan_that_beats_the_published_one_and_is_refused_elsewhere(tmp_path, capsys):
    """On the shipped model, copied so that its own table stays: 10 steps, two pictures."""
    import shutil

    shipped = ROOT / "models/ldm/emoji64"
    for name in ("config.yaml", "model.safetensors"):
        shutil.copy(shipped / name, tmp_path)
    model = ["--config", str(tmp_path / "config.yaml"), "--ckpt", str(tmp_path / "model.safetensors")]
    plan = tmp_path / "plan.yaml"
    command = [*model, "--steps", "10", "--keys", "3", "--n_samples", "2"]
    kept = {*tmp_path.iterdir()}
    assert load_script("calibrate_plan").main([*command, "--out", str(plan)]) == 0
    assert {*tmp_path.iterdir()} == kept | {plan}  # nothing beside the weights
    assert load_script("calibrate_plan").main(command) == 0
    printed = capsys.readouterr().out
    written = yaml.safe_load(plan.read_text())
    assert f"key timesteps of 10: {','.join(map(str, written['steps'][10]))}" in printed
    facts = {"sampler", "weights", "timesteps", *Recipe(64, 64).facts()}
    assert written["made_for"].keys() == facts and written["propagate"] in printed
    table = read_calibration(tmp_path / "calibration/ddim-10-scale2.json")
    assert table.plan(3).keys == tuple(written["steps"][10]) and table.how["prompts"] == 2
    assert np.all(np.diff([sum(table.eps[0][:n]) for n in range(1, 11)]) > 0)

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
                    "2",
                    "--outdir",
                    str(tmp_path / "out"),
                ]
            )
            == 0
        )
        return float(re.search(r"([\d.]+) dB, ", capsys.readouterr().out)[1])  # the first row is the plan asked for

    published = "0,1,2"
    assert psnr("auto:3") == psnr(str(plan)) > psnr(published) + 5
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
