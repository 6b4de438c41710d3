"""The figures: the numbers behind them on cases that can be checked by hand, and every command from end to end."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from evaluation.figures import KINDS, main
from evaluation.plots import evolution as evolution_figure
from evaluation.plots import norms, placement
from evaluation.plots.blocks import (
    block_outputs,
    change,
    decoder_ends,
    encoder_ends,
    evolution,
    frobenius,
    plain_outputs,
)
from evaluation.plots.drawing import Drawing, image_grid, keep_apart, new_figure, thin_out
from evaluation.plots.evolution import line_styles
from evaluation.plots.experiment import Experiment
from evaluation.plots.maps import colours
from evaluation.plots.placement import SERIES, STRATEGIES, chart, standard_error
from evaluation.plots.prior_noise import low_pass, spectrum
from evaluation.plots.timeline import shares, together
from evaluation.plots.times import measure
from ldm.cli.setup import read_setup
from ldm.models.diffusion.conditioning import Conditioning
from ldm.models.diffusion.denoiser import Conditional
from ldm.models.diffusion.loop import State, denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.propagation.plan import Plan
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers.goldens import recipe_weights
from tests.helpers.tiny_models import WORDS, write_model
from tests.helpers.toy import toy_denoiser, toy_inputs, toy_network, toy_rule

EXACT = {"rtol": 0, "atol": 1e-9}


# Features along a run


def test_change_is_equation_2_by_hand():
    now, before = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    now[1, 0, 0, 0], before[1, 2, 1, 1] = 3.0, 1.0
    np.testing.assert_allclose(change(now, before), [0, (9 + 1) / (3 * 2 * 2)])  # 1 / (d s^2) times the square


def test_frobenius_is_of_the_channels_mean():
    output = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 5.0)])[None]
    np.testing.assert_allclose(frobenius(output), [math.sqrt(4 * 3**2)])


def test_what_does_not_change_has_no_evolution():
    outputs = {"E8": torch.rand(2, 3, 4, 4), "D8": torch.rand(2, 3, 4, 4)}
    found = evolution(iter([outputs] * 5))
    assert all((values == 0).all() and values.shape == (4, 2) for values in found.absolute.values())
    assert all((values == 0).all() for values in found.relative.values())
    assert all(np.ptp(values, axis=0).max() == 0 and values.shape == (5, 2) for values in found.norm.values())


def test_relative_change_does_not_know_the_scale():
    run = [{"B": torch.rand(1, 2, 3, 3)} for _ in range(3)]
    one, ten = evolution(iter(run)), evolution({"B": 10 * o["B"]} for o in run)
    np.testing.assert_allclose(ten.absolute["B"], 100 * one.absolute["B"], rtol=1e-5)
    np.testing.assert_allclose(ten.relative["B"], one.relative["B"], rtol=1e-5)
    np.testing.assert_allclose(ten.norm["B"], 10 * one.norm["B"], rtol=1e-5)


def test_one_step_is_no_evolution():
    with pytest.raises(ValueError, match="at least 2 steps"):
        evolution(iter([{"B": torch.zeros(1, 1, 1, 1)}]))


def test_a_resolution_has_one_style_in_encoder_and_decoder():
    looks = line_styles(["E8", "E4", "E16", "B", "D4", "D16", "D8"])
    assert [*looks] == ["E16", "D16", "E8", "D8", "E4", "D4", "B"]  # finest first
    assert all(looks[f"E{size}"] == looks[f"D{size}"] for size in (4, 8, 16))
    for part in ("color", "marker"):
        assert len({looks[name][part] for name in ("E16", "E8", "E4", "B")}) == 4


def test_blocks_end_where_the_resolution_changes():
    sizes = [64, 64, 64, 32, 32, 32, 16, 16]  # two residual blocks a level, then the layer that halves
    assert encoder_ends(sizes) == [(3, 64), (6, 32), (7, 16)]
    assert decoder_ends(sizes) == [(6, 16), (3, 32), (0, 64)]
    assert encoder_ends([8, 8]) == [(1, 8)] and decoder_ends([8, 8]) == [(0, 8)]


def wrapped_unet() -> tuple[UNetModel, Any]:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = recipe_weights(UNetModel(8, 3, 64, 3, 1, [], channel_mult=(1, 2), num_heads=1), seed=1)

        def encode(self, x, t, cond, tome):
            return self.unet.encode(x, t)

        def advance(self, features, t, cond, blocks, tome):
            return self.unet.advance(features, t, blocks=blocks)

    network = Network()
    return network.unet, Conditional(network, Conditioning())


def test_block_outputs_are_what_the_modules_put_out():
    unet, model = wrapped_unet()
    seen: dict[str, torch.Tensor] = {}

    def watch(name, module):
        return module.register_forward_hook(lambda m, i, output: seen.__setitem__(name, output))

    handles = [watch(f"in{i}", block) for i, block in enumerate(unet.input_blocks)]
    handles += [watch(f"out{i}", block) for i, block in enumerate(unet.output_blocks)]
    handles.append(watch("mid", unet.middle_block))
    x = torch.rand(2, 3, 8, 8)
    unet(x, torch.tensor([5.0, 5.0]))
    for handle in handles:
        handle.remove()
    outputs = block_outputs(model, x, 5.0)
    assert [*outputs] == ["E8", "E4", "B", "D4", "D8"]
    for name, module in zip(outputs, ("in2", "in3", "mid", "out1", "out3"), strict=True):
        torch.testing.assert_close(outputs[name], seen[module], rtol=0, atol=1e-6)
        assert (outputs[name] - block_outputs(model, x, 500.0)[name]).abs().max() > 1e-3


def test_the_run_is_the_plain_run_and_its_conditional_half():
    x, cond, uncond = toy_inputs(2)
    network, rule = toy_network(), toy_rule(4)
    guided, plain = toy_denoiser(network, cond, uncond, 3.0), load_plan("off", 4)
    *_, last = plain_outputs(guided, rule, x)
    *_, state, _ = (State(x), *denoise(guided, rule, plain, x))
    conditional = block_outputs(toy_denoiser(network, cond, uncond, 1.0), state.x, rule.nodes[-1].t)
    for name, output in conditional.items():
        torch.testing.assert_close(last[name], output, **EXACT)


# Feature maps


def test_three_components_of_three_channels_are_all():
    maps = torch.rand(4, 3, 5, 5)
    shown, share = colours(maps)
    assert shown.shape == (4, 3, 5, 5) and share == pytest.approx(1)
    assert float(shown.min()) == -1 and float(shown.max()) == 1


def test_the_first_component_is_where_the_variance_is():
    maps = torch.zeros(2, 6, 4, 4)
    maps[:, 4] = torch.linspace(-1, 1, 32).view(2, 4, 4)
    maps[:, 1] = 1e-3 * torch.rand(2, 4, 4)
    shown, share = colours(maps)
    red = torch.corrcoef(torch.stack([shown[:, 0].flatten(), maps[:, 4].flatten()]))[0, 1]
    assert red > 0.99 and share > 0.999  # and of the right sign


def test_constant_maps_are_one_colour():
    shown, share = colours(torch.ones(2, 5, 3, 3))
    assert share == 1 and torch.isfinite(shown).all() and (shown == shown[:1, :, :1, :1]).all()


def test_thinning_keeps_both_ends():
    assert thin_out(range(50), 10)[0] == 0 and thin_out(range(50), 10)[-1] == 49
    assert thin_out(range(3), 10) == [0, 1, 2]


# Spectra


@pytest.mark.parametrize("cycles", [1, 3, 8])
def test_spectrum_of_a_wave_is_at_its_frequency(cycles):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 3, 16, 16)
    frequencies, amplitudes = spectrum(wave)
    assert int(amplitudes.argmax()) == cycles - 1 and float(frequencies[cycles - 1]) == pytest.approx(cycles / 16)
    assert float(amplitudes.sum() - amplitudes.max()) < 1e-6


def test_spectrum_of_a_wave_has_its_amplitude():
    """The ring at 1/16 has the four coefficients (+-1, 0), (0, +-1) and the corners at distance sqrt 2."""
    wave = 0.8 * torch.cos(2 * math.pi * torch.arange(16) / 16).expand(1, 3, 16, 16)
    assert float(spectrum(wave)[1][0]) == pytest.approx(2 * 0.4 / 8)


def test_low_frequencies_keep_slow_waves_and_lose_fast_ones():
    slow, fast = (torch.cos(2 * math.pi * cycles * torch.arange(16) / 16).expand(1, 3, 16, 16) for cycles in (1, 4))
    torch.testing.assert_close(low_pass(1 + slow + fast, 0.125), 1 + slow, rtol=0, atol=1e-5)


# Timelines


def test_timeline_of_a_plan():
    plan = Plan(5, (0, 3))
    assert together(plan) == [(0, 3), (3, 5)]
    assert shares(plan) == [(1, 1), (0, 1), (0, 1), (1, 1), (0, 1)]
    assert together(load_plan("deepcache:2", 3)) == [(0, 1), (1, 2), (2, 3)]


# Drawing


def test_notes_are_moved_up_until_none_lies_on_another():
    axes = (figure := Figure(figsize=(4, 4))).subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    notes = [
        axes.annotate(text, place, xytext=(5, 0), textcoords="offset points")
        for text, place in (("one", (0.5, 0.5)), ("two", (0.51, 0.5)), ("three", (0.49, 0.53)), ("far", (0.1, 0.5)))
    ]
    keep_apart(notes)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in notes]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert notes[0].xyann == notes[3].xyann == (5, 0) and notes[2].xyann[1] > notes[1].xyann[1] > 0
    assert max(box.y1 for box in boxes) - boxes[0].y0 < 3.5 * boxes[0].height  # no farther than needed


def test_dollar_signs_in_texts_are_no_maths_but_powers_at_an_axis_are(tmp_path):
    text = r"cash $^$ money, $\nope{$"
    left, right = (figure := new_figure(8, 5)).subfigures(1, 2)
    image_grid(left, [[torch.zeros(3, 8, 8)]], [text], [text])
    left.suptitle(text)
    (axes := right.subplots()).plot([1, 2], [1, 100], label=text)
    axes.annotate(text, (1, 1), xytext=(5, 0), textcoords="offset points")
    axes.text(1, 2, text)
    axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels())
    Drawing(figure, text, {}).save(tmp_path / "out", text, {})
    shown = [artist for artist in figure.findobj(Text) if "nope" in artist.get_text().replace("\n", "")]
    assert len(shown) == 7 and not any(artist.get_parse_math() for artist in shown)
    powers = [label for label in axes.get_yticklabels() if label.get_text()]
    assert powers and all("10^" in label.get_text() and label.get_parse_math() for label in powers)


def points_of(specs, error: float) -> dict[str, dict[str, float]]:
    return {
        spec: {"keys": 5 + i, "mean": error / (i + 1), "standard_error": error / 10} for i, spec in enumerate(specs)
    }


def test_placement_draws_each_series_at_its_numbers_and_names_table_5():
    found = {label: points_of(specs, 0.1 * (k + 1)) for k, (label, (specs, *_)) in enumerate(SERIES.items())}
    found["calibrated (auto), held"] = {}
    axes = Figure().subplots()
    chart(axes, found)
    drawn = {curve.get_label(): [*zip(*curve.lines[0].get_data(), strict=True)] for curve in axes.containers}
    assert drawn == {
        label: [(point["keys"], point["mean"]) for point in points.values()]
        for label, points in found.items()
        if points
    }
    assert {note.get_text(): note.xy for note in axes.texts} == {
        f"{name[0]} {name.split()[1]}": (found["table 5, held"][spec]["keys"], found["table 5, held"][spec]["mean"])
        for spec, name in STRATEGIES.items()
    }
    axes.set_xlim(3, 7)
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_standard_error_by_hand():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert standard_error(np.array([1.0])) == 0


# The commands

SMALLEST = {
    "samplers": ["--samplers", "dpm-solver++:3"],
    "times": ["--samplers", "ddim:3", "--repeats", "2"],
    "fewer-steps": ["--step-counts", "2"],
    "timeline": ["--plans", "uniform:2"],
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


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two images of a tiny model."""
    files = write_model(tmp_path_factory.mktemp("model"))
    return Experiment(read_setup(*files, torch.device("cpu")), WORDS, 2, 42, None)


