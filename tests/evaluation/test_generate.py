"""evaluation/generate.py on a COCO-shaped folder with a tiny model: processes, kills, and bad input."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from evaluation.generate import main
from evaluation.protocols.protocol import PROTOCOL_DIR, Method, chosen_prompts, load_protocol
from evaluation.runs.control import Hints
from evaluation.runs.generate import compute, plan_of, recipe_of
from evaluation.runs.images import captioned_images
from evaluation.runs.models import ModelFiles
from ldm.checkpoint import read_checkpoint, save_weights
from ldm.data.conditions import as_hint, edges
from ldm.io.errors import SettingError
from ldm.io.files import json_sha256, read_yaml
from ldm.modules.diffusionmodules.controlnet import ControlNet
from tests.helpers.coco import LONG, captions, write_coco, write_protocol
from tests.helpers.goldens import recipe_weights
from tests.helpers.processes import Child
from tests.helpers.tiny_models import tiny_transformer, write_model
from tests.helpers.tiny_unet import TEXT_UNET

IMAGES, BATCH = 40, 8


class Runs:
    """The command line on one folder of data, protocol and model."""

    def __init__(self, folder: Path):
        config, ckpt = write_model(folder)
        self.coco, self.protocol = write_coco(folder / "coco"), write_protocol(folder / "tiny.yaml")
        self.model = ["--config", str(config), "--ckpt", str(ckpt)]

    def arguments(self, out: Path, *more: str) -> list[str]:
        return [
            "--protocol",
            str(self.protocol),
            "--data",
            str(self.coco),
            *self.model,
            "--plan",
            "0,2",
            "--out",
            str(out),
            *more,
        ]

    def __call__(self, out: Path, *more: str) -> int:
        return main(self.arguments(out, *more))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> Path:
    """What one process makes without a stop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert runs(out, "--npz") == 0
    return out


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != "journal" and path.suffix != ".npz"
    }


def images(out: Path) -> int:
    return sum(1 for _ in (out / "samples").glob("[!.]*.png"))


def refused(capfd, code: int) -> str:
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert code == 2 and output.out == "" and line.startswith("generate.py: error: ")
    return line.removeprefix("generate.py: error: ")


# What is made


def test_a_image_for_every_caption_with_a_card(runs, whole):
    card = json.loads((whole / "run.json").read_text())
    prompts = [json.loads(line) for line in (whole / "prompts.jsonl").read_text().splitlines()]
    notes = {note["id"]: note for note in captions(24)["annotations"]}
    assert len(prompts) == IMAGES == images(whole) == card["pictures"]
    assert all(p["prompt"] == " ".join(notes[p["id"]]["caption"].split()) for p in prompts)
    cut = sum("red red red" in p["prompt"] for p in prompts)
    assert card["captions_cut"] == cut and IMAGES / LONG - 8 < cut < IMAGES / LONG + 8
    assert card["protocol_sha256"] == json_sha256(card["protocol"]) and card["seeds"] == [0]
    assert card["method"].items() >= {"steps": 4, "scale": 3.0, "keys": [0, 2], "noise_weight": 0.003}.items()
    assert len(card["weights"]) == 64 and card["versions"]["torch"] and (card["plan"], card["batch"]) == ("0,2", BATCH)
    array = np.load(whole / "samples.npz")["arr_0"]
    shown = [np.asarray(Image.open(whole / f"samples/{p['id']:08d}-000.png")) for p in prompts]
    assert (array == shown).all() and len({image.tobytes() for image in shown}) == IMAGES


def test_the_folder_proves_itself(runs, whole, tmp_path, capfd):
    assert main(["--verify", "--out", str(whole)]) == 0
    assert capfd.readouterr().out.startswith(f"{IMAGES} images, each there, whole and once; tiny, protocol ")
    assert runs(tmp_path / "part", "--shard", "2/3") == 0
    capfd.readouterr()
    line = refused(capfd, main(["--verify", "--out", str(tmp_path / "part")]))
    assert re.fullmatch(r"--verify: .*/part: unfinished: no manifest.jsonl, 24 of 40 images missing", line)


