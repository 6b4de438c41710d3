"""Plans of one model timed side by side, with random weights: plain, the paper's, DeepCache, another library's run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import diffusion_params
from ldm.checkpoint.conversion import ConversionError
from ldm.io.errors import SettingError, fault_of
from ldm.models.diffusion.parallel import Compiled, check_compiler
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.packed import pack
from ldm.profiling.cost import Macs, context_tokens, timed, unet_macs
from ldm.profiling.timing import CPU, Seconds, alternate, machine, matrix_product, peak_memory, shares
from ldm.profiling.workload import Workload, random_network

MATRIX, PEER = "matrix product", "diffusers"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILED = ", compiled"  # after the name of a row


@dataclass(frozen=True)
class Benchmark:
    """What is timed.

    config: of the model.
    size: height and width of the latents; None = the config's.
    tokens: of the context, if there is one; None = as many as the config's text encoder reads.
    steps: of DDIM.
    rows: names of plans, see `read_row`.
    peer: also time the run of diffusers on the same weights.
    compiled: also time every row compiled by PyTorch.
    repeats: timed rounds.
    threads: of the CPU; None = PyTorch's.
    device, dtype: where, and in which of DTYPES.
    """

    config: str
    size: tuple[int, int] | None
    tokens: int | None
    steps: int
    rows: Sequence[str]
    peer: bool
    compiled: bool
    repeats: int
    threads: int | None = None
    device: torch.device = CPU
    dtype: str = "fp32"

    @property
    def packed(self) -> bool:
        """Whether layers are packed, and diffusers can be timed on the same weights."""
        return self.device.type == "cpu" and self.dtype == "fp32"

    @property
    def plans(self) -> dict[str, Plan]:
        with fault_of("rows"):
            return {name: read_row(name, self.steps, Path(self.config).parent / "calibration") for name in self.rows}

    @property
    def latent_size(self) -> tuple[int, int]:
        with fault_of("config"):
            return tuple(self.size or [diffusion_params(self.config)["image_size"]] * 2)


@dataclass(frozen=True)
class Row:
    """One line of the table; per image.

    seconds, spread: of a run, and half the range as a share.
    macs, critical_path: of the UNet.
    saved: of the plain run's time, as a share of what the MACs say; None for the plain run.
    peak: bytes of its tensors.
    """

    name: str
    batch: int
    seconds: float
    spread: float
    macs: int | None
    critical_path: int | None
    saved: float | None
    peak: int


def read_row(text: str, steps: int, calibrations: Path) -> Plan:
    """The plan of a row's name; calibrations: the folder with the model's own, for `auto:K`."""
    name, _, parallel = text.partition("@")
    spec, _, propagate = name.partition("+")
    if parallel and not parallel.isdecimal():
        raise ValueError(f"the number of decoder steps in a batch follows the @; got {text!r}")
    plan = load_plan(spec, steps, int(parallel or 1), propagate or None, RunFacts({"sampler": "ddim"}, calibrations))
    if not isinstance(plan, Plan):
        raise ValueError(f"{spec} decides during a run; its cost is not known before")
    return plan


def run_benchmark(benchmark: Benchmark, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What was measured for each batch size, as JSON values, as soon as it is there.

    Raises:
        SettingError: a setting can't be used, or a library that is needed is not here.
    """
    plans, _ = benchmark.plans, benchmark.latent_size  # which reads the config
    if benchmark.peer and not benchmark.packed:
        raise SettingError("against", "diffusers is timed in fp32 on a CPU only")
    if benchmark.compiled:
        with fault_of("compile"):
            check_compiler()
    torch.set_num_threads(benchmark.threads or torch.get_num_threads())
    return _measured(benchmark, batches, plans)


