"""`--list-plans` and the flags of the family, from the command line."""

from __future__ import annotations

import re
import shutil

import pytest

from ldm.checkpoint import fingerprint
from ldm.models.diffusion.propagation.calibration import Calibration
from ldm.models.diffusion.propagation.load import load_plan, plan_names
from ldm.profiling.cost import Kept, Macs
from ldm.profiling.plan_table import plan_table, spans
from tests.helpers.paths import ROOT
from tests.helpers.scripts import load_script


def test_spans():
    assert spans((0, 1, 2, 3, 5, 10)) == "0-3,5,10"
    assert spans((0, 1, 3)) == "0,1,3" and spans((4,)) == "4" and spans(range(50)) == "0-49"


def test_costs_of_the_named_plans():
    """Encoder 30, decoder 70, outermost blocks 5 and 10."""
    kept = Kept(10**7, (3 * 10**6, 2 * 10**6), 10**6, 4 * 10**6)
    lines = list(plan_table(Macs(30, 70, (0, 5), (3, 10)), kept, 50, images=2))
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-3]}
    assert rows.keys() >= {"off", "uniform:2", "pro", "deepcache:3", "skip:3", *plan_names()}
    assert rows["off"][:3] == ["100.0%", "100.0%", "0.00"]
    # 9 * 30 + 50 * 70; 9 rounds
    assert rows["faster-diffusion"] == ["75.4%", "18.0%", "8.00", "decoder,", "hold", "0-3,5,10,15,25,35"]
    assert rows["deepcache:3"][:6] == ["43.9%", "43.9%", "4.00", "1", "outer,", "hold"]  # 17 * 100 + 33 * 15
    assert rows["skip:3"][:5] == ["34.0%", "34.0%", "3.00", "nothing,", "quadratic:logsnr:eps"]  # 17 * 100
    assert rows["spectrum"][:5] == ["28.0%", "28.0%", "14.00", "nothing,", "spectrum"]
    assert kept.added(load_plan("uniform:6", 50, propagate="quadratic"), 2) == 2 * 2 * 10**7
    assert "skip:KEYS" in lines[-2] and "taylor2" in lines[-1] and "logsnr" in lines[-1]


def test_control_at_every_step_is_counted():
    """Encoder 30, of which 12 are control's, decoder 70: 9 * 30 + 41 * 12 + 50 * 70."""
    unit, kept = Macs(30, 70, (0, 5), (3, 10), control=12), Kept(10**7, (3 * 10**6, 2 * 10**6), 10**6, 4 * 10**6)
    rows = {line.split()[0]: line.split()[1:] for line in plan_table(unit, kept, 50, images=2, control=True)}
    assert rows["faster-diffusion"][:2] == ["85.2%", "85.2%"], "no decoders share a batch"
    assert not rows.keys() & {"deepcache:3", "skip:3", "tgate:10"}


@pytest.mark.parametrize("flags", [["--list-plans"], ["--list-plans", "--plan", "off"]])
def test_the_list_needs_no_weights(tmp_path, capsys, flags):
    assert load_script("txt2img").main([*flags, "--steps", "20", "--outdir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "key timesteps of 20" in printed and "0-3,5,10,15\n" in printed and "100 % = 8.69 GMAC" in printed
    assert not list(tmp_path.iterdir())


def test_the_list_knows_of_fresh_noise(tmp_path, capsys):
    assert load_script("txt2img").main(["--list-plans", "--sampler", "euler-a", "--outdir", str(tmp_path)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skip:3 ")]
    assert "linear:timestep:x0" in row


@pytest.mark.parametrize(
    "flags, why",
    [
        (
            ["--plan", "deepcache:2", "--guidance-reuse"],
            "--guidance-reuse: between key timesteps it needs steps of the decoder alone",
        ),
        (["--plan", "deepcache:2", "--guidance-forecast", "linear"], "--guidance-forecast: between key timesteps"),
        (["--guidance-reuse", "--guidance-forecast", "linear"], "not allowed with argument --guidance-reuse"),
        (["--plan", "skip:auto:3"], "--plan: this calibration has key timesteps of skip for none; got skip"),
        (["--plan", "auto:3", "--forecast", "cubic"], "--forecast: .*of encoder for the forecasters hold; got cubic"),
        (["--plan", "auto:3", "--scale", "9"], "--plan: calibration ddim-4.json was made for scale 2; this run's is 9"),
        (["--plan", "skip:auto:x"], "--plan: auto takes a number of key timesteps, .*; got .skip:auto:x"),
        (["--plan", "deepcache:online:0.1"], "--plan: online takes no level before it"),
        (
            ["--plan", "deepcache:2", "--propagate", "zeros"],
            "--forecast: zeros can stand for the encoder's features only",
        ),
        (["--plan", "uniform:2", "--forecast", "linear:eps"], "--forecast: eps is a quantity of whole predictions"),
        (["--plan", "skip:2", "--forecast", "quartic"], "--forecast: a forecaster must be one of hold"),
        (["--plan", "skip:2", "--forecast", "linear:sigma"], "--forecast: .*the axis one of timestep"),
        (["--plan", "deepcache:2:99"], "--plan: 99 blocks are to run anew; this network has 6 on each side"),
        (["--plan", "off", "--error-budget", "0.1"], "--error-budget: .* needs forecasts to compare; this plan makes"),
        (["--plan", "online:0.1", "--error-budget", "0.1"], "--error-budget: .* an online plan has none"),
        (["--plan", "skip:2", "--error-budget", "0"], "--error-budget: .*a number above 0"),
        (["--plan", "online:x"], "needs a threshold"),
        (["--plan", "online:-1"], "threshold must be above 0"),
        (["--plan", "online:warp:1"], "probe must be one of latent, time"),
        (["--plan", "auto:99"], r"keys must be 1..4"),
        (["--plan", "auto:0.1"], "share of MACs must lie in"),
        (["--guidance-interval", "300"], "must be LOW,HIGH"),
        (["--guidance-interval", "300,200"], "must be low,high; got 300,200"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(tmp_path, capsys, shipped_calibration, flags, why):
    code = load_script("txt2img").main([*shipped_calibration, "--steps", "4", "--outdir", str(tmp_path / "o"), *flags])
    error = capsys.readouterr().err
    assert code == 2 and re.search(why, error) and error.count("\n") == 1
    assert not list(tmp_path.glob("o/samples/*"))


@pytest.fixture(scope="module")
def shipped_calibration(tmp_path_factory) -> list[str]:
    """The shipped model with a table for 4 steps beside it."""
    folder, shipped = tmp_path_factory.mktemp("model"), ROOT / "models/ldm/emoji64"
    files = [shutil.copy(shipped / name, folder) for name in ("config.yaml", "model.safetensors")]
    choice = {"level": "encoder", "propagate": "hold", "keys": [[*range(count)] for count in range(1, 5)]}
    made_for = {"sampler": "ddim", "weights": fingerprint(files[1])[:16], "scale": 2}
    Calibration(num_nodes=4, rest={"encoder": 0.7}, choices=[choice], made_for=made_for).save(
        folder / "calibration/ddim-4.json"
    )
    return ["--config", str(files[0]), "--ckpt", str(files[1])]
