"""evaluation/tables.py in the coco world: from captions and real images to the printed table, with tiny networks."""

from __future__ import annotations

import csv
import json
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from evaluation import tables
from evaluation.metrics.extractors import load_clip, load_extractor, resized
from evaluation.metrics.inception import Inception
from evaluation.protocols.protocol import load_protocol
from evaluation.table import cost
from evaluation.table import row as table_row
from evaluation.table.cost import Timing
from evaluation.table.row import Job, Sources, jobs_of, other_world, reasons_unlike
from evaluation.table.spec import COLUMNS, load_table
from ldm.checkpoint import fingerprint, save_weights
from ldm.io.images import from_pil, open_image
from tests.helpers.clip_vocabulary import lines
from tests.helpers.coco import write_coco, write_protocol
from tests.helpers.goldens import recipe_weights
from tests.helpers.paths import ROOT
from tests.helpers.tiny_clip import TINY_TEXT, TINY_VISION
from tests.helpers.tiny_models import write_model

PAPER = {"fid": 20.5, "clip_score": 0.773, "gflops": 0.2, "seconds": 2.0, "ftc": 53.0}
RUNS = {"plain": "ddim_4_off", "ours": "ddim_4_0,2"}
COUNT, REAL = 3, 4


@dataclass(frozen=True)
class World:
    """A folder with data, networks, and a table with two rows that run; and what tables.py printed of it.

    The model is its protocol's own, so GFLOPs and FID are set against the paper's numbers; CLIP and the machine are not
    the paper's. The first row is timed.
    """

    folder: Path
    printed: str = ""

    def argv(self, *more: str) -> list[str]:
        given = {"--inception": "inception.pth", "--clip": "clip", "--runs": "runs"}
        return [
            str(self.folder / "two.yaml"),
            "--world",
            "coco",
            "--device",
            "cpu",
            *(part for flag, name in given.items() for part in (flag, str(self.folder / name))),
            *more,
        ]

    def run(self, row: str) -> Path:
        (folder,) = (self.folder / "runs" / "tiny").glob(f"{RUNS[row]}-????????")
        return folder

    def result(self, row: str, measure: str) -> Path:
        (file,) = self.run(row).glob(f"{measure}-*.json")
        return file

    def table(self) -> dict[str, list[str]]:
        """The printed cells of each row of the first part."""
        rows = (line[2:-2].split(" | ") for line in self.printed.split("\n\n")[1].splitlines()[2:])
        return {name: [cell.strip() for cell in cells] for name, *cells in rows}

    def csv(self) -> dict[str, dict[str, str]]:
        text = (self.folder / "runs" / "two-coco.csv").read_text(encoding="utf-8")
        return {row["row"]: row for row in csv.DictReader(text.splitlines())}