def _measured(benchmark: Benchmark, batches: Sequence[int], plans: Mapping[str, Plan]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        with fault_of("config" if benchmark.size is None else "size", (ValueError, TypeError, KeyError)):
            result = measure(benchmark, batch, plans)
        yield result


def circumstances(benchmark: Benchmark) -> dict[str, Any]:
    """What timings depend on, as JSON values."""
    about = machine(benchmark.device) | {"steps": benchmark.steps, "repeats": benchmark.repeats}
    if benchmark.peer:
        about["diffusers"] = _baseline().diffusers.__version__
    return about


def measure(benchmark: Benchmark, batch: int, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """All rows for one batch size, with what belongs to them."""
    params = diffusion_params(benchmark.config)
    size, device, dtype = benchmark.latent_size, benchmark.device, DTYPES[benchmark.dtype]
    network = random_network(params, device, dtype)
    tokens = context_tokens(params)
    tokens = tokens and (benchmark.tokens or tokens)
    peer = peer_of(params, network) if benchmark.peer else None
    if benchmark.packed:
        pack(network.diffusion_model, size, tokens)
    workload = Workload.of(params, network, size, batch, tokens, benchmark.steps)
    unit = unet_macs(network.diffusion_model, size, 2, tokens)

    product, operations = matrix_product(device, dtype)
    calls = {MATRIX: product} | {name: partial(workload.run, plan) for name, plan in plans.items()}
    result: dict[str, Any] = {"config": benchmark.config, "size": [*size], "dtype": benchmark.dtype, "batch": batch}
    if benchmark.compiled:
        more = compiled_calls(workload, plans)
        calls |= more
        plans = {**plans, **{name + COMPILED: plan for name, plan in plans.items()}}
        result["compile_seconds"] = sum(timed(partial(fits, call), device)[1] for call in more.values())
    if peer is not None:
        others, facts = against(peer, workload, benchmark.compiled)
        calls, result = calls | others, result | facts
    peaks = peaks_of(calls, device)
    result["out_of_memory"] = [name for name, peak in peaks.items() if peak is None]
    taken = alternate(
        {name: calls[name] for name, peak in peaks.items() if peak is not None}, benchmark.repeats, device
    )
    rate = operations / taken.pop(MATRIX).median
    rows = [make_row(name, batch, plans.get(name), taken, unit, peaks[name], benchmark.steps) for name in taken]
    step = partial(replace(workload, steps=1).run, load_plan("off", 1))
    plain = 2 * batch * unit.plain(benchmark.steps) / taken["off"].median if "off" in taken else None
    return result | {
        "matmul_flops": rate,
        "plain_flops": plain,
        "shares": shares(step, device) if fits(step) else {},
        "rows": [asdict(row) for row in rows],
    }


def peaks_of(calls: Mapping[str, Callable[[], Any]], device: torch.device) -> dict[str, int | None]:
    """The peak memory of each call; None = there is not enough."""
    peaks: dict[str, int | None] = {}
    for name, call in calls.items():
        try:
            peaks[name] = peak_memory(call, device)
        except torch.OutOfMemoryError:
            peaks[name] = None
    return peaks


def fits(call: Callable[[], Any]) -> bool:
    """Whether there is enough memory for call(), which runs once."""
    try:
        call()
    except torch.OutOfMemoryError:
        return False
    return True


def compiled_calls(workload: Workload, plans: Mapping[str, Plan]) -> dict[str, Callable[[], Any]]:
    """The runs of the plans with a compiled network, by the names of their rows."""
    compiled = replace(workload, network=Compiled(workload.network))
    return {name + COMPILED: partial(compiled.run, plan) for name, plan in plans.items()}


def peer_of(params: Mapping[str, Any], network: torch.nn.Module) -> torch.nn.Module:
    """The same network by diffusers.

    Raises:
        SettingError: diffusers is not installed, or has no such network.
    """
    with fault_of("against", (ConversionError,)):
        return _baseline().diffusers_peer(params, network)


def against(
    unet: torch.nn.Module, workload: Workload, compiled: bool
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """The plain run by diffusers, as it is fastest, and what to tell of it."""
    peer = _baseline().fastest(unet, workload)
    difference = (peer.run(workload) - workload.run(load_plan("off", workload.steps))).abs().max()
    calls: dict[str, Callable[[], Any]] = {PEER: partial(peer.run, workload)}
    facts: dict[str, Any] = {"peer": peer.setting, "difference": float(difference)}
    if compiled:
        calls[PEER + COMPILED] = partial(peer.compiled().run, workload)
        facts["peer_compile_seconds"] = timed(calls[PEER + COMPILED], CPU)[1]
    return calls, facts


def _baseline() -> Any:
    """`ldm.profiling.diffusers_baseline`, which needs diffusers; most runs do not."""
    with fault_of("against", (ImportError,)):
        from ldm.profiling import diffusers_baseline

        return diffusers_baseline


def make_row(
    name: str, batch: int, plan: Plan | None, taken: Mapping[str, Seconds], unit: Macs, peak: int, steps: int
) -> Row:
    """The line of a row, from the seconds of all rows by name."""
    each, spread = taken[name].median / batch, taken[name].spread
    if plan is None:
        return Row(name, batch, each, spread, None, None, None, peak)
    share, saved = unit.run(plan) / unit.plain(steps), None
    plain = "off" + COMPILED if name.endswith(COMPILED) else "off"
    if plain in taken and share < 1:
        saved = (1 - taken[name].median / taken[plain].median) / (1 - share)
    return Row(name, batch, each, spread, unit.run(plan), unit.critical_path(plan), saved, peak)
