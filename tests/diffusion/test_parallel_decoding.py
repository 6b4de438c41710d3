"""Decoder batches by memory, halved when it runs out, and spread over processes."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.cli.parser import torchrun_ranks
from ldm.cli.setup import Processes
from ldm.io.images import from_pil, read_png
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.control import Control, Controlled
from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.denoiser import BatchBackoff, Conditioning, Guidance
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.parallel import DistributedDecode, first_process
from ldm.models.diffusion.propagation.budget import BudgetPlan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import Features
from ldm.profiling.cost import decoder_bytes, decoders_that_fit, free_bytes, kept_bytes, peak_bytes, sampling_bytes
from ldm.sampling.generate import read_manifest
from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import write_model
from tests.helpers.tiny_unet import TEXT_UNET, unet_config
from tests.helpers.toy import EXACT, ToyNetwork, final, toy_denoiser, toy_inputs, toy_network, toy_rule

main = load_script("txt2img").main

UNET = TEXT_UNET | {"attention_resolutions": [1, 2]}
FIRST_STAGE = dict(
    double_z=True,
    z_channels=4,
    resolution=16,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 1],
    num_res_blocks=1,
    attn_resolutions=[],
)
GUIDANCE = {"always": Guidance(3.0), "reuse": Guidance(3.0, reuse=True)}


# Memory


def test_peak_bytes_are_of_what_lives_at_one_time():
    x = torch.zeros(1000)

    def call() -> torch.Tensor:
        a = x + 1  # 4000 bytes
        b = a.view(10, 100) * 2  # and 4000; the view is none
        del a
        c = b.double()  # 4000 and 8000
        return c.add_(1)

    assert peak_bytes(call) == 12000
    assert peak_bytes(lambda: x.view(10, 100).t()) == 0


def test_the_estimate_is_what_a_real_decoder_holds():
    unet = UNetModel(**UNET).requires_grad_(False)
    t, context = torch.full((4,), 500.0), torch.randn(4, 7, 16)
    nodes = unet.encode(torch.randn(4, 4, 8, 8), t, context).chunk(2)
    real = peak_bytes(lambda: unet.decode(Features.cat(nodes), t, context))
    assert decoder_bytes(unet, (8, 8), batch=2, context_length=7) == real // 2
    one, four = (decoder_bytes(unet, (8, 8), batch, 7) for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.02)
    assert not unet.out[0].weight.is_meta
    assert decoder_bytes(unet_config(**UNET), (8, 8), batch=2, context_length=7) == real // 2


def test_the_estimate_of_sampling_is_what_networks_really_hold():
    unet = UNetModel(**UNET).requires_grad_(False)
    first_stage = AutoencoderKL(FIRST_STAGE, 4).requires_grad_(False)
    t, context = torch.full((8,), 500.0), torch.randn(8, 7, 16)
    x = torch.randn(8, 4, 8, 8)
    predicting = peak_bytes(lambda: unet.decode(unet.encode(x, t, context), t, context))
    decoding = peak_bytes(lambda: first_stage.decode(x))
    for images, predictions, real in ((1, 8, predicting), (8, 1, decoding)):
        assert sampling_bytes(unet, first_stage, (4, 8, 8), images, predictions, 7) == real


def test_the_estimate_of_sampling_counts_control_networks():
    network = DiffusionWrapper(unet_config(**UNET), "crossattn")
    unet, first_stage = network.diffusion_model, AutoencoderKL(FIRST_STAGE, 4).requires_grad_(False)
    encoder = {key: value for key, value in UNET.items() if key != "out_channels"}
    control = ControlNet(**encoder, hint_channels=3, hint_widths=(8, 16)).requires_grad_(False)
    t, context, x = torch.full((8,), 500.0), torch.randn(8, 7, 16), torch.randn(8, 4, 8, 8)
    hint = torch.zeros(4, 3, 16, 16)

    def predict():
        controlled, cond = Controlled(network, [Control.of(control, hint)]), Conditioning(context)
        return controlled.decode(controlled.encode(x, t, cond), t, cond)

    real = peak_bytes(predict)
    alone, counted = (sampling_bytes(unet, first_stage, (4, 8, 8), 4, 8, 7, controls=one) for one in ((), [control]))
    assert alone < counted == pytest.approx(real, rel=0.03)


def test_what_is_counted_as_kept_is_what_a_real_run_keeps():
    unet = UNetModel(**UNET).requires_grad_(False)
    t, context = torch.full((1,), 500.0), torch.randn(1, 7, 16)
    features = unet.encode(torch.randn(1, 4, 8, 8), t, context)
    inner = [unet.advance(features, t, context, blocks=b).hidden for b in range(len(features.skips) + 1)]
    made = {id(part.conv): part.conv for part in unet.share(features).shared}
    kept = kept_bytes(unet, (8, 8), 7)
    assert kept.features == sum(tensor.nbytes for tensor in features.tensors)
    assert kept.inner == tuple(hidden.nbytes for hidden in inner) and len(set(kept.inner)) > 1
    assert kept.output == unet.decode(features, t, context).nbytes
    assert kept.shared >= sum(conv.nbytes for conv in made.values()) > 0


def test_memory_decides_how_many_fit():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert decoders_that_fit(1000, 100, 0) == 8 and decoders_that_fit(100, 100, 0) == 0
    assert decoders_that_fit(1000, 100, 150) == 6 and decoders_that_fit(100, 10, 150) == 0
    assert decoders_that_fit(None, 100, 0) is None


class SmallDevice(ToyNetwork):
    """The toy on a device with memory for `room` latents in one decoder batch."""

    room = 5

    def advance(self, features: Features, t: Tensor, *rest, **named) -> Features:
        if len(t) > self.room:
            raise torch.OutOfMemoryError(f"{len(t)} latents")
        return super().advance(features, t, *rest, **named)


def small_device(room: int) -> SmallDevice:
    torch.manual_seed(5)  # the weights of toy_network
    network = SmallDevice().requires_grad_(False)
    network.room = room
    return network


@pytest.mark.parametrize(
    "guidance, plan, most",
    [
        ("always", Plan(10, (0, 1), 20), 2),
        ("reuse", Plan(10, (0, 1), 20), 5),
        ("always", Plan(10, (0, 6), 4, (4, 8), 1, "linear"), 2),
    ],
    ids=str,
)
def test_a_run_that_hits_the_ceiling_goes_on_with_smaller_batches(guidance, plan, most):
    x, cond, uncond = toy_inputs(1)
    rule, network = toy_rule(10), small_device(5)
    expected = final(toy_denoiser(toy_network(), cond, uncond, GUIDANCE[guidance]), rule, plan, x)
    with pytest.raises(torch.OutOfMemoryError):
        final(toy_denoiser(network, cond, uncond, GUIDANCE[guidance]), rule, plan, x)
    network.decoded.clear()
    halving = BatchBackoff(toy_denoiser(network, cond, uncond, GUIDANCE[guidance]))
    torch.testing.assert_close(final(halving, rule, plan, x), expected, **EXACT)
    assert halving.most == most
    failures = sum(size > 5 for size in network.decoded)
    final(halving, rule, plan, x)
    assert sum(size > 5 for size in network.decoded) == failures, "what was learned is kept"


def test_a_single_node_that_does_not_fit_is_an_error():
    x, cond, uncond = toy_inputs(1)
    halving = BatchBackoff(toy_denoiser(small_device(1), cond, uncond, 3.0))
    with pytest.raises(torch.OutOfMemoryError, match="2 latents"):
        final(halving, toy_rule(4), Plan(4, (0,), 4), x)


# Processes


def in_processes(size: int, work: Callable[[int], object]) -> list[object]:
    """work(rank) in real processes with the environment that torchrun gives them; all results, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]

    def child(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            pipes[rank][1].send((True, work(rank)))
        except BaseException:
            pipes[rank][1].send((False, traceback.format_exc()))

    children = [fork.Process(target=child, args=(rank,), daemon=True) for rank in range(size)]
    for process in children:
        process.start()
    results = [receiver.recv() if receiver.poll(120) else (False, "no answer") for receiver, _ in pipes]
    for process in children:
        process.join(10)
        process.kill()
    assert all(good for good, _ in results), "\n".join(str(result) for _, result in results)
    return [result for _, result in results]


SPREAD_PLANS = [
    Plan(10, (0, 2, 3), 20),  # groups of 2, 1 and 7 nodes
    Plan(10, (0, 4), 3, propagate="quadratic"),  # batches of 3, 1, 3, 3
    Plan(10, (0, 6), 5, (3, 8), 2, "linear"),  # with shallow nodes
    Plan(10, (0, 6), 5, refresh=1),
]


@pytest.mark.parametrize("size", [2, 3])
def test_spread_decoders_give_what_one_process_gives(size):
    x, cond, uncond = toy_inputs(2)
    rule = toy_rule(10)
    expected = [final(toy_denoiser(toy_network(), cond, uncond, 3.0), rule, plan, x) for plan in SPREAD_PLANS]

    def work(rank: int) -> tuple[list[list[float]], list[int]]:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
        network = toy_network()
        spread = DistributedDecode(toy_denoiser(network, cond, uncond, 3.0))
        first = final(spread, rule, SPREAD_PLANS[0], x)
        decoded = [*network.decoded]
        results = [first, *(final(spread, rule, plan, x) for plan in SPREAD_PLANS[1:])]
        with pytest.raises(ValueError, match="reuse of the guidance offset does not go with"):
            final(DistributedDecode(toy_denoiser(network, cond, uncond, GUIDANCE["reuse"])), rule, SPREAD_PLANS[0], x)
        torch.distributed.destroy_process_group()
        return [result.flatten().tolist() for result in results], decoded

    answers = in_processes(size, work)
    for results, _ in answers:
        for ours, true in zip(results, expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), true.flatten(), **EXACT)
    # Latents of every call: 2 images, both halves of the guidance, for ceil(n / size) nodes at most.
    shares = {2: [[1, 1, 4], [1, 1, 3]], 3: [[1, 1, 3], [1, 1, 3], [1, 1, 1]]}[size]
    assert [decoded for _, decoded in answers] == [[4 * n for n in share] for share in shares]


