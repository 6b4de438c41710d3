"""evaluation/tables.py in the coco world: from captions and real pictures to the printed table, with tiny networks."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from clip_vocabulary import lines
from coco import write_coco, write_protocol
from contracts import recipe_weights
from tiny_clip import TINY_TEXT, TINY_VISION
from txt2img_model import write_model

from evaluation import table_quality, tables
from evaluation.clip_models import load_clip
from evaluation.features import extractor
from evaluation.inception import Inception
from evaluation.resize import resize
from ldm.images import from_pil, open_picture

COLUMNS = ("fid", "clip_score", "gflops", "seconds", "ftc")
PAPER = {"fid": 20.5, "clip_score": 0.773, "gflops": 0.2, "seconds": 2.0, "ftc": 53.0}
RUNS = {"plain": "ddim_4_off", "ours": "ddim_4_0,2"}
COUNT, REAL = 3, 4


@dataclass(frozen=True)
class World:
    """A folder with data, networks, and a table with two rows that run; and what tables.py printed of it."""

    folder: Path
    printed: str = ""

    def argv(self, *more: str) -> list[str]:
        given = {"--inception": "inception.pth", "--clip": "clip", "--runs": "runs"}
        return [str(self.folder / "two.yaml"), "--world", "coco", "--device", "cpu",
                *(part for flag, name in given.items() for part in (flag, str(self.folder / name))), *more]

    def run(self, row: str) -> Path:
        return self.folder / "runs" / "tiny" / RUNS[row]

    def table(self) -> dict[str, list[str]]:
        """The printed cells of each row of the first part."""
        rows = (line.strip("| ").split(" | ") for line in self.printed.split("\n\n")[1].splitlines()[2:])
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
        folder / "tiny.yaml", select__count=COUNT, defaults={"config": str(config), "ckpt": str(ckpt),
                                                             "data": str(data)},
        metrics={"fid": ["inception-2015/clean"], "clip_score": ["hessel"]})
    how = {"sampler": "ddim", "steps": 4, "paper": PAPER}
    (folder / "two.yaml").write_text(yaml.safe_dump({
        "title": "Two", "source": "nowhere", "columns": [*COLUMNS], "protocol": {"coco": str(protocol)}, "rows": [
            {"label": "plain", "plain": True, **how, "plan": "off"}, {"label": "ours", **how, "plan": "0,2"},
            {"label": "other", "missing": "no such model", "paper": PAPER}]}))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    write_networks(folder)
    write_table(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_quality, "RESAMPLES", 2)
        assert tables.main(World(folder).argv("--timed", "1")) == 0
    return World(folder, (folder / "runs" / "two-coco.md").read_text(encoding="utf-8"))


def read(files: list[Path]) -> list[torch.Tensor]:
    return [from_pil(open_picture(file))[None] for file in sorted(files)]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Of few features (N, D), by their N x N products: the trace of (C1 C2)^1/2 is a nuclear norm."""
    around_a, around_b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    cross = np.linalg.norm(around_a @ around_b.T, "nuc")
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (around_a ** 2).sum() + (around_b ** 2).sum() - 2 * cross


@pytest.mark.parametrize("row", RUNS)
def test_values_are_those_of_the_rows_pictures(world, row):
    """FID against all real pictures; each picture with its own caption."""
    fid, clip = extractor("inception-2015", world.folder / "inception.pth", "clean"), load_clip(world.folder / "clip")
    entries = [json.loads(line) for line in (world.run(row) / "manifest.jsonl").read_text().splitlines()]
    made = read([world.run(row) / entry["file"] for entry in entries])
    real = read([*(world.folder / "coco" / "val2017").iterdir()])
    assert (len(made), len(real)) == (COUNT, REAL)
    features = [np.concatenate([fid(picture).numpy() for picture in pictures]).astype(np.float64)
                for pictures in (made, real)]
    found = world.csv()[row]
    assert float(found["fid"]) == pytest.approx(frechet(*features), rel=1e-4)
    captions = {entry["file"]: entry["prompt"] for entry in entries}
    seen = clip.see(torch.cat([resize(picture, clip.size, "clip-crop") for picture in made]))
    cosines = (seen * clip.read([f"A photo depicts {captions[name]}" for name in sorted(captions)])).sum(1)
    assert float(found["clip_score"]) == pytest.approx(2.5 * cosines.clamp(min=0).mean().item(), rel=1e-5)
    timing = json.loads((world.run(row) / "cost-auto.json").read_text())
    assert [float(found["seconds"])] == timing["seconds"]
    assert float(found["ftc"]) == pytest.approx(
        float(found["fid"]) * float(found["seconds"]) / float(found["clip_score"]))


def test_printed_is_what_was_found_beside_the_papers(world):
    plain, ours = (world.csv()[row] for row in RUNS)
    fid, low, high, gflops = (float(plain[name]) for name in ("fid", "fid_low", "fid_high", "gflops"))
    assert world.table()["plain"][:3] == [f"{fid:.2f} ({low:.2f} to {high:.2f})", "20.50", f"{fid - 20.5:+.2f}"]
    assert world.table()["plain"][6:9] == [f"{gflops:.1f}", "0.2", f"{gflops / 0.2 - 1:+.2%}"]
    assert float(plain["fid_difference"]) == pytest.approx(fid - 20.5)
    assert world.table()["other"] == [*(["", paper, ""][i] for paper in ("20.50", "0.773", "0.2", "2.00", "53.0")
                                        for i in range(3)), "no such model"]
    saved = float(ours["gflops"]) / gflops - 1
    assert f"| ours | {float(ours['fid']) - fid:+.2f} | +0.00 | " in world.printed and (
        f" | {saved:+.0%} | +0% | " in world.printed and -0.25 < saved < -0.1)
    assert f"fid, inception-2015, clean: N = {COUNT} pictures of " in world.printed


def test_files(world):
    files = {path.suffix: path.read_text(encoding="utf-8") for path in (world.folder / "runs").glob("two-coco.*")}
    assert {*files} == {".md", ".csv", ".tex"} and files[".tex"].count(r"\begin{tabular}") == 2
    assert [*world.csv()] == ["plain", "ours", "other"] and world.csv()["other"]["remark"] == "no such model"


def test_a_second_run_makes_nothing_anew(world, capfd):
    before = {path: path.stat().st_mtime_ns for path in (world.folder / "runs" / "tiny").rglob("*")}
    assert tables.main(world.argv("--timed", "1")) == tables.main(world.argv("--show")) == 0
    after = {path: path.stat().st_mtime_ns for path in (world.folder / "runs" / "tiny").rglob("*")}
    output = capfd.readouterr()
    assert after == before and output.err == "" and output.out.count(world.printed) == 2
