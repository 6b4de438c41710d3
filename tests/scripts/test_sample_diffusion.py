"""scripts/sample_diffusion.py end to end, on published unconditional architectures at a tiny width."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.paths import EMOJI64
from tests.helpers.scripts import Script, check_batches, check_resume
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_model(tmp_path_factory.mktemp("celeba"), "models/ldm/celeba256/config.yaml")


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script("sample_diffusion", tmp_path, *files, "-c", "5")


def test_the_last_smaller_batch_is_kept(script, capsys):
    entries = script("-n", "7", "--batch_size", "3")
    assert [(e["sample"], e["batch"]) for e in entries] == list(zip(range(7), [3] * 6 + [1], strict=True))
    shown = [script.pixels(e) for e in entries]
    assert all(image.shape == (32, 32, 3) for image in shown)
    assert all((a != b).any() for a, b in zip(shown, shown[1:], strict=False))
    check_resume(script, capsys, "-n", "5", "--seed", "8")


def test_defaults_are_the_published_ones(script):
    (entry,) = script("-n", "1")
    assert entry.items() >= {"sampler": "ddim", "steps": 5, "eta": 1.0, "scale": 1.0, "seed": [42, 0, 0]}.items()
    assert "prompt" not in entry
    args = script.main.args[0].parse_args([])
    assert (args.n_samples, args.batch_size, args.default_eta) == (50000, 10, 1.0)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["-e", "0"], {"eta": 0.0}),
        (["--plms"], {"sampler": "plms", "eta": 0.0}),
        (["--sampler", "unipc"], {"sampler": "unipc", "eta": 0.0}),
        (["--plan", "off"], {"keys": None}),
        (["--plan", "0,2"], {"keys": [0, 2]}),
    ],
    ids=" ".join,
)
def test_flags(script, flags, expected):
    (plain,), (entry,) = script("-n", "1", "--plan", "0"), script("-n", "1", *flags)
    assert entry.items() >= expected.items()
    assert (script.pixels(plain) != script.pixels(entry)).any()


def test_without_a_number_there_are_50_steps(script):
    script.common.remove("-c"), script.common.remove("5")
    (entry,) = script("-n", "1", "--plan", "0")
    assert entry["steps"] == 50


def test_vanilla_sampling_takes_all_timesteps_of_the_training(tmp_path):
    model = tiny_model(tmp_path / "model", "models/ldm/ffhq256/config.yaml", timesteps=12)
    script = Script("sample_diffusion", tmp_path, *model)
    (entry,) = script("-v", "-n", "1", "--plan", "0-11")
    assert entry.items() >= {"sampler": "ddpm", "steps": 12, "keys": None}.items()


@pytest.mark.parametrize("batch", ["1", "4"])
def test_a_image_does_not_depend_on_its_batch(script, batch, capsys):
    check_batches(script, ("-n", "4", "--batch_size", "2"), ("-n", "4", "--batch_size", batch))


def test_npz_holds_all_images_found_or_made(script):
    script("-n", "2")
    entries = (script("-n", "3", "--npz"), script.entries())[1]
    (path,) = script.out.glob("*.npz")
    assert re.fullmatch(r"3x32x32x3-42-[0-9a-f]{8}\.npz", path.name)
    array = np.load(path)["arr_0"]
    assert array.dtype == np.uint8
    assert (array == np.stack([script.pixels(e) for e in entries])).all()


def test_compare(script, capsys):
    entries = script("-n", "2", "--compare", "--plan", "0,3", "--npz")
    assert [e["keys"] for e in entries] == [None, None, [0, 3], [0, 3]]
    out = capsys.readouterr().out
    assert re.search(r"^plain / 0,3( +[\d.]+){4}$", out, re.M) and len(list(script.out.glob("compare-*.png"))) == 1
    assert len(list(script.out.glob("*.npz"))) == 2 and list(script.out.glob("grid-*")) == []


def test_a_model_whose_scale_was_measured_and_that_is_deep(tmp_path):
    model = tiny_model(tmp_path / "model", "models/ldm/lsun_churches256/config.yaml", latent=16)
    (entry,) = Script("sample_diffusion", tmp_path, *model)("-n", "1", "-c", "4")
    assert (entry["height"], entry["width"]) == (128, 128)


def test_resume_names_a_folder_or_the_weights_in_it(files, tmp_path, capsys):
    config, ckpt = Path(files[1]), Path(files[3])
    script = Script("sample_diffusion", tmp_path, "-c", "5", "-n", "1")
    by_folder = script("-r", str(ckpt.parent))
    assert len(by_folder) == 1 and script("--resume", str(ckpt)) == []
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "model.ckpt").write_bytes(ckpt.read_bytes())
    assert re.match("--resume: .*alone has no config.yaml", script.refusal(capsys, "-r", str(tmp_path / "alone")))
    (tmp_path / "alone" / "config.yaml").write_bytes(config.read_bytes())
    (tmp_path / "empty").mkdir()
    line = script.refusal(capsys, "-r", str(tmp_path / "empty"))
    assert re.match("--resume: .*empty has no model.safetensors or model.ckpt", line)
    assert script.refusal(capsys, "-r", "nowhere") == "--resume: nowhere: no such file or folder"
    assert script.refusal(capsys, "-r", str(ckpt), *files).startswith("--resume: not allowed with --config")


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["-n", "0"], "-n/--n_samples: .* in 1..1000000"),
        (["--batch_size", "0"], "--batch_size: expected"),
        (["-e", "2"], "-e/--eta: expected a number in 0..1"),
        (["-c", "1001"], "--steps: .*1..1000.*1001"),
        (["-v", "-c", "50"], "--steps: -v runs all 1000 timesteps of the training; got 50"),
        (["-v", "--spacing", "quad"], "--vanilla_sample: takes all timesteps; not allowed with --spacing"),
        (["-v", "--timesteps-at", "9,5"], "--vanilla_sample: takes all timesteps; not allowed with --spacing"),
        (["-v", "--plms"], "--plms: not allowed with argument -v/--vanilla_sample"),
        (["--plms", "-e", "1"], "--eta: plms has no choice of it"),
        (["--H", "33"], "--H: must be a multiple of 32"),
        (["--scale", "3"], "unrecognized arguments: --scale 3"),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not an unconditional model: its conditioning_key is 'crossattn', expected None",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert re.match(why, script.refusal(capsys, *arguments))


def test_a_model_is_needed(tmp_path, capsys):
    line = Script("sample_diffusion", tmp_path).refusal(capsys)
    assert line == "--config: needed, together with ckpt: the files of the model"
