from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.checkpoint import load_config, load_model
from ldm.cli.setup import best_plan, with_batches
from ldm.io.images import from_pil, psnr, read_png
from ldm.models.diffusion.ddpm import DiffusionWrapper
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.sampling import engine
from ldm.sampling.engine import Engine, Recipe, Sizes, Task, num_nodes
from ldm.sampling.generate import inputs_seed, prompt_items, read_manifest
from ldm.sampling.task import Text
from tests.files_entered import MOST, files_entered
from tests.helpers.paths import ROOT, SCRIPTS
from tests.helpers.processes import quick_help
from tests.helpers.scripts import load_script
from tests.helpers.tiny_models import write_model

main = load_script("txt2img").main


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def call(files, tmp_path):
    """Run the command line in this process on the tiny model, six steps, output in tmp_path / out."""

    def run(*arguments: str) -> int:
        return main(
            [
                "--config",
                str(files[0]),
                "--ckpt",
                str(files[1]),
                "--outdir",
                str(tmp_path / "out"),
                "--steps",
                "5",
                *arguments,
            ]
        )

    return run


def sample_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted((folder / "out" / "samples").glob("*.png"))}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# What a run leaves behind


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompt", "a dog face " * 9], "1 of 1 prompts longer than the text encoder reads"),
        (["--prompt", "a dog face", "--negative_prompt", "an owl " * 9], "1 of 2 prompts longer"),
        (["--prompt", "a dog face"], ""),
    ],
)
def test_prompts_that_are_cut_are_counted(call, capsys, arguments, said):
    assert call("--n_samples", "1", "--steps", "1", *arguments) == 0
    output = capsys.readouterr().out
    assert (said in output) if said else ("longer" not in output)


def test_a_run_enters_few_files(call):
    code, entered = files_entered(lambda: call("--prompt", "a dog face", "--n_samples", "1", "--steps", "2"))
    assert code == 0 and "ldm/models/diffusion/loop.py" in entered
    assert len(entered) <= MOST["txt2img"], entered


def test_images_grid_manifest_and_the_closing_lines(call, tmp_path, capsys):
    assert call("--prompt", "a dog face", "--n_samples", "2", "--n_iter", "2", "--n_rows", "3") == 0
    files = sample_files(tmp_path)
    assert [name[:-13] for name in files] == [f"a-dog-face-42-00000-00{k}" for k in range(4)]
    assert all(Image.open(path).size == (16, 16) for path in files.values())
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [e["file"] for e in entries] == [f"samples/{name}" for name in files]
    seed = [42, *inputs_seed({"prompt": "a dog face"}), 0, 3]
    assert (
        entries[3]
        | {
            "prompt": "a dog face",
            "sample": 3,
            "seed": seed,
            "steps": 5,
            "scale": 3.0,
            "keys": [0, 1, 2, 3],
            "noise_weight": 0.003,
            "precision": "full",
        }
        == entries[3]
    )
    settings = read_png(tmp_path / "out" / entries[0]["file"])[1]
    assert settings.items() <= entries[0].items() and len(settings["weights"]) == 16
    (grid,) = (tmp_path / "out").glob("grid-*.png")
    assert Image.open(grid).size[0] == 2 + 3 * 130  # enlarged 8 times, with captions
    out = capsys.readouterr().out
    assert re.match(
        r"plan faster-diffusion \(4 key timesteps of 5\), sampler ddim, scale 3, parallel \d+, device cpu "
        r"\(\d+ threads?\), model model\d*/model.safetensors\n",
        out,
    )
    assert re.search(r"each image: [\d.]+ s, [\d.]+ s of it UNet, [\d.]+ GMAC", out)
    last = out.splitlines()[-1]
    assert re.fullmatch(r"4 images \(4 made, 0 found\) in .*out/samples; spent [\d.]+ s, [\d.]+ GMAC", last)


@pytest.mark.parametrize("flags", ["", "--guidance-interval 0,500", "--timesteps-at 900,700,400,100,7"])
def test_a_second_run_makes_nothing_and_touches_nothing(call, tmp_path, capsys, flags):
    call("--n_samples", "2", *flags.split())
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert call("--n_samples", "2", *flags.split()) == 0
    assert snapshot(tmp_path) == before
    assert "(0 made, 2 found)" in capsys.readouterr().out