def write_networks(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.save(recipe_weights(Inception(), seed=11, gain=1.4).state_dict(), folder / "inception.pth")
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    (folder / "clip" / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")


def write_table(folder: Path) -> None:
    """With a protocol whose defaults are the tiny model and the data in the folder."""
    config, ckpt = write_model(folder)
    data = write_coco(folder / "coco", REAL)
    protocol = write_protocol(
        folder / "tiny.yaml",
        select__count=COUNT,
        defaults={"config": str(config), "ckpt": str(ckpt), "data": str(data)},
        metrics={"fid": ["inception-2015/clean"], "clip_score": ["hessel"]},
    )
    how = {"sampler": "ddim", "steps": 4, "paper": PAPER}
    (folder / "two.yaml").write_text(
        yaml.safe_dump(
            {
                "title": "Two",
                "source": "nowhere",
                "columns": [*PAPER],
                "protocol": {"coco": str(protocol)},
                "rows": [
                    {"label": "plain", "plain": True, **how, "plan": "off"},
                    {"label": "ours", **how, "plan": "0,2"},
                    {"label": "other", "missing": "no such model", "paper": PAPER},
                ],
            }
        )
    )


@pytest.fixture(autouse=True, scope="module")
def few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_row, "RESAMPLES", 2)
        yield


@pytest.fixture(scope="module")
def world(few_resamples, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_networks(folder)
    write_table(folder)
    forked = multiprocessing.get_context("fork")  # a copy of this process, without the seconds of importing PyTorch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.multiprocessing, "get_context", lambda _: forked)
        assert tables.main(World(folder).argv("--rows", "1", "--timed", "1")) == 0
        assert tables.main(World(folder).argv("--timed", "0")) == 0
    return World(folder, (folder / "runs" / "two-coco.md").read_text(encoding="utf-8"))


def read(files: list[Path]) -> list[torch.Tensor]:
    return [from_pil(open_image(file))[None] for file in sorted(files)]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance of few features (N, D), by N x N products: the trace of (C1 C2)^1/2 is a nuclear norm."""
    around_a, around_b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    cross = np.linalg.norm(around_a @ around_b.T, "nuc")
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (around_a**2).sum() + (around_b**2).sum() - 2 * cross


@pytest.mark.parametrize("row", RUNS)
def test_values_are_those_of_the_rows_images(world, row):
    """FID against all real images; each image with its own caption."""
    fid = load_extractor("inception-2015", world.folder / "inception.pth", "clean")
    clip = load_clip(world.folder / "clip")
    entries = [json.loads(line) for line in (world.run(row) / "manifest.jsonl").read_text().splitlines()]
    made = read([world.run(row) / entry["file"] for entry in entries])
    real = read([*(world.folder / "coco" / "val2017").iterdir()])
    assert (len(made), len(real)) == (COUNT, REAL)
    features = [np.concatenate([fid(image).numpy() for image in images]).astype(np.float64) for images in (made, real)]
    found = world.csv()[row]
    assert float(found["fid"]) == pytest.approx(frechet(*features), rel=1e-4)
    captions = {entry["file"]: entry["prompt"] for entry in entries}
    shown = clip.embed_images(torch.cat([resized(image, clip.size, "clip-crop") for image in made]))
    cosines = (shown * clip.embed_texts([f"A photo depicts {captions[name]}" for name in sorted(captions)])).sum(1)
    assert float(found["clip_score"]) == pytest.approx(2.5 * cosines.clamp(min=0).mean().item(), rel=1e-5)


def test_printed_is_what_was_found_beside_the_papers(world):
    plain, ours = (world.csv()[row] for row in RUNS)
    fid, low, high, score, gflops, seconds, ftc = (
        float(plain[name]) for name in ("fid", "fid_low", "fid_high", "clip_score", "gflops", "seconds", "ftc")
    )
    timing = json.loads((world.run("plain") / "cost-auto.json").read_text())
    assert [seconds] == timing["seconds"] and ftc == pytest.approx(fid * seconds / score)
    assert ours["seconds"] == ours["ftc"] == "" and float(plain["fid_difference"]) == pytest.approx(fid - 20.5)
    assert plain["clip_score_difference"] == plain["seconds_difference"] == plain["ftc_difference"] == ""
    cells = world.table()["plain"]
    assert cells[:3] == [f"{fid:.2f} ({low:.2f} to {high:.2f})", "20.50", f"{fid - 20.5:+.2f}"]
    assert cells[3].startswith(f"{score:.3f} (") and cells[4:6] == ["0.773", ""]
    assert cells[6:] == [
        f"{gflops:.1f}",
        "0.2",
        f"{gflops / 0.2 - 1:+.2%}",
        f"{seconds:.2f}",
        "2.00",
        "",
        f"{ftc:.1f}",
        "53.0",
        "",
        "",
    ]
    assert world.table()["other"] == [
        *(["", paper, ""][i] for paper in ("20.50", "0.773", "0.2", "2.00", "53.0") for i in range(3)),
        "no such model",
    ]
    saved = float(ours["gflops"]) / gflops - 1
    assert f"| ours | {float(ours['fid']) - fid:+.2f} | +0.00 | " in world.printed and (
        f" | {saved:+.0%} | +0% | " in world.printed and -0.25 < saved < -0.1
    )
    notes = world.printed.split("\n\n")
    assert [note for note in notes if note.startswith("No difference")] == [
        "No difference from the paper in CLIP-score (hessel), distance × s / CLIP: another measure.",
        f"No difference from the paper in s/image whole: timed on {timing['machine']} in full precision, the paper's "
        "on an A40 in half precision.",
    ]
    assert "\n| row | FID | paper | difference | CLIP-score (hessel) | paper (CLIP-score) | diff" in world.printed
    assert f"fid, inception-2015, clean: N = {COUNT} images of " in world.printed


def test_files(world):
    files = {path.suffix: path.read_text(encoding="utf-8") for path in (world.folder / "runs").glob("two-coco.*")}
    assert {*files} == {".md", ".csv", ".tex"} and files[".tex"].count(r"\begin{tabular}") == 2
    assert [*world.csv()] == ["plain", "ours", "other"] and world.csv()["other"]["remark"] == "no such model"


def test_csv_says_what_each_row_is_of(world):
    card = json.loads((world.run("ours") / "run.json").read_text())
    found = [[row[name] for name in ("weights", "n", "protocol", "protocol_sha256")] for row in world.csv().values()]
    whole = [fingerprint(world.folder / "model.safetensors"), str(COUNT), "tiny", card["protocol_sha256"]]
    assert found == [whole, whole, ["", "", "", ""]] and len(whole[3]) == 64


def test_a_second_run_makes_nothing_anew(world, capfd):
    before = {path: path.stat().st_mtime_ns for path in (world.folder / "runs" / "tiny").rglob("*")}
    assert tables.main(world.argv("--timed", "0")) == tables.main(world.argv("--rows", "1", "--timed", "1")) == 0
    assert tables.main(world.argv("--show")) == 0
    after = {path: path.stat().st_mtime_ns for path in (world.folder / "runs" / "tiny").rglob("*")}
    output = capfd.readouterr()
    assert after == before and output.err == "" and output.out.count(world.printed) == 3


# Other weights


@pytest.fixture
def other(world) -> Path:
    """Weights of the same shape."""
    path = world.folder / "other.safetensors"
    tensors = load_file(world.folder / "model.safetensors")
    save_weights(path, {name: tensor * 2 for name, tensor in tensors.items()})
    return path


def refused(capfd, argv: list[str]) -> str:
    assert tables.main(argv) == 2
    output = capfd.readouterr()
    assert output.out == ""
    return output.err.splitlines()[-1].removeprefix("tables.py: error: ")


def cells(world: World) -> list[str]:
    """What the CSV has of quality and time."""
    return [row[name] for row in world.csv().values() for name in ("fid", "clip_score", "seconds", "ftc")]


def test_numbers_of_other_files_are_not_shown(world, other, capfd):
    """Other weights, or another config: other runs, none of which is there."""
    line = refused(capfd, world.argv("--show", "--ckpt", str(other)))
    assert re.match(r"TABLE: no row of two is finished in .*: not run$", line)
    changed = world.folder / "changed.yaml"
    changed.write_text((world.folder / "config.yaml").read_text() + "# other\n")
    line = refused(capfd, world.argv("--show", "--config", str(changed)))
    assert line.startswith("TABLE: no row of two is finished in ")


def test_images_of_a_protocol_that_was_edited_are_not_shown(world, capfd):
    protocol = world.folder / "tiny.yaml"
    kept = protocol.read_text()
    protocol.write_text(yaml.safe_dump(yaml.safe_load(kept) | {"guidance": 4.0}))
    try:
        line = refused(capfd, world.argv("--show"))
    finally:
        protocol.write_text(kept)
    assert line.startswith("TABLE: no row of two is finished in ")


def test_images_of_other_captions_are_not_shown(world, tmp_path, capfd):
    line = refused(capfd, world.argv("--show", "--data", str(write_coco(tmp_path / "other", REAL + 1))))
    assert line.startswith("TABLE: no row of two is finished in ")
    line = refused(capfd, world.argv("--show", "--data", str(tmp_path / "gone")))
    assert "gone/annotations/captions_val2017.json is not there, which tiny needs" in line


@pytest.mark.parametrize(
    "columns, metric, count, argv, why",
    [
        (["fid"], "fid", COUNT, ["--count", "1"], "--count: fid: at least 2 images are needed; got 1"),
        (["fid"], "fid", 1, [], "TABLE: protocol few: fid: at least 2 images are needed; got 1"),
        (["fid", "recall"], "adm", COUNT, [], "TABLE: protocol few: fid, recall: at least 4 images are needed; got 3"),
        (
            ["fid"],
            "fid",
            COUNT,
            ["--count", "9"],
            "--count: 9 prompts are asked for, at most 1 of an image; there are 4",
        ),
        (["fid"], "fid", 9, [], "TABLE: protocol few: 9 prompts are asked for, at most 1 of an image; there are 4"),
    ],
    ids=str,
)
def test_too_few_images_are_refused_before_any_is_made(world, tmp_path, capfd, columns, metric, count, argv, why):
    content = yaml.safe_load((world.folder / "tiny.yaml").read_text())
    content |= {"select": {"count": count}, "metrics": {metric: ["inception-2015/clean"]}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "t.yaml").write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "source": "s",
                "columns": columns,
                "protocol": {"coco": str(tmp_path / "few.yaml")},
                "rows": [{"label": "a", "steps": 4}],
            }
        )
    )
    runs = tmp_path / "runs"
    line = refused(capfd, [str(tmp_path / "t.yaml"), *world.argv("--runs", str(runs), *argv)[1:]])
    assert line.startswith(why) and not runs.exists()


@pytest.mark.parametrize(
    "metrics, argv, why",
    [
        (
            {"fid": ["nope/clean"]},
            [],
            "TABLE: protocol few: metrics: there is no extractor 'nope'; accepted: efficient",
        ),
        ({"fid": ["inception-2015/nope"]}, [], "TABLE: protocol few: metrics: there is no resize 'nope'; accepted: "),
        (
            {"fid": ["inception-2015/clean"], "clip_score": ["nope"]},
            [],
            "TABLE: protocol few: metrics: 'nope' is not one of hessel-b32, ",
        ),
        (
            {"fid": ["dinov2/clean"]},
            ["--inception", "dino"],
            "--inception: dinov2: dino: expected a folder with config",
        ),
    ],
    ids=str,
)
def test_networks_of_the_protocol_that_can_not_be_had(world, tmp_path, capfd, metrics, argv, why):
    content = yaml.safe_load((world.folder / "tiny.yaml").read_text()) | {"metrics": metrics}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    table = yaml.safe_load((world.folder / "two.yaml").read_text())
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table | {"protocol": {"coco": str(tmp_path / "few.yaml")}}))
    line = refused(capfd, [str(tmp_path / "t.yaml"), *world.argv("--runs", str(tmp_path / "runs"), *argv)[1:]])
    assert line.startswith(why) and not (tmp_path / "runs").exists()


def test_two_protocols_of_one_name_are_refused(world, tmp_path, capfd):
    paths = [tmp_path / name / "tiny.yaml" for name in "ab"]
    for path, seed in zip(paths, (0, 1), strict=True):
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(yaml.safe_load((world.folder / "tiny.yaml").read_text()) | {"seed": seed}))
    table = yaml.safe_load((world.folder / "two.yaml").read_text()) | {"protocol": {"coco": str(paths[0])}}
    table["rows"][1]["protocol"] = {"coco": str(paths[1])}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table))
    line = refused(capfd, [str(tmp_path / "t.yaml"), *world.argv("--show")[1:]])
    assert line == f"TABLE: {paths[0]} and {paths[1]} are two protocols of one name; expected each with its own"


def test_images_and_times_of_a_plan_that_was_edited_are_not_shown(world, tmp_path, capfd):
    """A plan file with all key timesteps makes the images of the plain row; edited, it makes others."""
    plan, file = tmp_path / "plan.yaml", tmp_path / "t.yaml"
    plan.write_text(yaml.safe_dump({"source": "here", "steps": {4: [0, 1, 2, 3]}}))
    row = {"label": "filed", "sampler": "ddim", "steps": 4, "plan": str(plan), "noise_weight": 0.0}
    table = yaml.safe_load((world.folder / "two.yaml").read_text())
    file.write_text(yaml.safe_dump(table | {"rows": [row | {"paper": PAPER}]}))
    argv = [str(file), *world.argv("--show", "--runs", str(tmp_path))[1:]]
    sources = Sources(inception=str(world.folder / "inception.pth"), clip=str(world.folder / "clip"), device="cpu")

    def job() -> Job:
        filed = load_table(str(file))
        return jobs_of(filed, "coco", tmp_path, sources, None, filed.columns)[0]

    shutil.copytree(world.run("plain"), job().folder)
    assert tables.main(argv) == 0
    (found,) = csv.DictReader((tmp_path / "t-coco.csv").read_text().splitlines())
    assert [found[name] for name in ("fid", "seconds")] == [world.csv()["plain"][name] for name in ("fid", "seconds")]
    capfd.readouterr()

    plan.write_text(yaml.safe_dump({"source": "here", "steps": {4: [0, 2]}}))
    assert refused(capfd, argv).endswith(": not run")
    plan.unlink()
    assert f": filed: plan: plan file {plan} is not a plan: it cannot be read" in refused(capfd, argv)


def write_inception(world: World, folder: Path) -> list[str]:
    state = torch.load(world.folder / "inception.pth")
    torch.save({name: tensor * 1.1 for name, tensor in state.items()}, folder / "another.pth")
    return ["fid", "--inception", str(folder / "another.pth")]


def write_clip(world: World, folder: Path) -> list[str]:
    shutil.copytree(world.folder / "clip", folder / "clip")
    weights = [path / "clip" / "model.safetensors" for path in (world.folder, folder)]
    save_weights(weights[1], {name: tensor * 2 for name, tensor in load_file(weights[0]).items()})
    return ["clip_score", "--clip", str(folder / "clip")]


def write_reality(world: World, folder: Path) -> list[str]:
    """The same captions, another image."""
    shutil.copytree(world.folder / "coco", folder / "coco")
    Image.new("RGB", (24, 20), (0, 200, 0)).save(folder / "coco" / "val2017" / f"{0:012d}.jpg")
    return ["fid", "--data", str(folder / "coco")]


def write_inception_and_reality(world: World, folder: Path) -> list[str]:
    return [*write_inception(world, folder), *write_reality(world, folder)[1:]]


@pytest.mark.parametrize("write", [write_inception, write_clip, write_reality])
def test_results_of_another_network_or_other_real_images_are_not_taken_for_these(world, tmp_path, write):
    measure, *argv = write(world, tmp_path)
    assert tables.main(world.argv("--show", *argv)) == 0
    row = world.csv()["plain"]
    assert row[measure] == row["ftc"] == "" != row["seconds"]


@pytest.mark.parametrize("write", [write_clip, write_inception_and_reality])
def test_other_results_are_computed_beside_these(world, tmp_path, capfd, write):
    measure, *argv = write(world, tmp_path)
    before = {path: path.read_bytes() for path in world.run("plain").glob("*.json")}
    try:
        assert tables.main(world.argv("--timed", "0", "--rows", "1", *argv)) == 0
        assert float(world.csv()["plain"][measure]) > 0
        new = {*world.run("plain").glob("*.json")} - before.keys()
        assert [path.name.partition("-")[0] for path in new] == [measure]
    finally:
        for path in {*world.run("plain").glob("*.json")} - before.keys():
            path.unlink()
    assert {path: path.read_bytes() for path in world.run("plain").glob("*.json")} == before
    assert tables.main(world.argv("--show")) == 0 and world.printed in capfd.readouterr().out


def test_results_of_another_resize_are_not_shown(world, capfd):
    protocol = world.folder / "tiny.yaml"
    kept = protocol.read_text()
    protocol.write_text(kept.replace("inception-2015/clean", "inception-2015/tf1-bilinear"))
    try:
        assert tables.main(world.argv("--show")) == 0
    finally:
        protocol.write_text(kept)
    assert world.csv()["ours"]["fid"] == "" != world.csv()["ours"]["clip_score"]


def test_files_that_are_missing_are_named_where_nothing_is_made(world, capfd):
    """What the hashes of runs and results are taken from must be there; times need no networks."""
    ckpt = world.folder / "model.safetensors"
    ckpt.rename(world.folder / "away")
    try:
        line = refused(capfd, world.argv("--show"))
    finally:
        (world.folder / "away").rename(ckpt)
    assert line.startswith("TABLE: no row of two is finished in ") and f": ckpt: {ckpt}: no such file" in line
    assert tables.main(world.argv("--show", "--inception", "gone")) == 0
    plain = world.csv()["plain"]
    assert plain["fid"] == "" != plain["seconds"] and plain["remark"].startswith("inception: inception-2015: gone: no ")


@pytest.mark.parametrize(
    "damage, why",
    [
        ("{", "line 1, column 2: not JSON: Expecting property name"),
        ("[]", "it should be a mapping"),
        ('{"seconds": [1.0]}', "seconds_unet is missing"),
        ({"seconds": []}, "seconds should have at least 1 item"),
        ({"seconds": 3}, "seconds should be a valid list; got 3"),
        ({"seconds_unet": [None]}, "seconds_unet.0 should be a valid number; got None"),
        ({"machine": None}, "machine should be a valid string; got None"),
        ({"weights": None}, "weights should be a valid string; got None"),
        ({"memory": "1"}, "memory should be a valid integer; got '1'"),
        ({"threads": 1.5}, "threads should be a valid integer; got 1.5"),
        ({"method": 3}, "method should be a mapping; got 3"),
    ],
    ids=str,
)
def test_a_damaged_timing_is_refused_by_name(world, capfd, damage, why):
    timing = world.run("plain") / "cost-auto.json"
    kept = timing.read_text()
    timing.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(kept) | damage))
    line = refused(capfd, world.argv("--show"))
    timing.write_text(kept)
    assert line.startswith(f"--runs: {timing}: not a timing: {why}") and line.endswith("the file it is measured again")


# What can be set against the paper's numbers

PUBLISHED = "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa"  # in models/published.yaml
V1, V2 = (str(ROOT / "configs" / "stable-diffusion" / f"{name}-inference.yaml") for name in ("v1", "v2"))
MEASURED, TIMED = (
    {name for name, column in COLUMNS.items() if column.kind in (kind, "derived")} for kind in ("quality", "cost")
)


def timing_on(machine: str, precision: str) -> Timing:
    return Timing(
        seconds=[1.0],
        seconds_unet=[1.0],
        memory=None,
        precision=precision,
        weights="x",
        machine=machine,
        threads=1,
        date="2026-01-01",
    )


@pytest.mark.parametrize(
    "argv, weights, timing, unlike, why",
    [
        ([], PUBLISHED, None, set(), ""),
        ([], None, None, set(), ""),
        (["--count", "10000"], PUBLISHED, None, set(), ""),
        (["--config", V1], PUBLISHED, None, set(), ""),
        (["--ckpt", "elsewhere.safetensors"], PUBLISHED, None, set(), ""),
        ([], "12" * 32, None, MEASURED | TIMED, "other weights than coco2017-10k's"),
        (["--ckpt", "elsewhere.safetensors"], "12" * 32, None, MEASURED | TIMED, "other weights than coco2017-10k's"),
        (["--count", "5"], PUBLISHED, None, MEASURED, "of 5 prompts, where coco2017-10k has 10000"),
        (["--config", V2], PUBLISHED, None, {*COLUMNS}, "another config than coco2017-10k's"),
        ([], PUBLISHED, ("NVIDIA A40", "autocast"), set(), ""),
        ([], PUBLISHED, ("NVIDIA A40", "full"), TIMED, "timed on NVIDIA A40 in full precision, the paper's on an A40"),
        ([], PUBLISHED, ("NVIDIA A400", "autocast"), TIMED, "timed on NVIDIA A400 in autocast"),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_is_like_for_like(argv, weights, timing, unlike, why):
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    sources = Sources(config=given.get("--config"), ckpt=given.get("--ckpt"))
    table, count = load_table("table1"), given.get("--count")
    job = jobs_of(table, "coco", Path("runs"), sources, count and int(count), table.columns)[0]
    timing = timing and timing_on(*timing)
    found = reasons_unlike(job.bench, weights, timing)
    assert {*found} == unlike and all(reason.startswith(why) for reason in found.values())


def test_times_that_the_source_took_otherwise_are_not_compared():
    """Times of batches, in the fork's table."""
    table = load_table("table3")
    jobs = jobs_of(table, "coco", Path("runs"), Sources(), None, table.columns)
    job = next(job for job in jobs if job.row.name.endswith(": guidance 1.5"))
    found = reasons_unlike(job.bench, None, timing_on("NVIDIA A40", "autocast"))
    assert {*found} == {"seconds", "ftc", "clip_score"} and "batches of 16 (plain) and 4 (ours)" in found["seconds"]


def test_what_a_table_says_of_ftc_is_said_of_ftc():
    table = load_table("table5").model_copy(update={"apart": {"ftc": "by another formula"}})
    job = jobs_of(table, "coco", Path("runs"), Sources(), 5, table.columns)[0]
    found = reasons_unlike(job.bench, None, None)
    assert found["ftc"] == "by another formula" and found["fid"].startswith("of 5 prompts")


def test_what_is_said_of_the_emoji_world_is_of_its_protocol():
    table = load_table("table6")
    benches = [job.bench for job in jobs_of(table, "emoji", Path("runs"), Sources(), None, table.columns)]
    other = "another model, other measures. Its Fréchet distance is not an FID and R@5 is no CLIP-score; a row"
    assert other in other_world(benches)
    metrics = {"fid": ["inception-2015/clean"], "clip_score": ["hessel-b32"]}
    benches = [
        replace(bench, usual=bench.usual.model_copy(update={"metrics": metrics, "name": "mine"})) for bench in benches
    ]
    assert other_world(benches) == (
        "World emoji: another model; a row that begins with its name was run with it in the place of the paper's, at "
        "the guidance of mine."
    )


def test_nothing_of_the_emoji_world_is_like_the_papers():
    table = load_table("table1")
    job = jobs_of(table, "emoji", Path("runs"), Sources(), None, table.columns)[0]
    assert {*reasons_unlike(job.bench, None, None)} == {*COLUMNS}


@pytest.mark.parametrize(
    "metrics, heads",
    [
        ({"fid": ["inception-2015/clean"], "clip_score": ["hessel-b32"]}, {}),
        ({"adm": ["inception-2015/tf1-bilinear"], "clip_score": ["hessel-b32", "cos100-g14"]}, {}),
        ({"clip_score": ["hessel-b32"]}, {}),
        (
            {"fid": ["dinov2/clean"], "clip_score": ["hessel-b32"]},
            {"fid": "Fréchet distance (dinov2)", "recall": "recall (dinov2)", "ftc": "distance × s / CLIP"},
        ),
        ({"fid": ["inception-2015/clean"], "clip_score": ["cos100-g14"]}, {"clip_score": "CLIP-score (cos100-g14)"}),
        (
            {"fid": ["efficientnet-lite0/torch-antialias"]},
            {
                "fid": "Fréchet distance (EfficientNet-lite0)",
                "clip_score": "concept retrieval R@5",
                "ftc": "distance × s / R@5",
            },
        ),
    ],
    ids=str,
)
def test_heads_say_what_is_measured(metrics, heads):
    found = table_row.heads(load_protocol("coco2017-10k").model_copy(update={"metrics": metrics}))
    assert bool(found) == bool(heads) and heads.items() <= found.items() and "gflops" not in found