def test_processes_that_measure_differently_decide_alike():
    """The second's forecasts miss by far more than the budget; it goes on with the first, whose do not."""
    x, cond, uncond = toy_inputs(1)
    plan = BudgetPlan(Plan(10, (0, 5), propagate="linear"), 1e6, 3)

    def work(rank: int) -> list[int]:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        spread = DistributedDecode(toy_denoiser(toy_network(), cond, uncond, 3.0))
        states = denoise(spread, toy_rule(10), plan, x, agreed=lambda error: first_process(error + 1e9 * rank))
        nodes = [state.node for state in states]
        torch.distributed.destroy_process_group()
        return nodes

    assert in_processes(2, work) == [[*range(10)]] * 2


def test_processes_agree_on_the_batch_and_follow_the_leader():
    def work(rank: int) -> tuple[int, list[object]]:
        processes = Processes(*torchrun_ranks())
        with processes.joined(torch.device("cpu")):
            least = processes.least(7 - rank)
            if processes.rank > 0:
                return least, [*processes.orders()]
            for order in (("plain", [1, 2]), ("accelerated", [3]), None):
                processes.tell(order)
        return least, []

    followed = (5, [("plain", [1, 2]), ("accelerated", [3])])
    assert in_processes(3, work) == [(5, []), followed, followed]
    assert Processes(*torchrun_ranks()) == Processes() and Processes().least(4) == 4


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