def test_evolution_draws_the_numbers_that_it_writes(experiment):
    made = evolution_figure.make(experiment, steps=3)
    for row, key in enumerate(("norm", "mean", "relative")):
        lines = [line for axes in made.figure.axes[2 * row : 2 * row + 2] for line in axes.lines]
        assert {line.get_label() for line in lines} == {*made.values}
        for line in lines:
            np.testing.assert_allclose(line.get_ydata(), made.values[line.get_label()][key])
            assert [*line.get_xdata()] == [*range(key != "norm", len(made.values["B"]["norm"]))]


def test_norms_draw_the_numbers_that_they_write(experiment):
    made = norms.make(experiment, steps=3)
    _, deviation, relative = made.figure.axes
    assert deviation.get_yscale() == "log"
    assert [line.get_ydata()[0] for line in deviation.lines] == [v["deviation"] for v in made.values.values()]
    assert [bar.get_height() for bar in relative.patches] == [v["percent"] for v in made.values.values()]


def test_series_of_placement_differ_in_what_is_propagated(experiment):
    made = placement.make(experiment, steps=10)
    held, quadratic = (made.values[f"every n-th step, {how}"] for how in ("held", "quadratic"))
    assert held["uniform:4"]["keys"] == quadratic["uniform:4"]["keys"] == 3
    assert held["uniform:4"]["mean"] == np.mean(held["uniform:4"]["mse"]) != quadratic["uniform:4"]["mean"] > 0
    assert not made.values["calibrated (auto), held"] and "no calibration for auto:5" in made.caption