def test_a_killed_run_resumes(call, tmp_path, monkeypatch, capsys):
    call("--n_iter", "3", "--n_samples", "1", "--skip_grid")
    whole = {name: pixels(path) for name, path in sample_files(tmp_path).items()}
    for path in sample_files(tmp_path).values():
        path.unlink()
    (tmp_path / "out" / "manifest.jsonl").unlink()
    real, made = Engine.__call__, []

    def killed(self, items, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(items)
        return real(self, items, *rest)

    monkeypatch.setattr(Engine, "__call__", killed)
    assert call("--n_iter", "3", "--n_samples", "1", "--skip_grid") == 130
    assert len(sample_files(tmp_path)) == 2
    monkeypatch.undo()
    capsys.readouterr()
    assert call("--n_iter", "3", "--n_samples", "1", "--skip_grid") == 0
    assert "(1 made, 2 found)" in capsys.readouterr().out
    again = {name: pixels(path) for name, path in sample_files(tmp_path).items()}
    assert again.keys() == whole.keys() and all((again[name] == whole[name]).all() for name in whole)
    assert len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == 3


def test_the_order_of_the_prompts_changes_no_image(call, tmp_path):
    def made(*lines: str) -> dict[str, list[int]]:
        (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
        call("--from-file", str(tmp_path / "prompts.txt"), "--n_samples", "1", "--skip_grid", "--plan", "off")
        entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
        (tmp_path / "out" / "manifest.jsonl").unlink()
        return {entry["prompt"]: pixels(tmp_path / "out" / entry["file"]) for entry in entries}

    one, other = made("a green tree", "a dog face"), made("an owl", "a dog face", "a green tree")
    assert all((other[prompt] == one[prompt]).all() for prompt in one)


# A image depends on its seed, its prompt and its settings alone


@pytest.fixture(scope="module")
def text_to_image(files):
    """Makers on one loaded model."""
    model, sizes = load_model(*files), Sizes.of(load_config(files[0]).model)

    def build(plan: str = "faster-diffusion", parallel: int = 1, **options) -> Engine:
        options = {"height": sizes.default, "width": sizes.default, "steps": 5, "scale": 3.0} | options
        recipe = Recipe(**{"noise_weight": 0.003} | options)
        return Engine(model, sizes, recipe, load_plan(plan, num_nodes(recipe), parallel), Task(Text()))

    return build


ITEMS = prompt_items(["a red heart, noto style", "a green tree", "a dog face"], samples=2, seed=5)


def sampled(maker: Engine, batch: list[int]) -> torch.Tensor:
    """The images of some of ITEMS, made as one batch, before they are rounded to 8 bits."""
    return maker.decode(maker.latents([ITEMS[k] for k in batch]))


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"scale": 1.0}, {"parallel": 3}], ids=str)
def test_a_image_does_not_depend_on_its_batch_or_place(text_to_image, options):
    maker = text_to_image(**options)
    together = sampled(maker, [0, 1, 2, 3, 4, 5])
    assert (together[0] - together[1]).abs().max() > 0.01
    for batch in ([0], [5, 0], [4, 3, 2]):
        torch.testing.assert_close(sampled(maker, batch), together[batch], rtol=0, atol=1e-4)


def test_parallel_decoding_changes_no_image(text_to_image):
    one = sampled(text_to_image(), [0, 1])
    for parallel in (2, 5):
        torch.testing.assert_close(sampled(text_to_image(parallel=parallel), [0, 1]), one, rtol=0, atol=1e-4)


def test_every_step_a_key_step_is_the_plain_run(text_to_image):
    plain = sampled(text_to_image("off"), [0, 1])
    torch.testing.assert_close(sampled(text_to_image("0-4"), [0, 1]), plain, rtol=0, atol=1e-6)
    assert (sampled(text_to_image("0"), [0, 1]) - plain).abs().max() > 1e-3


