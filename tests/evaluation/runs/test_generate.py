"""The folder of a run: nothing missing, double or half-written, wherever a process is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import evaluation.runs.generate
from evaluation.protocols.protocol import Prompt
from evaluation.runs.generate import FolderError, RunFolder, prompts_sha256
from evaluation.runs.images import ImageFolder
from ldm.io.files import UNFINISHED, json_sha256
from ldm.io.images import read_png
from ldm.sampling.generate import fill
from tests.helpers.processes import Child

PROMPTS = [Prompt(number, number, {"prompt": f"näive {number}", "image_id": 3}) for number in (7, 2, 9)]


def card(**changes):
    protocol = {"seed": 5, "repeats": 2, "size": 4, "prompts_sha256": prompts_sha256(PROMPTS)} | changes
    return {
        "name": "test",
        "protocol_sha256": json_sha256(protocol),
        "protocol": protocol,
        "weights": "w",
        "plan": "off",
        "method": {"steps": 4, "interval": (1, 2)},
        "batch": 2,
        "versions": {"torch": "1"},
    }


def colour(items):
    """Images whose colour is their seed."""
    return [Image.new("RGB", (4, 4), item.seed) for item in items], {"seconds": 0.5}


def run(path: Path, rank: int = 0, world_size: int = 1) -> bool:
    folder = RunFolder.open(path, card(), PROMPTS, f"{rank}-of-{world_size}")
    list(fill(folder, folder.items, colour, 2, rank, world_size))
    return folder.finish()


def content(path: Path) -> dict[str, bytes]:
    """All files but the journals, which say who did what."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.parent.name != "journal"
    }


@pytest.fixture
def whole(tmp_path) -> Path:
    assert run(tmp_path / "whole")
    return tmp_path / "whole"


def test_what_a_run_leaves(whole):
    folder = RunFolder(whole)
    names = [f"samples/{number:08d}-{repeat:03d}.png" for number in (7, 2, 9) for repeat in range(2)]
    assert sorted(content(whole)) == sorted([*names, "manifest.jsonl", "prompts.jsonl", "run.json"])
    manifest = [json.loads(line) for line in (whole / "manifest.jsonl").read_text("utf-8").splitlines()]
    assert [entry["file"] for entry in manifest] == names
    assert manifest[3].items() >= {"prompt": "näive 2", "id": 2, "sample": 1, "seed": [5, 2, 1]}.items()
    image, settings, _ = read_png(whole / names[3])
    assert image.getpixel((0, 0)) == (5, 2, 1) and settings.items() >= {"prompt": "näive 2", "steps": 4}.items()
    assert folder.faults() == []


def killed_at(path: Path, number: int, log: Path) -> bool:
    """Run until the file system is changed for the number-th time, and be killed there; whether it came to that."""

    def work() -> int:
        calls = iter(range(number + 1))

        def counted(call):
            def wrapper(*arguments, **options):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)

            return wrapper

        def torn(journal, entry):
            if next(calls) == number:
                with journal.open("ab") as stream:  # half a line
                    stream.write(json.dumps(entry).encode()[:20])
                    stream.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
            append_line(journal, entry)

        def half(path, content):
            if next(calls) == number:
                write(path, content[:-30])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)

        append_line, write = evaluation.runs.generate.append_line, Path.write_bytes
        os.replace, os.link, shutil.rmtree = counted(os.replace), counted(os.link), counted(shutil.rmtree)
        Path.write_bytes, evaluation.runs.generate.append_line = half, torn
        return 0 if run(path) else 1

    return Child(work, log).end() == -signal.SIGKILL


def test_a_process_may_be_killed_at_any_change_of_the_folder(tmp_path, whole):
    expected, number = content(whole), 0
    while killed_at(tmp_path / f"{number}", number, tmp_path / "log"):
        path = tmp_path / f"{number}"
        # Then again in the middle of what is left, and then by others in other shares.
        killed_at(path, 3, tmp_path / "log")
        there = [name for name in content(path) if UNFINISHED not in name]
        assert {*there} <= {*expected} and all(read_png(path / name) for name in there if name.endswith(".png"))
        parts = [run(path, rank, 3) for rank in range(3)]
        assert parts[-1] and content(path) == expected
        assert not [*path.rglob(f"{UNFINISHED}*")]
        assert RunFolder(path).faults() == []
        number += 1
    assert number > 20


