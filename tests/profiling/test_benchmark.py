"""scripts/benchmark.py and what it measures with, at sizes where only the arithmetic matters."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.packed import pack
from ldm.profiling import timing
from ldm.profiling.benchmark import peaks_of, read_row
from ldm.profiling.cost import shared_bytes, unet_macs
from ldm.profiling.timing import CPU, Seconds, alternate, peak_memory, shares
from ldm.profiling.workload import Workload, random_network
from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import load_script
from tests.helpers.tiny_unet import network_params

main = load_script("benchmark").main
PARAMS = network_params(image_size=16, attention_resolutions=[1, 2])


def workload(steps: int = 4) -> Workload:
    network = random_network(PARAMS)
    return Workload.of(PARAMS, network, (16, 16), 1, 5, steps)


def test_calls_take_turns():
    """What is told of a call is at least what passed inside it, and all of them together at most what passed."""
    inside: dict[str, list[float]] = {"long": [], "short": []}
    order = []

    def call(name: str, count: int) -> None:
        began = time.perf_counter()
        order.append(name)
        sum(range(count))
        inside[name].append(time.perf_counter() - began)

    began = time.perf_counter()
    taken = alternate({"long": lambda: call("long", 100_000), "short": lambda: call("short", 0)}, 3)
    passed = time.perf_counter() - began
    assert order == ["long", "short"] * 3
    for name, least in inside.items():
        assert all(a <= b for a, b in zip(least, taken[name].values, strict=True))
    assert sum(sum(seconds.values) for seconds in taken.values()) <= passed
    assert (Seconds((1.0, 2.0, 4.0)).median, Seconds((1.0, 2.0, 4.0)).spread) == (2.0, 0.75)


def test_peak_memory_is_what_was_held_at_one_time():
    before = torch.zeros(1000)

    def call() -> None:
        for _ in range(3):
            a = before + 1
            b = torch.cat([a, a])
            del a, b

    assert peak_memory(call) == 3 * before.nbytes


def test_a_serial_propagated_run_needs_no_more_than_plain_and_what_its_nodes_share():
    """In a plain run, too, the features of the node before are still there."""
    run = workload()
    shared = run.denoiser.share(run.denoiser.encode(run.x, 500.0))
    features = sum(tensor.nbytes for tensor in shared.tensors)
    parts = sum(part.conv.nbytes + part.residual.nbytes for part in shared.shared)
    plain, held, linear = (
        peak_memory(lambda plan=plan: run.run(plan))
        for plan in (load_plan("off", 4), Plan(4, (0, 2)), Plan(4, (0, 2), propagate="linear"))
    )
    assert held <= plain + features + parts + shared_bytes(run.network.diffusion_model)
    assert linear <= plain + 3 * features
    assert peak_memory(lambda: run.run(Plan(4, (0,), 4))) > held, "decoders in one batch need more"


def test_shares_are_of_the_kinds_that_ran():
    run = workload(1)
    for prepare in (lambda: None, lambda: pack(run.network.diffusion_model, (16, 16), 5)):
        prepare()
        found = shares(lambda: run.run(Plan(1, (0,))))
        assert sum(found.values()) == pytest.approx(1)
        assert all(found[kind] > 0 for kind in ("convolution", "linear", "attention", "norm", "other"))
    found = shares(lambda: torch.ones(50, 50) @ torch.ones(50, 50))
    assert {kind for kind, share in found.items() if share} == {"linear", "other"}


def test_rows_are_plans_with_their_propagation_and_batch():
    assert read_row("uniform:4+linear@3", 8, Path("none")) == Plan(8, (0, 4), 3, propagate="linear")
    assert read_row("off", 3, Path("none")) == load_plan("off", 3)
    calibrated = read_row("auto:9@3", 50, EMOJI64 / "calibration")
    assert len(calibrated.keys) == 9 and (calibrated.parallel, calibrated.propagate) == (3, "quadratic")


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """The matrix product that the machine's speed is measured by takes most of the time otherwise."""
    monkeypatch.setattr(timing, "MATRIX", 64)


def write_config(path: Path, **changes: Any) -> None:
    """A tiny model; changes of its network."""
    rest = {
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": "__is_unconditional__",
    }
    params = network_params(image_size=16, attention_resolutions=[1, 2], **changes) | rest
    if "adm_in_channels" in changes:
        params["conditioning_key"] = "crossattn-adm"
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    OmegaConf.save(OmegaConf.create({"model": model}), path)