def test_files_of_a_batch_equal_files_made_one_by_one(call, tmp_path):
    call("--n_samples", "3", "--skip_grid")
    together = {name: pixels(path) for name, path in sample_files(tmp_path).items()}
    for path in sample_files(tmp_path).values():
        path.unlink()
    call("--n_samples", "1", "--n_iter", "3", "--skip_grid")
    one_by_one = {name: pixels(path) for name, path in sample_files(tmp_path).items()}
    assert together.keys() == one_by_one.keys()
    assert all(np.abs(together[name] - one_by_one[name]).max() <= 1 for name in together)


@pytest.fixture(scope="module")
def first(files, tmp_path_factory):
    """One image, the path to it, and a way to run the command line again into the same folder."""
    folder = tmp_path_factory.mktemp("first")

    def again(*arguments: str) -> int:
        return main(
            [
                "--config",
                str(files[0]),
                "--ckpt",
                str(files[1]),
                "--outdir",
                str(folder / "out"),
                "--steps",
                "5",
                "--n_samples",
                "1",
                "--noise-weight",
                "0.05",
                "--skip_grid",
                *arguments,
            ]
        )

    assert again() == 0
    (path,) = sample_files(folder).values()
    return folder, path, again


@pytest.mark.parametrize(
    "change",
    [
        ["--seed", "43"],
        ["--scale", "5"],
        ["--steps", "6"],
        ["--plan", "0,2"],
        ["--plan", "encoder:faster-diffusion:1"],
        ["--prompt", "a green tree"],
        ["--noise-weight", "0.1"],
        ["--noise-order", "update"],
        ["--noise-below", "900"],
        ["--ddim_eta", "0.7"],
        ["--spacing", "quad"],
        ["--H", "32"],
        ["--W", "32"],
        ["--negative_prompt", "a dog face"],
        ["--seed-by-position"],
    ],
    ids=" ".join,
)
def test_every_flag_that_should_changes_the_image(first, change):
    folder, path, again = first
    before = sample_files(folder)
    assert again(*change) == 0
    (new,) = sample_files(folder).keys() - before.keys()
    new = pixels(path.with_name(new))
    assert new.shape != pixels(path).shape or (new != pixels(path)).any()


def test_timesteps_of_ones_own_make_the_published_image_and_are_recorded(files, first, tmp_path):
    _, path, _ = first
    model = ["--config", str(files[0]), "--ckpt", str(files[1])]
    given = ["--n_samples", "1", "--noise-weight", "0.05", "--skip_grid", "--timesteps-at", "801,601,401,201,1"]
    assert main([*model, "--outdir", str(tmp_path / "out"), *given]) == 0
    (own,) = sample_files(tmp_path).values()
    assert np.array_equal(pixels(own), pixels(path))
    settings = read_png(own)[1]
    assert settings["timesteps_at"] == [801, 601, 401, 201, 1] and settings["steps"] == 5
    assert "timesteps_at" not in read_png(path)[1]
    with Image.open(own) as image:
        assert 'Timesteps: "801,601,401,201,1"' in image.text["parameters"]


@pytest.mark.parametrize("flag, name", [("--plms", "plms"), ("--dpm", "dpm-solver++-published")])
def test_published_flags_name_their_samplers(first, flag, name, capsys):
    folder, path, again = first
    before = sample_files(folder)
    assert again(flag) == 0
    (new,) = sample_files(folder).keys() - before.keys()
    assert (pixels(path.with_name(new)) != pixels(path)).any()
    assert read_png(path.with_name(new))[1]["sampler"] == name
    capsys.readouterr()
    assert again("--sampler", name) == 0
    assert "(0 made, 1 found)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        ["--parallel", "4"],
        ["--device", "cpu"],
        ["--f", "2", "--C", "4"],
        ["--ddim_steps", "5"],
        ["--H", "16"],
        ["--num_inference_steps", "5"],
        ["--guidance_scale", "3"],
        ["--height", "16", "--width", "16"],
    ],
    ids=" ".join,
)
def test_other_flags_find_the_same_image(first, change, capsys):
    _, _, again = first
    assert again(*change) == 0
    assert "(0 made, 1 found)" in capsys.readouterr().out