def test_parts_need_not_know_of_each_other(tmp_path, whole):
    path = tmp_path / "parts"
    assert [run(path, rank, 3) for rank in (2, 0, 1)] == [False, False, True]
    assert content(path) == content(whole)


def test_hidden_folders_of_other_tools_are_no_images(whole):
    before = content(whole)
    (whole / "samples" / ".ipynb_checkpoints").mkdir()
    shutil.copy(next((whole / "samples").glob("*.png")), whole / "samples" / ".ipynb_checkpoints")
    assert RunFolder(whole).faults() == [] and RunFolder(whole).finish()
    assert len(ImageFolder(whole / "samples").names) == len(RunFolder(whole).items)
    shutil.rmtree(whole / "samples" / ".ipynb_checkpoints")
    assert content(whole) == before


def test_damage_is_found_and_mended(whole):
    before = content(whole)
    first, second, third, fourth, *_ = sorted((whole / "samples").iterdir())
    first.write_bytes(first.read_bytes()[:-30])
    second.unlink()
    third.write_bytes(fourth.read_bytes())
    (whole / "samples" / "stray.png").touch()
    faults = RunFolder(whole).faults()
    assert sorted(fault.split(": ")[1] for fault in faults) == [
        "missing",
        "no image of this run",
        "not the file that manifest.jsonl lists",
        "not the file that manifest.jsonl lists",
    ]
    (whole / "samples" / "stray.png").unlink()
    assert run(whole) and content(whole) == before and RunFolder(whole).faults() == []


def altered(path: Path) -> None:
    """Other pixels under the same settings, as an image editor leaves them."""
    with Image.open(path) as image:
        text = PngImagePlugin.PngInfo()
        for name, value in image.text.items():
            text.add_itxt(name, value)
        Image.eval(image, lambda level: 255 - level).save(path, pnginfo=text)


def test_a_image_with_other_pixels_is_not_taken_for_the_one_that_was_made(whole):
    before = content(whole)
    first = min((whole / "samples").iterdir())
    altered(first)
    assert read_png(first)[1]["prompt"] == "näive 2" and first.read_bytes() != before[f"samples/{first.name}"]
    assert [fault.split(": ")[1] for fault in RunFolder(whole).faults()] == ["not the file that manifest.jsonl lists"]
    assert not RunFolder(whole).finish()  # nor does a part that did not make it
    assert (
        RunFolder(whole).unfinished().startswith(f"5 of 6 images there; not as they were made: samples/{first.name};")
    )
    assert content(whole)["manifest.jsonl"] == before["manifest.jsonl"]
    assert run(whole) and content(whole) == before and RunFolder(whole).faults() == []


def test_parts_do_not_finish_over_a_image_that_was_altered(tmp_path, whole):
    path = tmp_path / "parts"
    run(path, 0, 3)
    altered(min((path / "samples").iterdir()))
    assert [run(path, rank, 3) for rank in (1, 2)] == [False, False] and not (path / "manifest.jsonl").exists()
    assert run(path, 0, 3) and content(path) == content(whole)


def test_a_image_without_its_line_is_made_again(whole):
    before = content(whole)
    shutil.rmtree(whole / "journal")
    assert not RunFolder(whole).finish()
    assert run(whole) and content(whole) == before


def test_two_equal_runs_at_once_end_well(tmp_path, whole):
    """One finishes while the other is about to rename its image."""
    path = tmp_path / "twice"
    (child_waits, says_so), (other_ended, ends) = os.pipe(), os.pipe()

    def slow() -> int:
        replace = os.replace
        os.close(ends)

        def waiting(source, target):
            if str(target).endswith("001.png"):
                os.write(says_so, b".")
                os.read(other_ended, 1)
            replace(source, target)

        os.replace = waiting
        return 0 if run(path) else 1

    child = Child(slow, tmp_path / "log")
    os.close(says_so)
    assert os.read(child_waits, 1) == b"."
    assert run(path)
    os.close(ends)
    assert child.end() == 0
    assert content(path) == content(whole) and RunFolder(path).faults() == []