def command(files: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    return [
        "--config",
        str(files[0]),
        "--ckpt",
        str(files[1]),
        "--outdir",
        str(out),
        "--steps",
        "7",
        "--n_samples",
        "2",
        "--plan",
        "0,1",
        *more,
    ]


def test_a_script_in_two_processes_makes_the_images_of_one(files, tmp_path):
    assert main(command(files, tmp_path / "one")) == 0
    together = command(files, tmp_path / "two", "--parallel", "3")
    assert in_processes(2, lambda rank: main(together)) == [0, 0]
    one, two = (read_manifest(tmp_path / name / "manifest.jsonl") for name in ("one", "two"))
    assert [entry["file"] for entry in one] == [entry["file"] for entry in two], "each picture once, under its name"
    for entry in one:
        ours, other = (from_pil(read_png(tmp_path / name / entry["file"])[0]) for name in ("one", "two"))
        assert (ours - other).abs().max() <= 1.01 / 127.5
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    assert in_processes(2, lambda rank: main(together)) == [0, 0], "nothing to make: the second process is told so"
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}


# Bad input


@pytest.mark.parametrize(
    "arguments, processes, why",
    [
        (["--tome", "0.8"], 1, "--tome: expected a number in 0..0.75; got '0.8'"),
        (["--tome", "-1"], 1, "--tome: expected a number in 0..0.75"),
        (["--tome", "nan"], 1, "--tome: expected a number in 0..0.75"),
        (
            ["--tome", "0.5"],
            1,
            "--tome: this network has no self-attention in spatial transformers at its finest level",
        ),
        (
            ["--steps", "10", "--parallel", "9"],
            1,
            "--parallel: 9 decoder steps need about 4 MB, 5 MB are free; expected auto or at most 8",
        ),
        (["--guidance-reuse"], 2, "--guidance-reuse: .* does not go with several processes"),
        (
            ["--device", "cpu:0"],
            2,
            "--device: cpu:0 is one device, and there are 2 processes; accepted: auto, cuda, cpu",
        ),
        (["--device", "cuda"], 2, "--device: process 1 has no GPU of its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_says_why(files, tmp_path, capsys, monkeypatch, arguments, processes, why):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900000 kB\nMemAvailable:  5200 kB\n")
    monkeypatch.setattr("ldm.profiling.cost.MEMINFO", meminfo)
    if processes > 1:
        for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": processes}.items():
            monkeypatch.setenv(name, str(value))
    assert main(command(files, tmp_path / "out", *arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"txt2img.py: error: {why}", line), line
    assert not (tmp_path / "out").exists()


def test_auto_takes_what_memory_allows(files, tmp_path, monkeypatch):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable:  5200 kB\n")
    monkeypatch.setattr("ldm.profiling.cost.MEMINFO", meminfo)
    for steps in ("25", "22"):
        assert main(command(files, tmp_path / "out", "--steps", steps)) == 0
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    # Of a group of 24 and one of 21; at most 8 fit.
    assert [entry["parallel"] for entry in entries] == [8, 8, 7, 7]