def test_weights_alone_find_the_config_beside_them(files, first, capsys):
    assert (
        main(
            [
                "--ckpt",
                str(files[1]),
                "--outdir",
                str(first[0] / "out"),
                "--steps",
                "5",
                "--n_samples",
                "1",
                "--noise-weight",
                "0.05",
                "--skip_grid",
            ]
        )
        == 0
    )
    assert "(0 made, 1 found)" in capsys.readouterr().out


def test_other_programs_read_how_a_image_was_made(call, files, tmp_path):
    call("--prompt", 'an owl: "big", brown', "--negative_prompt", "a dog", "--n_samples", "1", "--skip_grid")
    (path,) = sample_files(tmp_path).values()
    prompt, negative, last = Image.open(path).text["parameters"].split("\n")
    assert (prompt, negative) == ('an owl: "big", brown', "Negative prompt: a dog")
    # The expression by which the web UI takes the last line apart.
    fields = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert (
        fields.items()
        >= {
            "Steps": "5",
            "Sampler": "DDIM",
            "CFG scale": "3.0",
            "Seed": "42",
            "Size": "16x16",
            "Model": "model",
            "Model hash": hashlib.sha256(files[1].read_bytes()).hexdigest()[:10],
            "Key steps": '"0,1,2,3"',
        }.items()
    )


def test_another_config_of_the_same_weights_makes_another_image(files, first, tmp_path):
    folder, path, again = first
    before = sample_files(folder)
    config = OmegaConf.load(files[0])
    config.model.params.scale_factor = 1.2
    OmegaConf.save(config, tmp_path / "config.yaml")
    assert again("--config", str(tmp_path / "config.yaml")) == 0
    (new,) = sample_files(folder).keys() - before.keys()
    assert (pixels(path.with_name(new)) != pixels(path)).any()


def test_autocast_makes_nearly_the_same_image(call, tmp_path):
    for precision in ("full", "autocast"):
        assert call("--n_samples", "1", "--skip_grid", "--precision", precision) == 0
    one, two = sample_files(tmp_path).values()
    assert 0 < np.abs(pixels(one) - pixels(two)).mean() < 10


# Prompts


