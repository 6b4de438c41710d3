"""scripts/if2img.py: three tiny stages end to end, one at a time, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoint import save_weights
from ldm.checkpoint.deepfloyd import find_stage, load_stage, network_params
from ldm.cli.deepfloyd import END, digest_of_files, published_timesteps
from ldm.profiling.timing import peak_memory
from ldm.sampling.generate import read_manifest
from tests.helpers.deepfloyd import FIRST, recipe_state, tiny_stages
from tests.helpers.goldens import load_case
from tests.helpers.scripts import load_script

FAST = ["--steps", "3", "3", "2", "--plans", "0,2", "0,2", "0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return tiny_stages(tmp_path_factory.mktemp("if"))


class Cascade:
    def __init__(self, files: dict[str, str], out: Path) -> None:
        self.main, self.files, self.out = load_script("if2img").main, files, out

    def __call__(self, *arguments: str) -> int:
        given = [word for name, path in self.files.items() for word in (f"--{name}", path)]
        return self.main([*given, "--outdir", str(self.out), "--prompt", "a red heart", *FAST, *arguments])

    def entries(self, stage: int) -> list[dict]:
        return read_manifest(self.out / f"stage{stage}" / "manifest.jsonl")

    def pixels(self, stage: int, place: int = -1) -> np.ndarray:
        file = self.entries(stage)[place]["file"]
        return np.asarray(Image.open(self.out / f"stage{stage}" / file)).astype(int)


@pytest.fixture
def cascade(files, tmp_path) -> Cascade:
    return Cascade(files, tmp_path / "out")


@pytest.mark.parametrize("layout, copies", [("stage1", 1), ("stage2", 0)])
def test_a_stage_is_in_memory_once_while_it_is_loaded(files, layout, copies):
    """Beside the mapping of the file, safetensors are copied once; a PyTorch file is used in place."""
    stage, cpu = find_stage(Path(files[layout])), torch.device("cpu")
    weights = sum(parameter.nbytes for parameter in load_stage(stage, cpu).parameters())
    beside = peak_memory(lambda: load_stage(stage, cpu)) - stage.weights.stat().st_size
    assert beside <= (copies + 0.1) * weights


def test_three_stages_end_to_end(cascade, capsys):
    assert cascade("--n_samples", "2") == 0
    assert [cascade.pixels(stage).shape for stage in (1, 2, 3)] == [(8, 8, 3), (16, 16, 3), (64, 64, 3)]
    small, large, largest = (cascade.entries(stage) for stage in (1, 2, 3))
    assert len(small) == len(large) == len(largest) == 2
    expected = {"prompt": "a red heart", "sampler": "ddpm-learned", "timesteps_at": [666, 333, 0], "keys": [0, 2]}
    assert small[0].items() >= (expected | {"scale": 7.0, "noise_weight": 0.0}).items()
    assert large[0].items() >= (expected | {"scale": 4.0, "noise_level": 250}).items()
    assert large[0]["image"] == Path(small[0]["file"]).name and largest[0]["image"] == Path(large[0]["file"]).name
    assert largest[0].items() >= {"sampler": "ddim", "timesteps_at": [501, 1], "scale": 9.0, "noise_level": 20}.items()

    # What is there is found; a image that is lost in between is made again, the same, and what was made of it stays.
    before = cascade.pixels(2)
    capsys.readouterr()
    (cascade.out / "stage2" / large[-1]["file"]).unlink()
    assert cascade("--n_samples", "2", "--stages", "2,3") == 0
    printed = capsys.readouterr().out
    assert printed.count("(1 made, 1 found)") == printed.count("(0 made, 2 found)") == 1
    assert np.abs(cascade.pixels(2) - before).max() <= 1


def test_one_stage_at_a_time(cascade, tmp_path, capsys):
    """Stage 1 alone, then stage 2 of its images, make what both make together; T5 is asked once."""
    assert cascade("--stages", "1") == 0
    texts = list((cascade.out / "texts").iterdir())
    assert len(texts) == 1
    with (cascade.out / "stage1" / "manifest.jsonl").open("a") as manifest:
        manifest.write('{"file": "samples", "prompt": "a red heart"}\n')  # not one of ours
    assert cascade("--stages", "2") == 0
    assert list((cascade.out / "texts").iterdir()) == texts
    together = Cascade(cascade.files, tmp_path / "together")
    assert together("--stages", "1", "--seed", "7") == 0  # which changes nothing of what is made next
    assert together("--stages", "1,2") == 0
    assert np.abs(together.pixels(2) - cascade.pixels(2)).max() <= 1
    assert len(together.entries(1)) == 2 and len(together.entries(2)) == 1
    assert not (together.out / "stage3").exists()


def test_text_plan_and_noise_decide_what_is_made(cascade):
    assert cascade("--stages", "1") == 0 and cascade("--stages", "2") == 0
    assert cascade("--stages", "2", "--noise_levels", "900", "20") == 0
    assert (cascade.pixels(2, 0) != cascade.pixels(2, 1)).any()
    more = ["--prompt", "a green tree", "--plans", "off", "off", "off"], ["--negative_prompt", "a tree"]
    shown = [cascade.pixels(1)]
    for flags in more:
        assert cascade("--stages", "1", *flags) == 0
        shown.append(cascade.pixels(1))
    assert all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])


def test_plans_are_listed_with_their_cost_for_each_stage(cascade, capsys):
    """What the list says of the plans of a run is what its images have cost; nothing is made for it, and no T5 read."""
    assert cascade("--list-plans", "--t5", "none") == 0
    lines, listed, stage = capsys.readouterr().out.splitlines(), {}, 0
    for line in lines:
        if found := re.match(r"stage (\d), images of (\d+) x (\d+) pixels", line):
            stage, sides = int(found[1]), {int(found[2]), int(found[3])}
            assert sides == {{1: 8, 2: 16, 3: 64}[stage]}
        elif found := re.match(r"(\S+) +([\d.]+)% ", line):
            listed[stage, found[1]] = float(found[2])
    assert not cascade.out.exists()
    macs = {}
    for name, plans in (("off", ["off"] * 3), ("if-stageN", ["if-stage1", "if-stage2", "if-stage3"])):
        assert cascade("--plans", *plans) == 0
        macs |= {(stage, name): cascade.entries(stage)[-1]["unet_macs"] for stage in (1, 2, 3)}
    for stage in (1, 2, 3):
        share = 100 * macs[stage, "if-stageN"] / macs[stage, "off"]
        assert listed[stage, "off"] == 100 and abs(listed[stage, f"if-stage{stage}"] - share) <= 0.05


def test_text_encoders_of_one_size_are_told_apart(tmp_path):
    file, digests = tmp_path / "model.safetensors", set()
    for content in (b"ab" + bytes(3 * END), b"ba" + bytes(3 * END), bytes(3 * END) + b"ab"):
        file.write_bytes(content)
        digests.add(digest_of_files([file]))
    assert len(digests) == 3


def test_published_timesteps_of_the_faster_rows():
    case, _ = load_case("if_stage1_dpmpp25_plain")
    assert list(published_timesteps("dpm-solver++-published", 25, 1)) == case["timesteps"]


@pytest.mark.parametrize(
    "arguments, why",
    [
        (
            ["--stages", "2"],
            "--stages: {out}/stage1 has no image of 'a red heart', with which stage 2 begins; run stage 1",
        ),
        (["--stages", "1,3"], "--stages: expected one of 1 2 3 1,2 2,3 1,2,3; got '1,3'"),
        (
            ["--stage1", "{out}/none"],
            "--stage1: {out}/none: no such folder; expected a stage of DeepFloyd-IF, see docs/deepfloyd-if.md",
        ),
        (
            ["--stage1", "{parent}"],
            "--stage1: {parent}: no unet/config.json and no config.yml; expected a stage of DeepFloyd-IF",
        ),
        (["--stage1", "{stage2}"], "--stage1: {stage2}: that is a stage 2 of DeepFloyd-IF; expected a stage 1"),
        (
            ["--t5", "{stage2}"],
            "--t5: {stage2}: no text_encoder/config.json of T5; expected a folder with text_encoder/",
        ),
        (["--steps", "3", "2000", "2"], "--steps: stage 2: steps must be 1..1000"),
        (["--plans", "0,9", "off", "off"], "--plans: stage 1: "),
        (["--plans", "off", "tgate:2", "off"], "--plans: stage 2: tgate needs cross-attention as in Stable Diffusion"),
        (["--plans", "off", "off", "deepcache:2:9"], "--plans: stage 3: 9 blocks are to run anew; this network has 8"),
        (["--plans", "skip:auto:2", "off", "off"], "--plans: stage 1: auto plans need a calibration, which no stage"),
        (["--noise_levels", "1000", "20"], "--noise_levels: stage 2: expected 0..999; got 1000"),
        (["--noise_levels", "250", "5000"], "--noise_levels: stage 3: expected 0..349; got 5000"),
        (["--stage3", "{out}/none.ckpt"], "--stage3: stage 3: {out}/none.ckpt: no such file"),
    ],
)
def test_bad_input(cascade, files, capsys, arguments, why):
    places = files | {"out": str(cascade.out), "parent": str(cascade.out.parent)}
    assert cascade(*(word.format(**places) for word in arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("if2img.py: error: " + why.format(**places)), line
    assert not (cascade.out / "stage1").exists()  # it is found out before anything is made


@pytest.mark.parametrize(
    "stage, flag, file",
    [
        ("stage1", "--t5", "text_encoder/model.safetensors"),
        ("stage1", "--stage1", "unet/diffusion_pytorch_model.safetensors"),
        ("stage2", "--stage2", "pytorch_model.bin"),
    ],
)
def test_half_a_download_is_found_out_before_anything_is_made(files, tmp_path, capsys, stage, flag, file):
    folder = tmp_path / "part"
    shutil.copytree(files[stage], folder)
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    cascade = Cascade(files, tmp_path / "out")
    assert cascade(flag, str(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"if2img.py: error: {flag}: {folder / file}: truncated"), line
    assert not (cascade.out / "stage1").exists()


def test_weights_that_do_not_fit_into_the_memory(files, tmp_path, capsys, monkeypatch):
    """A first stage whose weights are copied, and T5."""
    monkeypatch.setattr("ldm.cli.deepfloyd.free_bytes", lambda device: 100_000)
    cascade = Cascade(files, tmp_path / "out")
    assert cascade("--stages", "1") == 2
    assert "--stage1: stage 1: " in (line := capsys.readouterr().err) and "0.0 GB are free" in line
    monkeypatch.setattr("ldm.cli.deepfloyd.free_bytes", lambda device: 10_000)
    assert cascade("--stages", "1", "--prompt", "a green tree") == 2
    assert f"--t5: stage 1: {files['stage1']}: its weights take 0.0 GB" in capsys.readouterr().err


def test_a_stage_that_is_not_given(files, tmp_path, capsys):
    without = Cascade({name: path for name, path in files.items() if name != "stage2"}, tmp_path / "out")
    assert without() == 2
    assert "--stage2: needed for stage 2: its folder; or leave it out of --stages" in capsys.readouterr().err


def test_t5_of_another_width_and_weights_of_another_network(files, tmp_path, capsys):
    wide = tmp_path / "wide"
    shutil.copytree(files["stage1"], wide)
    config = FIRST | {"encoder_hid_dim": 64}
    (wide / "unet" / "config.json").write_text(json.dumps(config))
    cascade = Cascade(files | {"stage1": str(wide)}, tmp_path / "out")
    assert cascade("--stages", "1") == 2
    assert "--stage1: stage 1: " in (line := capsys.readouterr().err) and "v_proj.bias (32,), config (64,)" in line
    state = recipe_state(network_params(config), seed=1, gain=0.6)
    save_weights(wide / "unet" / "diffusion_pytorch_model.safetensors", state)
    assert cascade("--stages", "1") == 2
    assert "it reads states of width 64, T5's have 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, why",
    [
        ({"block_out_channels": [0]}, "not the config.json of a stage of DeepFloyd-IF: ZeroDivisionError"),
        ({"block_out_channels": []}, "not the config.json of a stage of DeepFloyd-IF: IndexError"),
        ({"out_channels": None}, "out_channels must be whole numbers of at least 1; got None"),
        ({"attention_head_dim": "x"}, "num_head_channels must be whole numbers of at least 1; got 'x'"),
    ],
)
def test_a_stage_with_a_wrong_description(change, why, files, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FIRST | change))
    assert Cascade(files | {"stage1": str(tmp_path)}, tmp_path / "out")("--stages", "1") == 2
    assert f"--stage1: {why}" in capsys.readouterr().err