def test_methods_take_turns_after_one_untimed_run_of_each():
    calls = []

    def method(name: str, items: list) -> tuple[list, dict[str, float]]:
        calls.append(name)
        return [], {"seconds": len(calls)}

    seconds = measure({name: partial(method, name) for name in "ab"}, [], 2)
    assert calls == [*"ab" * 3] and seconds == {"a": [3, 5], "b": [4, 6]}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pareto"])  # has tests/evaluation/test_pareto.py
def test_every_kind_draws_any_model(kind, tiny, tmp_path):
    assert main([*smallest(kind), *tiny, "--out", str(tmp_path)]) == 0
    assert Image.open(tmp_path / f"{kind}.png").width > 300
    assert "<svg" in (tmp_path / f"{kind}.svg").read_text(encoding="utf-8")
    record = json.loads((tmp_path / f"{kind}.json").read_text(encoding="utf-8"))
    assert record["weights"] in record["caption"] and record["values"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{kind}.json", f"{kind}.png", f"{kind}.svg"]


def test_the_model_that_ships_needs_no_flag_and_gives_the_same_figure_twice(tmp_path):
    for name in "ab":
        assert main(["evolution", "--steps", "2", "--count", "1", "--out", str(tmp_path / name)]) == 0
    for suffix in ("svg", "png", "json"):
        one, two = ((tmp_path / name / f"evolution.{suffix}").read_bytes() for name in "ab")
        assert one == two
    values = json.loads((tmp_path / "a" / "evolution.json").read_text(encoding="utf-8"))["values"]
    assert [*values] == ["E8", "E4", "E2", "B", "D2", "D4", "D8"]


def test_all_draws_what_is_not_left_out(tiny, tmp_path):
    left_out = [kind for kind in KINDS if kind not in ("norms", "timeline")]
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