@pytest.mark.parametrize("pictures", ["val2017", "pictures.npy"])
def test_each_prompt_has_the_edges_of_its_own_image(tmp_path, pictures):
    """From a folder and from an array, in any order."""
    coco = write_coco(tmp_path / "coco", 6)
    sides = {entry["id"]: 4 + 2 * k for k, entry in enumerate(captions(6)["images"])}
    drawn = {}
    for entry in captions(6)["images"]:
        drawn[entry["id"]] = Image.new("RGB", (16, 16))
        drawn[entry["id"]].paste((255, 255, 255), (1, 1, sides[entry["id"]], sides[entry["id"]]))
        drawn[entry["id"]].save((coco / "val2017" / entry["file_name"]).with_suffix(".png"))
        (coco / "val2017" / entry["file_name"]).unlink()
    notes = coco / "annotations" / "captions_val2017.json"
    notes.write_text(notes.read_text().replace(".jpg", ".png"))
    np.save(coco / "pictures.npy", np.stack([np.asarray(drawn[number]) for number in sorted(drawn)]))
    protocol = load_protocol(str(write_protocol(tmp_path / "p.yaml", data__pictures=pictures, select__count=6)))
    prompts = chosen_prompts(protocol, coco)
    hints = Hints(captioned_images(protocol, coco, [prompt.image for prompt in prompts]), "edges", None, 16)
    for place in (5, 0, 3):
        expected = as_hint(edges(drawn[prompts[place].image]))
        assert expected.any() and torch.equal(hints[[place]][0], expected)