def test_arrays_of_other_pixels_are_written_anew(whole):
    folder, path = RunFolder(whole), whole / "samples.npz"
    good = folder.write_npz().read_bytes()
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as stream:
        np.lib.format.write_array(stream, np.zeros((6, 4, 4, 3), np.uint8))
    assert [fault.split(":")[0] for fault in folder.faults()] == ["samples.npz"]
    assert folder.write_npz().read_bytes() == good


def test_arrays_that_are_not_whole_are_found_and_written_anew(whole):
    folder, path = RunFolder(whole), whole / "samples.npz"
    good = folder.write_npz().read_bytes()
    assert folder.faults() == [] and np.load(path)["arr_0"].shape == (6, 4, 4, 3)
    np.savez(path, arr_0=np.zeros((5, 4, 4, 3), np.uint8))
    for bad in (b"x", good[:-30], good.replace(bytes([5, 7, 0]), bytes([5, 7, 9]), 1), path.read_bytes()):
        path.write_bytes(bad)
        assert [fault.split(":")[0] for fault in folder.faults()] == ["samples.npz"]
        assert folder.write_npz().read_bytes() == good


def test_images_missing_from_an_unfinished_run_are_counted(tmp_path):
    run(tmp_path / "part", 0, 3)
    assert RunFolder(tmp_path / "part").faults() == ["unfinished: no manifest.jsonl, 4 of 6 images missing"]


def test_another_run_is_refused_by_the_fields_that_differ(whole):
    before = content(whole)
    other = card(seed=6) | {"batch": 3, "weights": "w"}
    with pytest.raises(
        FolderError,
        match=r"holds another run; different: protocol_sha256 .*; protocol.seed \(5 there, "
        r"6 given\); batch \(2 there, 3 given\); choose another folder",
    ):
        RunFolder.open(whole, other, PROMPTS)
    RunFolder.open(whole, card() | {"versions": {"torch": "2"}, "name": "other"}, PROMPTS)
    assert content(whole) == before


def test_files_that_were_changed_are_refused(whole, tmp_path):
    (whole / "prompts.jsonl").write_bytes((whole / "prompts.jsonl").read_bytes().replace(b"7", b"8"))
    with pytest.raises(FolderError, match="prompts.jsonl: not the prompts of run.json"):
        RunFolder(whole)
    text = (whole / "run.json").read_text()
    for changed, why in (
        (text.replace('"size": 4', '"size": 5'), "its protocol is not the one that its hash names"),
        (text[:40], "not a run card"),
        ("{}", "not a run card: protocol is missing"),
        (text.replace('"batch"', '"many"'), "not a run card: batch is missing"),
        (text.replace('"batch": 2', '"batch": "2"'), "not a run card: batch should be a valid integer"),
        (text.replace('"seed": 5', '"seed": "5"'), "not a run card: protocol.seed should be a valid integer"),
        (text.replace('"repeats"', '"again"'), "not a run card: protocol.repeats is missing"),
        ("[]", "not a run card"),
    ):
        (whole / "run.json").write_text(changed)
        with pytest.raises(FolderError, match=f"run.json: {why}"):
            RunFolder(whole)
    with pytest.raises(FolderError, match="run.json: No such file.*expected the folder of a run"):
        RunFolder(tmp_path / "nowhere")


def test_images_of_another_kind_are_not_mixed_in(tmp_path):
    (tmp_path / "samples").mkdir()
    with pytest.raises(FolderError, match="has samples/ but no run.json"):
        RunFolder.open(tmp_path, card(), PROMPTS)


def test_all_images_in_one_array(whole):
    path = RunFolder(whole).write_npz()
    first, array = path.read_bytes(), np.load(path)["arr_0"]
    path.unlink()
    assert array.shape == (6, 4, 4, 3) and array.dtype == np.uint8
    assert array[:, 0, 0].tolist() == [[5, number, repeat] for number in (7, 2, 9) for repeat in range(2)]
    assert RunFolder(whole).write_npz().read_bytes() == first