def test_a_table_for_each_model_and_precision(tmp_path, capsys):
    """With what a GPU is asked for, on a CPU: two networks, one of which takes a vector, as SDXL does."""
    write_config(tmp_path / "one.yaml")
    write_config(tmp_path / "xl.yaml", num_classes="sequential", adm_in_channels=24)
    out, configs = tmp_path / "gpu.json", [str(tmp_path / name) for name in ("one.yaml", "xl.yaml")]
    args = ["--device", "cpu", "--tokens", "5", "--steps", "2", "--rows", "off", "tgate:1", "--repeats", "1"]
    assert main([*args, "--config", *configs, "--dtype", "fp32", "bf16", "--json", str(out)]) == 0
    results, printed = json.loads(out.read_text())["results"], capsys.readouterr().out
    assert [(r["config"], r["dtype"]) for r in results] == [(c, d) for c in configs for d in ("fp32", "bf16")]
    assert "xl.yaml, latents 16 x 16, bf16" in printed and "bf16 matrix product" in printed
    peaks = [result["rows"][0]["peak"] for result in results]
    assert peaks[1] < 0.8 * peaks[0] and peaks[3] < 0.8 * peaks[2], "features take half the memory"
    assert all(r["rows"][1]["macs"] < r["rows"][0]["macs"] and r["out_of_memory"] == [] for r in results)


def test_a_row_without_memory_is_told():
    def too_much() -> None:
        raise torch.OutOfMemoryError

    assert peaks_of({"much": too_much, "little": lambda: torch.zeros(10)}, CPU) == {"much": None, "little": 40}


def test_a_table_of_which_no_row_has_memory_is_printed(tmp_path, capsys, monkeypatch):
    """And the tables before one that fails are written."""

    def too_much(run: Workload, plan: Plan) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Workload, "run", too_much)
    write_config(tmp_path / "one.yaml")
    (tmp_path / "bad.yaml").write_text((tmp_path / "one.yaml").read_text().replace("crossattn", "hybrid"))
    out, configs = tmp_path / "out.json", [str(tmp_path / name) for name in ("one.yaml", "bad.yaml")]
    args = ["--config", *configs, "--tokens", "5", "--steps", "2", "--rows", "off", "--repeats", "1"]
    assert main([*args, "--json", str(out)]) == 2
    assert "off                       out of memory" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert result["out_of_memory"] == ["off"] and result["rows"] == [] and result["shares"] == {}


@pytest.mark.parametrize("against", [[], ["--against", "diffusers"]], ids=["alone", "against diffusers"])
def test_prints_a_table_and_writes_json(tmp_path, capsys, against):
    if against:
        pytest.importorskip("diffusers")
    write_config(tmp_path / "c.yaml")
    args = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--steps",
        "4",
        "--rows",
        "off",
        "0,2@2",
        "deepcache:2",
        "--tokens",
        "5",
        "--repeats",
        "1",
        "--batch",
        "1",
        "2",
        "--json",
        str(tmp_path / "out.json"),
        *against,
    ]
    assert main(args) == 0, capsys.readouterr().err
    written, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert written["threads"] == torch.get_num_threads() and written["torch"] == torch.__version__
    unit = unet_macs(PARAMS["unet_config"], (16, 16), 2, 5)
    for result, batch in zip(written["results"], (1, 2), strict=True):
        rows = {row["name"]: row for row in result["rows"]}
        assert [*rows] == ["off", "0,2@2", "deepcache:2", *(["diffusers"] if against else [])]
        assert rows["0,2@2"]["macs"] == unit.once + 2 * unit.encode + 4 * unit.decode and rows["off"]["saved"] is None
        assert rows["0,2@2"]["batch"] == batch and rows["off"]["seconds"] > 0
        if against:
            assert result["difference"] < 1e-3, "the same weights, scheduler and latents"
    assert printed.count("float32 matrix product") == 2 and "time of a plain step: convolution" in printed


@pytest.mark.parametrize(
    "args, why",
    [
        (["--rows", "off@²"], "--rows: the number of decoder steps in a batch follows the @; got 'off@²'"),
        (["--rows", "online:0.1"], "--rows: online:0.1 decides during a run"),
        (["--config", "none.yaml"], "--config: none.yaml: no such file"),
        (["--json", f"{__file__}/out.json"], "--json: can't write"),
        (["--json", "n" * 5000], "--json: "),
        (["--device", "cuda:99"], "--device: cuda:99 is not there; on this machine: auto, "),
        (["--dtype", "bf16", "--against", "diffusers"], "--against: diffusers is timed in fp32 on a CPU only"),
        (["--size", "7", "7", "--steps", "1"], "--size: x must have height and width that are multiples"),
    ],
)
def test_bad_input(capsys, args, why):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