def test_images_that_follow_edges_and_the_frames_of_videos(runs, tmp_path, capfd):
    """By protocols like another one: each image gets the edges of its own real image, each video begins anew; and a
    LoRA changes the model."""
    params = {key: value for key, value in TEXT_UNET.items() if key != "out_channels"} | {"legacy": False}
    network = ControlNet(**params, hint_channels=3, hint_widths=(8, 16))
    save_weights(tmp_path / "control.safetensors", recipe_weights(network, seed=2, gain=1.0).state_dict())
    key = "middle_block.1.transformer_blocks.0.attn2.to_v"
    outs, ins = read_checkpoint(runs.model[3])[f"model.diffusion_model.{key}.weight"].shape
    lora = {"down": torch.ones(1, ins), "up": torch.ones(outs, 1)}
    key = f"lora_unet_{key.replace('.', '_')}"
    save_weights(tmp_path / "lora.safetensors", {f"{key}.lora_{end}.weight": part for end, part in lora.items()})
    coco = write_coco(tmp_path / "coco")
    for name in (entry["file_name"] for entry in captions(24)["images"][:12]):
        image = Image.new("RGB", (24, 20))
        image.paste((255, 255, 255), (8, 6, 16, 12))
        image.save(coco / "val2017" / name)
    same = yaml.safe_load(runs.protocol.read_text()) | {"select": {"count": 6}}
    tasks = {
        "edges": {"control": "edges", "defaults": {"control_model": [str(tmp_path / "control.safetensors")]}},
        "frames": {"video": True, "repeats": 3, "sampling": {"steps": 8}},
        "lora": {"defaults": {"lora": [str(tmp_path / "lora.safetensors")]}},
        "none": {"control": "edges", "defaults": {"control_model": [str(tmp_path / "none.safetensors")]}},
    }
    for name, task in {"plain": {}, **tasks}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(same | task))
    made = {}
    for name in ("plain", "edges", "frames", "lora"):
        arguments = runs.arguments(tmp_path / name, "--data", str(coco))
        assert main(["--protocol", str(tmp_path / f"{name}.yaml"), *arguments[2:]]) == 0
        made[name] = [
            np.asarray(Image.open(file), np.int64) for file in sorted((tmp_path / name / "samples").iterdir())
        ]
    images = [note["image_id"] for note in map(json.loads, (tmp_path / "edges/prompts.jsonl").read_text().splitlines())]
    drawn = [(900 - number) // 7 < 12 for number in images]  # whether its real image has edges
    differ = [np.abs(a - b).max() > 1 for a, b in zip(made["plain"], made["edges"], strict=True)]
    assert any(drawn) and not all(drawn) and all(d for d, real in zip(differ, drawn, strict=True) if real)
    card = json.loads((tmp_path / "edges/run.json").read_text())
    assert card["protocol"]["control"] == "edges" and card["method"]["control"][0]["control"]["kind"] == "edges"
    videos = np.array(made["frames"]).reshape(6, 3, -1)
    assert (videos[0] != videos[1]).any() and (videos[:, 0] != videos[:, 1]).any()
    assert json.loads((tmp_path / "frames/run.json").read_text())["batch"] == 3
    assert np.abs(np.array(made["lora"]) - np.array(made["plain"])).max() > 1
    assert len(json.loads((tmp_path / "lora/run.json").read_text())["lora"]) == 1
    capfd.readouterr()
    line = refused(capfd, main(["--protocol", str(tmp_path / "none.yaml"), *runs.arguments(tmp_path / "n")[2:]]))
    assert line == f"--protocol: needs {tmp_path}/none.safetensors, which is not there"


def test_videos_of_a_model_of_videos(runs, tmp_path, capfd):
    """All frames are one batch, each with noise of its own; a model of images is refused."""
    unet = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": 16}
    target = "ldm.modules.diffusionmodules.unet3d.VideoUNet"
    params = unet | {"in_channels": 4, "out_channels": 4, "context_dim": 16}
    config, ckpt = write_model(tmp_path, unet_config={"target": target, "params": params})
    same = yaml.safe_load(runs.protocol.read_text())
    asked = {"select": {"count": 2}, "video": "whole", "repeats": 3, "sampling": {"steps": 3}}
    (tmp_path / "videos.yaml").write_text(yaml.safe_dump(same | asked))
    protocol = ["--protocol", str(tmp_path / "videos.yaml"), "--data", str(runs.coco), "--plan", "0,2"]
    model = ["--config", str(config), "--ckpt", str(ckpt)]
    assert main([*protocol, *model, "--out", str(tmp_path / "a")]) == 0
    made = np.array([np.asarray(Image.open(file)) for file in sorted((tmp_path / "a/samples").iterdir())])
    assert len(made) == 6 and len(np.unique(made, axis=0)) == 6
    assert json.loads((tmp_path / "a/run.json").read_text())["batch"] == 3
    capfd.readouterr()
    line = refused(capfd, main([*protocol, *runs.model, "--out", str(tmp_path / "b")]))
    assert line == "--config: not a model of videos; expected one such as configs/video/videofusion.yaml"


def test_a_image_belongs_to_its_caption_not_to_its_place(runs, whole, tmp_path):
    """Fewer of the protocol's prompts, in other batches: the same images, to the last digit."""
    assert runs(tmp_path / "few", "--count", "11") == 0
    for path in (tmp_path / "few" / "samples").iterdir():
        assert np.array_equal(*(np.asarray(Image.open(p)) for p in (path, whole / "samples" / path.name)))
    assert images(tmp_path / "few") == 11


def test_the_batch_size_changes_no_byte(runs, whole, tmp_path):
    assert runs(tmp_path / "out", "--batch_size", "3") == 0
    assert files(tmp_path / "out") == files(whole)


def test_plans_by_name(runs, tmp_path):
    assert runs(tmp_path / "out", "--count", "1", "--plan", "faster-diffusion") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["method"]["keys"] == [0, 1, 2]


@pytest.mark.parametrize(
    "protocol, method, why",
    [
        ({"guidance": 7.5}, {}, r"was made for scale 2.0; this run's is 7.5; scripts/calibrate_plan.py makes one"),
        ({}, {"eta": 1.0}, "was made for eta 0.0; this run's is 1.0"),
    ],
)
def test_calibrations_are_of_runs_with_the_same_settings(protocol, method, why):
    method, own = Method(plan="skip:auto:9", **method), load_protocol("emoji64")
    _, ckpt = own.model()
    assert len(plan_of(recipe_of(own, Method(plan="skip:auto:9")), Method(plan="skip:auto:9"), ckpt).keys) == 9
    with pytest.raises(SettingError, match=why):
        plan_of(recipe_of(own.model_copy(update=protocol), method), method, ckpt)


def test_an_error_budget_holds_for_each_image(runs, tmp_path):
    assert runs(tmp_path / "out", "--count", "3", "--plan", "skip:0,2", "--error-budget", "9") == 0
    card = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (card["method"]["error_budget"], card["batch"]) == (9, 1)
    errors = [json.loads(line)["forecast_error"] for line in (tmp_path / "out/journal/0-of-1.jsonl").open()]
    assert len(set(errors)) == 3 and 0 < min(errors) and max(errors) <= 9


def test_a_function_makes_the_same_run(runs, whole, tmp_path):
    protocol = load_protocol(str(runs.protocol))
    model = ModelFiles(*map(Path, runs.model[1::2]))
    made = compute(protocol, Method(steps=4, plan="0,2"), model, out=tmp_path / "out", data=runs.coco)
    assert (made.made, made.found, made.complete, made.images) == (IMAGES, 0, True, tmp_path / "out" / "samples")
    assert files(tmp_path / "out") == files(whole)
    again = compute(protocol, Method(steps=4, plan="0,2"), model, out=tmp_path / "out", data=runs.coco)
    assert (again.made, again.found, again.complete) == (0, IMAGES, True)


@pytest.mark.parametrize(
    "given, why",
    [
        ({"method": Method(sampler="magic")}, "sampler: there is no solver 'magic'"),
        ({"method": Method(sampler="plms", eta=0.5)}, "eta: plms has no choice of it"),
        ({"method": Method(steps=4, plan="0,9")}, "plan: key 9 is past the last node 3"),
        ({"method": Method(steps=4, tome=0.5)}, "tome: "),
        ({"model": None}, "model: needed: protocol tiny names none"),
        ({"model": ModelFiles(Path("a"), Path("b"))}, "config|ckpt: "),
        ({"data": "nowhere"}, "data: .*nowhere/annotations/captions_val2017.json: no such file"),
    ],
    ids=str,
)
def test_a_function_names_the_argument_at_fault(runs, tmp_path, given, why):
    usual = {"method": Method(steps=4), "model": ModelFiles(*map(Path, runs.model[1::2])), "data": runs.coco}
    with pytest.raises(SettingError, match=f"^{why}"):
        compute(load_protocol(str(runs.protocol)), **usual | given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# One process or many


def torchrun(rank: int, port: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def slurm(rank: int, port: int) -> dict[str, str]:
    return {
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_NNODES": "3",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "run",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("launcher", [torchrun, slurm])
def test_three_processes_make_the_files_of_one(runs, whole, tmp_path, launcher):
    import lightning_fabric  # noqa: F401  once, not in each process

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, out = tmp_path / "log", tmp_path / "out"
    children = [Child(lambda: main(runs.arguments(out)), log, launcher(rank, port)) for rank in range(3)]
    assert [child.end() for child in children] == [0, 0, 0], log.read_text()
    assert files(out) == files(whole)
    assert sorted(path.name for path in (out / "journal").iterdir()) == [f"{rank}-of-3.jsonl" for rank in range(3)]


# Stops


def test_processes_killed_at_any_image_leave_a_run_that_goes_on(runs, whole, tmp_path):
    """Each kills itself when it has made so many images: before one has its name, or after."""
    out, log, chance = tmp_path / "out", tmp_path / "log", random.Random(0)

    def killed_at(part: int, count: int, before: bool) -> int:
        replace, made = os.replace, []

        def counted(source, target):
            made.append(target) if str(target).endswith(".png") else None
            if len(made) == count and before:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if len(made) == count:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = counted
        return main(runs.arguments(out, "--shard", f"{part}/2"))

    for kills in range(4):
        plans = [(part, chance.randint(1, 3), chance.random() < 0.5) for part in (1, 2)]
        children = [Child(lambda plan=plan: killed_at(*plan), log) for plan in plans]
        assert [child.end() for child in children] == [-signal.SIGKILL] * 2, (kills, log.read_text())
    assert 0 < images(out) < IMAGES and log.read_text().count("error") == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "samples").glob("[!.]*")}
    assert runs(out) == 0
    assert files(out) == files(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert main(["--verify", "--out", str(out)]) == 0


def test_a_full_disk_leaves_what_is_there(runs, whole, tmp_path):
    """No file may grow over 400 bytes, which the system enforces, as it does when a disk is full."""
    out, log = tmp_path / "out", tmp_path / "log"
    assert runs(out, "--shard", "1/3") == 0
    before = files(out)

    def on_a_full_disk() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        return main(runs.arguments(out))

    assert Child(on_a_full_disk, log).end() == 2
    *_, line = log.read_text().splitlines()
    assert re.fullmatch(f"generate.py: error: --out: can't write to {out}: File too large; what is there stays.*", line)
    assert files(out) == before
    assert runs(out) == 0 and files(out) == files(whole)


# Bad input


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--protocol", "coco"], "--protocol: unknown protocol 'coco'; accepted: coco2014-30k, "),
        (["--count", "49"], "--count: 49 prompts are asked for, at most 2 of an image; there are 48 such"),
        (["--data", "nowhere"], "--data: .*nowhere/annotations/captions_val2017.json: no such file; tiny reads"),
        (["--shard", "²/3"], "--shard: expected K/N, part K of 1..N, .*; got '²/3'"),
        (["--shard", "3/2"], "--shard: expected K/N, part K of 1..N, .*; got '3/2'"),
        (["--shard", "1/9999999"], "--shard: expected K/N, part K of 1..N, and N at most 1000000; got '1/9999999'"),
        (["--devices", "0"], "--devices: .* in 1..1024; got"),
        (["--strategy", "fsdp"], "--strategy: .*'fsdp'"),
        (["--sampler", "magic"], "--sampler: .*'magic'"),
        (["--steps", "2000"], "--steps: "),
        (["--plan", "0,9"], "--plan: key 9 is past the last node 3"),
        (["--compare"], "unrecognized arguments: --compare"),
        (["--plan", "deepcache:2:99"], "--plan: 99 blocks are to run anew; this network has "),
        (["--forecast", "quartic"], "--forecast: a forecaster must be one of hold, "),
        (["--plan", "off", "--error-budget", "0.1"], "--error-budget: an error budget needs forecasts to compare"),
        (["--ckpt", "nowhere"], "--ckpt: nowhere: no such file"),
        (["--device", "cuda:99"], "--device: cuda:99"),
    ],
    ids=" ".join,
)
def test_bad_arguments(runs, tmp_path, capfd, arguments, why):
    assert re.match(why, refused(capfd, runs(tmp_path / "out", *arguments)))
    assert not (tmp_path / "out").exists()


def test_what_is_needed(runs, capfd, tmp_path):
    assert refused(capfd, main(["--protocol", "emoji64"])).startswith("--out: needed")
    assert refused(capfd, main(["--out", str(tmp_path)])).startswith("--protocol: needed; accepted: coco2014-30k")
    protocol = write_protocol(tmp_path / "p.yaml")
    line = refused(capfd, main(["--protocol", str(protocol), "--data", str(runs.coco), "--out", str(tmp_path / "o")]))
    assert line.startswith("--config: needed, together with ckpt")


def test_protocols_that_do_not_fit_the_model(runs, tmp_path, capfd):
    for changes, why in (
        ({"size": 18}, "--protocol: its images have 18 px; this model's must be a multiple of 4"),
        ({"data": {"kind": "classes", "classes": 9}, "select": {}}, "--config: not a class-cond"),
    ):
        path = write_protocol(tmp_path / "p.yaml", **changes)
        assert re.match(why, refused(capfd, runs(tmp_path / "out", "--protocol", str(path))))


@pytest.mark.parametrize(
    "arguments, changes, fields",
    [
        ([], {"seed": 3}, "protocol_sha256 .*; protocol.seed .0 there, 3 given."),
        (["--count", "39"], {}, "protocol.select.count .40 there, 39 given.*; pictures .40 there, 39 given."),
        (["--steps", "5"], {}, "method.steps .4 there, 5 given."),
        (["--plan", "off"], {}, 'plan ."0,2" there, "off" given'),
    ],
    ids=["seed", "count", "steps", "plan"],
)
def test_another_run_in_the_folder_is_refused_by_its_fields(runs, whole, tmp_path, capfd, arguments, changes, fields):
    before = files(whole)
    path = write_protocol(tmp_path / "tiny.yaml", **changes)
    line = refused(capfd, runs(whole, "--protocol", str(path), *arguments))
    assert re.match(f"--out: {whole} holds another run; different: .*{fields}", line) and files(whole) == before


def test_images_that_do_not_fit_into_memory_are_refused(runs, tmp_path, monkeypatch, capfd):
    text = runs.protocol.read_text()
    large = re.sub(r"(?m)^size: .*$", "size: 1024", text)
    assert large != text
    (tmp_path / "large.yaml").write_text(large)
    (tmp_path / "meminfo").write_text("MemAvailable: 100000 kB\n")
    monkeypatch.setattr("ldm.profiling.cost.MEMINFO", tmp_path / "meminfo")
    line = refused(capfd, runs(tmp_path / "out", "--protocol", str(tmp_path / "large.yaml")))
    assert line.startswith("--batch_size: 1 image of 1024 x 1024 pixels at a time need at least ")
    assert not (tmp_path / "out").exists()


def test_a_transformer_of_classes_is_run_as_the_protocol_says(tmp_path):
    """The rows of DiT in table 3, at a tiny width. All key timesteps make the plain images; other plans do not."""
    protocol = tmp_path / "tiny.yaml"
    published = PROTOCOL_DIR / "imagenet256-50k-dit.yaml"
    protocol.write_text(yaml.safe_dump(read_yaml(published) | {"size": 32, "repeats": 1}))
    model = tiny_transformer(tmp_path, "configs/dit/dit-xl-2-256.yaml")
    images = {}
    for plan in ("off", "0,1,2,3", "0,2"):
        out = tmp_path / plan
        asked = ["--protocol", str(protocol), "--count", "1", "--steps", "4", "--plan", plan, "--noise-weight", "0"]
        assert main([*asked, *model, "--device", "cpu", "--out", str(out)]) == 0
        (file,) = (out / "samples").iterdir()
        images[plan] = np.asarray(Image.open(file))
    assert np.array_equal(images["off"], images["0,1,2,3"]) and not np.array_equal(images["off"], images["0,2"])