def test_prompts_from_a_file(call, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red heart\n\n  an owl \n\n\na green tree", encoding="utf-8")
    assert (
        call(
            "--from-file",
            str(tmp_path / "prompts.txt"),
            "--repeat",
            "2",
            "--n_iter",
            "2",
            "--n_samples",
            "5",
            "--skip_grid",
        )
        == 0
    )
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [e["prompt"] for e in entries[::2]] == ["a red heart"] * 2 + ["an owl"] * 2 + ["a green tree"] * 2
    assert [(e["prompt_index"], e["sample"]) for e in entries] == [(p, s) for p in range(6) for s in range(2)]
    assert [e["batch"] for e in entries] == [5] * 10 + [2] * 2


def test_fixed_code_begins_every_iteration_from_the_same_noise(call, tmp_path):
    assert call("--fixed_code", "--n_samples", "2", "--n_iter", "2", "--skip_grid") == 0
    assert [e["start"] for e in read_manifest(tmp_path / "out" / "manifest.jsonl")] == [[42, 0], [42, 1]] * 2
    shown = [pixels(path) for path in sample_files(tmp_path).values()]
    assert np.abs(shown[0] - shown[2]).max() <= 1 and (shown[0] != shown[1]).any()


def test_skip_save_and_skip_grid(call, tmp_path, capsys):
    assert call("--n_samples", "1", "--skip_save", "--skip_grid") == 0
    assert not (tmp_path / "out").exists()
    assert "not saved" in capsys.readouterr().out
    assert call("--n_samples", "1", "--skip_save") == 0
    assert [p.name[:5] for p in (tmp_path / "out").iterdir()] == ["grid-"]


# Plain beside accelerated

COMPARE = ("--compare", "--prompt", "a dog face", "--n_samples", "2", "--plan", "0,3")


def test_compare_shows_both_with_cost_and_distance(call, tmp_path, capsys):
    assert call(*COMPARE) == 0
    out = capsys.readouterr().out
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    plain, fast = entries[:2], entries[2:]
    assert all(e["keys"] is None and e["noise_weight"] == 0 for e in plain)
    assert all(e["keys"] == [0, 3] and e["noise_weight"] == 0.003 for e in fast)
    assert [e["seed"] for e in plain] == [e["seed"] for e in fast]
    shown = [torch.stack([from_pil(Image.open(tmp_path / "out" / e["file"])) for e in part]) for part in (plain, fast)]
    assert "no third column: auto plans need a calibration of this model for ddim with 5 nodes" in out
    gmac = [e["unet_macs"] / 1e9 for e in (plain[0], fast[0])]
    assert re.search(rf"^plain( +\d+\.\d{{3}}){{3}} +{gmac[0]:.2f}$", out, re.M)
    distance = psnr(*shown)
    assert re.search(
        rf"^0,3( +\d+\.\d{{3}}){{3}} +{gmac[1]:.2f}  {distance.mean():.1f} dB, {distance.min():.1f} dB$", out, re.M
    )
    assert re.search(rf"^plain / 0,3( +\d+\.\d\d){{3}} +{gmac[0] / gmac[1]:.2f}$", out, re.M)
    (sheet,) = (tmp_path / "out").glob("compare-*.png")
    assert Image.open(sheet).size[0] == 2 + 2 * (192 + 2)


@pytest.mark.parametrize(
    "spec, sampler, said_first",
    [
        ("faster-diffusion", "ddim", "auto:9"),
        ("0,10,20,30,40", "ddim", "auto:5"),
        ("auto:9", "ddim", "the plan is auto:9 already"),
        ("deepcache:3", "ddim", "deepcache:auto:17"),
        ("skip:3", "ddim", "skip:auto:17"),
        ("deepcache:3:2", "ddim", "calibration is for plans of one level"),
        ("online:0.1", "ddim", "calibration is for plans of one level"),
        ("off", "ddim", "the plan skips no encoder"),
        ("faster-diffusion", "plms", "auto plans need a calibration of this model for plms with 50 nodes"),
    ],
)
def test_the_third_column_is_the_best_plan_of_the_same_cost(spec, sampler, said_first):
    facts = RunFacts({"sampler": sampler}, ROOT / "models/ldm/emoji64/calibration")
    plan = load_plan(spec, 50, run=facts)
    said, best = best_plan(plan, 50, facts)
    assert said.startswith(said_first) and (best is None) == ("auto:" not in said_first.partition(" ")[0])
    if best is not None:
        assert said == said_first and len(best.keys) == len(plan.keys) and best.levels == plan.levels


def test_a_second_comparison_says_what_it_did_not_measure(call, tmp_path, capsys):
    assert call(*COMPARE) == 0
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert call(*COMPARE) == 0
    assert snapshot(tmp_path) == before
    out = capsys.readouterr().out
    assert len(re.findall(r"^(?:plain|0,3) +reused, not timed +\d+\.\d\d", out, re.M)) == 2 and "--again" in out
    assert re.search(r"^plain / 0,3 +\d+\.\d\d$", out, re.M), "of the MACs alone"


def test_again_makes_the_same_images_and_measures_them(call, tmp_path, capsys):
    assert call(*COMPARE) == 0
    before, shown = snapshot(tmp_path), [pixels(path) for path in sample_files(tmp_path).values()]
    capsys.readouterr()
    assert call(*COMPARE, "--again") == 0
    out = capsys.readouterr().out
    assert "not timed" not in out and "4 images (4 made, 0 found)" in out
    files = sample_files(tmp_path)
    assert all((old == pixels(path)).all() for old, path in zip(shown, files.values(), strict=True))
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert all(before[f"out/samples/{name}"][0] < after[f"out/samples/{name}"][0] for name in files)
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert sorted(e["file"] for e in entries) == [f"samples/{name}" for name in files], "one line each"
    assert all(read_png(tmp_path / "out" / e["file"])[2].items() <= e.items() for e in entries), "of the last time"


def test_methods_take_turns_warmed_up_and_nothing_else_is_timed(call, monkeypatch):
    happened, timing = [], []
    warm_up, make, timed, unet_macs = Engine.warm_up, Engine.__call__, engine.timed, engine.unet_macs

    def note(kind, real):
        return lambda self, items, *rest: (
            happened.append((kind, self.plan.plain, len(items))),
            real(self, items, *rest),
        )[1]

    def watched(call, device):
        timing.append(True)
        result = timed(call, device)
        timing.pop()
        return result

    def count(*given):
        assert not timing, "MACs are counted while a picture is timed"
        return unet_macs(*given)

    monkeypatch.setattr(Engine, "warm_up", note("warm", warm_up))
    monkeypatch.setattr(Engine, "__call__", note("make", make))
    monkeypatch.setattr(engine, "timed", watched)
    monkeypatch.setattr(engine, "unet_macs", count)
    assert call(*COMPARE, "--from-file", "missing") == 2 and happened == []
    assert call("--compare", "--prompt", "an owl", "--n_samples", "2", "--n_iter", "2", "--plan", "0,3") == 0
    assert happened == [("warm", True, 2), ("warm", False, 2), *[("make", True, 2), ("make", False, 2)] * 2]


@pytest.mark.parametrize(
    "flags",
    [
        "--plan 0,3",
        "--plan 0,3 --parallel 1",
        "--plan deepcache:2",
        "--plan online:0.1",
        "--plan uniform:2 --guidance-reuse",
        "--plan 0,3 --guidance-interval 0,500",
    ],
)
def test_warming_up_computes_every_shape_of_a_run_twice(call, monkeypatch, flags):
    computed: list[tuple[str, int, int, bool]] = []

    def spied(name, real):
        return lambda self, x, *rest: (
            computed.append((name, len(rest[0]), len(getattr(x, "skips", ())), bool(getattr(x, "shared", ())))),
            real(self, x, *rest),
        )[1]

    for name in ("encode", "encode_outer", "advance", "decode"):
        monkeypatch.setattr(DiffusionWrapper, name, spied(name, getattr(DiffusionWrapper, name)))
    warm_up, make, warmed = Engine.warm_up, Engine.__call__, []

    def noted(self, items, first_calls):
        known, start = {*first_calls}, len(computed)
        seconds = warm_up(self, items, first_calls)
        met = computed[start:]
        assert all(met.count(shape) == 2 for shape in met)
        warmed.append((self, {*met}))
        assert seconds >= 0 and known <= {*first_calls}
        return seconds

    def made(self, items, *rest):
        start = len(computed)
        result = make(self, items, *rest)
        (shapes,) = (shapes for engine, shapes in warmed if engine is self)
        assert {*computed[start:]} == shapes
        return result

    monkeypatch.setattr(Engine, "warm_up", noted)
    monkeypatch.setattr(Engine, "__call__", made)
    assert call("--compare", "--prompt", "an owl", "--n_samples", "1", *flags.split()) == 0
    assert len(warmed) == 2


def test_what_a_first_call_costs_is_taken_from_the_first_of_the_process(text_to_image):
    engine, first_calls = text_to_image("0,3", parallel=2), {("decode", 4, 4, True): 1000.0}
    assert 1000 <= engine.warm_up(ITEMS[:1], first_calls) < 2000 and first_calls["decode", 4, 4, True] == 1000
    assert {key[0] for key in first_calls} == {"encode", "part_weights", "share", "decode", "rest"}


def test_without_a_prompt_a_comparison_shows_those_that_ship_with_the_model(files, call, tmp_path):
    prompts = files[1].with_name("prompts.txt")
    prompts.write_text("\n".join(f"picture {k}" for k in range(9)))
    try:
        assert call("--compare", "--plan", "0,3", "--n_samples", "3", "--steps", "4") == 0
        assert call("--n_samples", "1", "--steps", "4", "--skip_grid") == 0
    finally:
        prompts.unlink()
    entries = read_manifest(tmp_path / "out" / "manifest.jsonl")
    assert [e["prompt"] for e in entries if e["keys"] is None] == [f"picture {k}" for k in range(8)]
    assert [e["batch"] for e in entries[:-1]] == [3] * 12 + [2] * 4 and entries[-1]["prompt"].startswith("a red heart")


def test_a_grid_keeps_the_order_of_the_items_whatever_was_found(call, tmp_path):
    grids = []
    for _ in range(2):
        assert call("--n_samples", "1", "--n_iter", "3", "--n_rows", "3") == 0
        (grid,) = (tmp_path / "out").glob("grid-*.png")
        grids.append(pixels(grid))
        grid.unlink()
        next(iter(sample_files(tmp_path).values())).unlink()
    assert (grids[0] == grids[1]).all()


@pytest.mark.parametrize(
    "options, images, parallel",
    [({}, 1, 24), ({}, 2, 10), ({"scale": 1.0}, 1, 25), ({"height": 32}, 1, 10), ({"height": 96, "width": 128}, 1, 1)],
    ids=str,
)
def test_how_many_decoder_steps_share_a_batch(text_to_image, options, images, parallel):
    """50 steps of one group: as many as are faster, in batches of one size."""
    engine = text_to_image("0", parallel=50, steps=50, **options)
    assert with_batches(engine, None, images, torch.device("cpu")).plan.parallel == parallel


@pytest.mark.parametrize("flags, parallel", [("--n_samples 2 --steps 50", 10), ("--n_samples 1 --parallel 3", 3)])
def test_a_run_has_the_decoder_batches_that_fit_its_images_or_that_are_asked_for(call, tmp_path, flags, parallel):
    assert call("--skip_grid", "--device", "cpu", "--plan", "0", *flags.split()) == 0
    assert {e["parallel"] for e in read_manifest(tmp_path / "out" / "manifest.jsonl")} == {parallel}


def test_macs_of_a_run_are_those_of_its_plan(text_to_image):
    makers = text_to_image("off"), text_to_image("0,3"), text_to_image("off", scale=1.0)
    plain, fast, single = (maker.sampled(ITEMS[:1])[1] for maker in makers)
    assert plain.macs == plain.critical == 2 * single.macs
    assert 0 < plain.macs - fast.macs < plain.macs * 3 / 5
    unit = makers[0].unit
    assert plain.critical == 2 * unit.plain(5) and fast.critical == 2 * unit.plain(2)


# The model that ships


def test_the_shipped_model_is_the_default(tmp_path):
    if not (ROOT / "models" / "ldm" / "emoji64" / "model.safetensors").is_file():
        pytest.skip("models/ldm/emoji64 has no weights yet")
    out = tmp_path / "out"
    prompt = ["--prompt", "a red heart, noto style", "--steps", "10", "--n_samples", "1"]
    assert main([*prompt, "--outdir", str(out)]) == 0
    (entry,) = read_manifest(out / "manifest.jsonl")
    image = Image.open(out / entry["file"])
    assert image.size == (64, 64) and entry["ckpt"] == "emoji64/model.safetensors"
    red, green, blue = (pixels(out / entry["file"])[16:48, 16:48, k].mean() for k in range(3))
    assert red > green + 50 and red > blue + 50


# As a program


def test_the_command_as_a_user_runs_it(files, tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "txt2img.py"),
        "--config",
        str(files[0]),
        "--ckpt",
        str(files[1]),
        "--steps",
        "2",
        "--n_samples",
        "1",
        "--outdir",
        "out",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "1 image (1 made, 0 found) in out/samples" in done.stdout
    assert "Traceback" not in done.stderr and json.loads((tmp_path / "out" / "manifest.jsonl").read_text())


def test_help_answers_at_once():
    printed = quick_help(SCRIPTS / "txt2img.py")
    published = (
        "prompt from-file outdir steps ddim_steps ddim_eta n_iter n_samples n_rows H W C f scale "
        "seed fixed_code config ckpt precision device skip_grid skip_save repeat plms dpm".split()
    )
    new = "sampler plan parallel noise-weight noise-below noise-order compare weights again".split()
    assert all(re.search(rf"--{flag}\b", printed) for flag in published + new)
