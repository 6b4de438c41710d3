"""The paper's tables: the files, the GFLOPs, how a table is shown, and two rows made by the shipped model."""

from __future__ import annotations

import csv
import json
import multiprocessing.context
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evaluation import generate, tables
from evaluation.metrics.result import read_result
from evaluation.protocols.protocol import load_protocol
from evaluation.runs.models import files_of
from evaluation.table import row as table_row
from evaluation.table.cost import compare_timings, cost_values, gflops, read_timing, time_images, timed
from evaluation.table.row import Job, Sources, jobs_of
from evaluation.table.spec import (
    RenderedRow,
    RenderedTable,
    Row,
    Table,
    csv_text,
    latex,
    load_table,
    markdown,
    table_names,
)
from ldm.io.errors import SettingError
from tests.helpers.coco import write_coco
from tests.helpers.paths import ROOT
from tests.helpers.tiny_data import write_data

ALL = ("rdm", "table1", "table3", "table4", "table5", "table6", "table8", "table11", "table14", "table15")
IN_EMOJI = tuple(name for name in ALL if name not in ("rdm", "table15"))
NUMBERS = {name: {row.name: row.paper for row in load_table(name).rows} for name in ALL}


def refused(capfd, argv: list[str]) -> str:
    assert tables.main(argv) == 2
    output = capfd.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == "" and line.startswith("tables.py: error: ")
    return line.removeprefix("tables.py: error: ")


# The files


def test_every_table_is_there():
    assert table_names() == tuple(sorted(ALL, key=lambda name: (len(name), name)))
    counts = {name: len(NUMBERS[name]) for name in ALL}
    assert counts == {
        "rdm": 6,
        "table1": 14,
        "table3": 9,
        "table4": 14,
        "table5": 10,
        "table6": 3,
        "table8": 34,
        "table11": 12,
        "table14": 5,
        "table15": 2,
    }


def test_the_docs_repeat_what_the_files_say():
    files = [*(ROOT / "docs" / "tables").glob("*-emoji.md")]
    assert {file.stem.removesuffix("-emoji") for file in files} == {*IN_EMOJI}
    for file in files:
        table, shown = load_table(file.stem.removesuffix("-emoji")), file.read_text(encoding="utf-8")
        parts = shown.rstrip().split("\n\n")
        rendered = RenderedTable(table, "emoji", table.columns, [])
        assert {*rendered.all_notes()} <= {*parts} and parts[0] == f"### {rendered.title}"
        lines = [line.removeprefix("| ").split(" | ", 1) for line in parts[1].splitlines()[2:]]
        names = [
            RenderedRow(row, model="" if row.missing or rest.endswith("| not run |") else "emoji64").name
            for row, (_, rest) in zip(table.rows_in("emoji"), lines, strict=True)
        ]
        assert [name for name, _ in lines] == names


@pytest.mark.parametrize(
    "table, row, numbers",
    [
        ("table1", "DeepFloyd-IF: DDPM 225 + ours", [23.73, 0.782, 626523, 25.61, 26.27]),
        ("table1", "SD v1.5: DDIM + ToMe", [22.32, 0.782, 35123, 2.07, 2.26]),
        ("table3", "DiT-XL/2 512: DDPM 250 + ours", [3.25, 5.05, 245.13, 0.83, 0.51, 17.35]),
        ("table3", "LDM cin256-v2: guidance 6 + ours", [4.09, 5.99, 207.49, 0.848, 0.482, 3.373]),
        ("table4", "ControlNet (scribble): + ours", [16.42, 0.775, 35990, 1.83, 1.93, 4.45]),
        ("table4", "VideoFusion: plain", [0.700, 224700, 16.71 / 16, 17.93 / 16, 11.87]),
        ("table5", "non-uniform II (9)", [35.25, 0.742, 27350, 1.25, 1.42, 67.4]),
        ("table6", "propagation without z_T", [21.71, 0.779]),
        ("table8", "ControlNet (edges): parallel", [1.52, 5.09]),
        ("rdm", "RDM: ImageNet, database OpenImages", [12.28, 0.69, 0.55]),
        ("rdm", "RARM: ImageNet-Dogs", [45.27, 0.64, 0.55]),
        ("table8", "VideoFusion: serial", [12.27 / 16, 11.98]),
        ("table11", "DDIM: 9 steps with z_T", [27.63, 0.736]),
        ("table14", "encoder and decoder dropped", [199.48, 0.679]),
        ("table15", "ours", [0.162, 52.1]),
    ],
)
def test_the_papers_numbers(table, row, numbers):
    assert list(NUMBERS[table][row].values()) == numbers


def test_numbers_of_several_tables_agree():
    plain, ours = (NUMBERS["table1"][f"SD v1.5: {name}"] for name in ("DDIM", "DDIM + ours"))
    pairs = {
        "table5": ("plain", "non-uniform IV (9), the paper's"),
        "table6": ("plain", "propagation with z_T"),
        "table11": ("DDIM: 50 steps", "DDIM: 50 steps + ours"),
        "table14": ("nothing (plain)", "encoder (the paper's)"),
        "table8": ("SD v1.5 DDIM-50: plain", "SD v1.5 DDIM-50: parallel"),
    }
    for table, names in pairs.items():
        for name, expected in zip(names, (plain, ours), strict=True):
            shared = NUMBERS[table][name].keys() & expected.keys()
            assert shared and {key: NUMBERS[table][name][key] for key in shared} == {
                key: expected[key] for key in shared
            }
    for name, row in NUMBERS["table4"].items():
        group, _, label = name.rpartition(": ")
        both = [f"{group}: {other}" for other in ({"plain": ["plain"]}.get(label, ["parallel", "serial"]))]
        if found := [NUMBERS["table8"][other] for other in both if other in NUMBERS["table8"]]:
            assert found[0] == {key: row[key] for key in ("seconds", "memory")}
    for row in filter(None, NUMBERS["table5"].values()):
        assert row["fid"] * row["seconds"] / row["clip_score"] == pytest.approx(row["ftc"], abs=0.3)


def test_rows_are_compared_with_the_plain_row_of_their_group():
    table = load_table("table3")
    rendered = RenderedTable(table, "coco", ("fid",), [RenderedRow(row) for row in table.rows])
    found = {row.name: plain and plain.name for row in rendered.rows if (plain := rendered.plain_of(row))}
    assert found == {
        "DiT-XL/2 256: DDPM 250 + ours": "DiT-XL/2 256: DDPM 250",
        "DiT-XL/2 512: DDPM 250 + ours": "DiT-XL/2 512: DDPM 250",
        "LDM cin256-v2: guidance 1.5 + ours (not in the fork)": "LDM cin256-v2: guidance 1.5",
        "LDM cin256-v2: guidance 6 + ours": "LDM cin256-v2: guidance 6 (not in the fork)",
    }


# GFLOPs


def test_gflops_of_stable_diffusion_are_the_papers():
    rows = [row for row in load_table("table1").rows if row.group == "SD v1.5" and not row.tome]
    protocol = load_protocol("coco2017-10k")
    for row in rows:
        found, missing = gflops(protocol, row, files_of(protocol, *protocol.model()))
        assert (found, missing) == (pytest.approx(row.paper["gflops"], rel=1e-3), "")
    assert len(rows) == 6


def test_gflops_of_deepfloyd_if_are_those_of_the_stages_that_are_described(tmp_path, capsys):
    """The counts of docs/deepfloyd-if.md; nothing describes stage 2 here."""
    assert tables.main(["table1", "--world", "coco", "--gflops-only", "--runs", str(tmp_path)]) == 0
    with (tmp_path / "table1-coco-gflops.csv").open(encoding="utf-8", newline="") as lines:
        found = [row for row in csv.DictReader(lines) if row["row"].startswith("DeepFloyd-IF")]
    assert [round(float(row["gflops"])) for row in found] == [623461, 486746, 296672, 230238]
    assert capsys.readouterr().out.count("needs IF-I-XL-v1.0; GFLOPs without stage 2, which is not here |") == 4


def test_gflops_of_other_networks(tmp_path):
    """The counts of docs/text2video.md, docs/controlnet.md and docs/dit.md. DiT's are 118.6 and 524.6 a prediction with
    both products of attention, of which the second is left out here."""
    found = {}
    for name in ("table3", "table4"):
        assert tables.main([name, "--world", "coco", "--gflops-only", "--runs", str(tmp_path)]) == 0
        with (tmp_path / f"{name}-coco-gflops.csv").open(encoding="utf-8", newline="") as lines:
            found |= {row["row"]: float(row["gflops"]) for row in csv.DictReader(lines) if row["gflops"]}
    attention = {"256": 28 * 256**2 * 1152 / 1e9, "512": 28 * 1024**2 * 1152 / 1e9}
    assert found["DiT-XL/2 256: DDPM 250"] / 500 == pytest.approx(118.6 - attention["256"], rel=2e-3)
    assert found["DiT-XL/2 512: DDPM 250"] / 500 == pytest.approx(524.6 - attention["512"], rel=2e-3)
    counted = {
        "DiT-XL/2 256: DDPM 250 + ours": 37762,
        "DiT-XL/2 512: DDPM 250 + ours": 159038,
        "Text2Video-zero: plain": 36034,
        "Text2Video-zero: + ours": 36034 - 8987,
        "VideoFusion: plain": 240973,
        "VideoFusion: + ours": 166181,
        "ControlNet (edges): plain": 49970,
        "ControlNet (edges): + ours": 29682,
        "ControlNet (scribble): plain": 49970,
        "ControlNet (scribble): + ours": 29682,
    }
    assert {name: round(found[name]) for name in counted} == counted


def test_every_row_that_can_be_run_is_counted(tmp_path, capfd):
    """With the plans that a calibration of the model makes, under control and beside a LoRA."""
    for name in ("table1", "table3", "table4", "table5"):
        assert tables.main([name, "--world", "emoji", "--gflops-only", "--runs", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "| emoji64: calibrated (9), held | 17.2 |" in out
    rows = ("(paper: Text2Video-zero)", 21.7, 17.0), ("(paper: ControlNet (edges))", 33.5, 19.2)
    for group, plain, ours in rows:
        assert f"| emoji64 {group}: plain | {plain} |" in out and f"| emoji64 {group}: + ours | {ours} |" in out
    assert "| emoji64: LoRA (not in the paper) | 22.3 |" in out and "| emoji64: LoRA + ours | 17.2 |" in out


def test_gflops_only_needs_no_weights(tmp_path, capfd):
    assert tables.main(["table4", "--world", "coco", "--gflops-only", "--runs", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "| DreamBooth: + ours | 27356.5 | 27350 | +0.02% | an SD v1.5 with other weights; " in out
    assert "| ControlNet (edges): plain | 49970.2 | 49500 | +0.95% | not run: needs control_sd15_canny.pth |" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"table4-coco-gflops.{x}" for x in ("csv", "md", "tex")]


@pytest.mark.parametrize("flag", ["--gflops-only", "--show"])
def test_rows_to_make_are_refused_where_none_is_made(flag, tmp_path, capfd):
    assert tables.main(["table4", "--world", "coco", flag, "--rows", "1,2", "--runs", str(tmp_path)]) == 2
    assert "--rows: they say which rows are made" in capfd.readouterr().err


def test_a_table_that_cant_be_run_has_the_published_numbers(tmp_path, capfd):
    assert tables.main(["rdm", "--world", "coco", "--runs", str(tmp_path)]) == 0
    paper = "| RDM: ImageNet, database ImageNet |  | 5.32 |  |  | 0.740 |  |  | 0.510 |  |"
    row = f"{paper} GFLOPs |  |  | not run: no weights here |"
    assert re.search(re.escape(row).replace("GFLOPs", r"\d+\.\d"), capfd.readouterr().out)


def test_a_row_that_the_paper_does_not_have_is_run_where_its_model_is_there(tmp_path):
    table, sources = load_table("table1"), table_row.Sources()
    jobs = table_row.jobs_of(table, "coco", tmp_path, sources, None, table.columns)
    by_name = {job.row.name: job for job in jobs}
    own, papers = by_name["SDXL (not in the paper): Euler 50"], by_name["SD v1.5: DDIM"]
    assert own.missing == "not run: no weights here" and papers.missing is None, "the paper's are asked for"
    there = replace(own.bench.model, ckpt=ROOT / "models/ldm/emoji64/model.safetensors")
    assert replace(own, bench=replace(own.bench, model=there)).missing is None


# How a table is shown


def sheet(world: str) -> RenderedTable:
    table = load_table("table6")
    plain, without, injected = table.rows
    rows = [
        RenderedRow(plain, {"fid": (20.0, [19.5, 20.5]), "clip_score": (0.75, None)}),
        RenderedRow(without, {"fid": (21.5, None)}),
        RenderedRow(injected, remark="not supported: 100 % & more"),
    ]
    heads = table_row.heads(load_protocol(table.protocol[world]))
    return RenderedTable(table, world, table.columns, rows, ["A note."], heads)


def test_markdown():
    lines = markdown(sheet("coco")).splitlines()
    assert lines[0] == "### Prior noise injection (Table 6), coco"
    assert lines[2:6] == [
        "| row | FID | paper | difference | CLIP-score | paper | difference | remark |",
        "|" + " --- |" * 8,
        "| plain | 20.00 (19.50 to 20.50) | 21.75 | -1.75 | 0.750 | 0.773 | -0.023 |  |",
        "| propagation without z_T | 21.50 | 21.71 | -0.21 |  | 0.779 |  |  |",
    ]
    assert "| propagation without z_T | +1.50 | -0.04 |  | +0.006 |" in lines
    assert lines[-1] == "A note." and all(line.count("|") in (0, 6, 9) for line in lines)


def test_another_model_is_not_set_against_the_papers_numbers():
    text = markdown(sheet("emoji"))
    assert "difference" not in text and "concept retrieval R@5 | paper (CLIP-score)" in text
    assert "| propagation without z_T | +1.50 | -0.04 |" in text


def test_a_run_of_main_is_a_model(tmp_path):
    (tmp_path / "last.ckpt").touch()
    run = str(tmp_path)
    sources = Sources(config=run, ckpt=run)
    jobs = jobs_of(load_table("table1"), "emoji", tmp_path / "runs", sources, 2, ["fid"])
    assert {(job.bench.model.config, job.bench.model.ckpt) for job in jobs} == {
        (tmp_path / "config.yaml", tmp_path / "last.ckpt")
    }


def test_a_row_of_another_model_names_it():
    plain, *_ = load_table("table1").rows
    assert RenderedRow(plain, model="emoji64").name == "emoji64 (paper: SD v1.5): DDIM"
    assert RenderedRow(plain).name == "SD v1.5: DDIM"
    assert RenderedRow(load_table("table6").rows[0], model="emoji64").name == "emoji64: plain"


def test_csv():
    first, second, third = csv.DictReader(csv_text(sheet("coco")).splitlines())
    assert [first[key] for key in ("fid", "fid_low", "fid_high", "fid_paper", "compared_with")] == [
        "20.0",
        "19.5",
        "20.5",
        "21.75",
        "",
    ]
    assert float(first["fid_difference"]) == -1.75 and second["compared_with"] == "plain"
    assert (third["fid"], third["fid_paper"], third["remark"]) == ("", "21.08", "not supported: 100 % & more")


def test_what_would_break_a_format_is_escaped():
    table = Table(
        name="t",
        title="A\ntitle",
        source="from\nthere",
        columns=["fid"],
        protocol={"coco": "coco2017-10k"},
        rows=[Row(label="a|b\nc", plain=True, missing="no\n\nsuch | model"), Row(label="[*", missing="x")],
        note="one\ntwo",
    )
    made = RenderedTable(
        table, "coco", ["fid"], [RenderedRow(row, remark=row.missing) for row in table.rows], ["three\n% four"]
    )
    text = markdown(made)
    assert text.startswith("### A title, coco\n\n") and "\n| a\\|b c |  |  |  | no such \\| model |\n" in text
    assert text.endswith("The paper's numbers: from there.\n\none two\n\nthree % four\n")
    lines = latex(made).splitlines()
    assert r"a\textbar{}b c &  &  &  & no such \textbar{} model \\" in lines and lines[0] == "% A title, coco"
    assert lines[-3:] == ["% The paper's numbers: from there.", "% one two", "% three % four"]
    assert r"{[}{*} &  &  &  & x \\" in lines
    row = next(csv.DictReader(csv_text(made).splitlines(keepends=True)))
    assert (row["row"], row["remark"]) == ("a|b\nc", "no\n\nsuch | model")


def test_latex():
    text = latex(sheet("coco"))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"propagation without z\_T & 21.50 & 21.71" in text and r"not supported: 100 \% \& more \\" in text
    for line in text.splitlines():
        assert line.count("&") - line.count(r"\&") in (0, 4, 7), line


# Two rows, end to end


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[list[str], str]:
    """The command that made a table of two rows that run and one that can't, and what it printed."""
    folder = tmp_path_factory.mktemp("tables")
    file = folder / "two.yaml"
    how = {"sampler": "ddim", "steps": 4}
    file.write_text(
        yaml.safe_dump(
            {
                "title": "Two",
                "source": "nowhere",
                "columns": ["fid", "clip_score", "gflops"],
                "protocol": {"emoji": "emoji64"},
                "rows": [
                    {"label": "plain", "plain": True, **how, "plan": "off", "paper": {"gflops": 9}},
                    {"label": "ours", **how, "plan": "0,2", "parallel": 1},
                    {"label": "other", "missing": "no such model"},
                ],
            }
        )
    )
    (folder / "data").mkdir()
    write_data(folder / "data", side=64)
    argv = [
        str(file),
        "--world",
        "emoji",
        "--data",
        str(folder / "data"),
        "--runs",
        str(folder / "runs"),
        "--count",
        "2",
        "--device",
        "cpu",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_row, "RESAMPLES", 3)
        assert tables.main([*argv, "--timed", "0"]) == 0
    return argv, (folder / "runs" / "two-emoji-2.md").read_text()


def test_two_rows_of_the_shipped_model(made, capfd):
    argv, text = made
    plain, ours, other = text.splitlines()[4:7]
    distance, share = r"\d+\.\d\d \(-?\d+\.\d\d to \d+\.\d\d\)", r"\d\.\d{3} \(0\.\d{3} to \d\.\d{3}\)"
    for name, line in (("plain", plain), ("ours", ours)):
        assert re.match(rf"\| emoji64: {name} \| {distance} \|  \| {share} \|  \| \d", line)
    assert other.endswith("| no such model |") and (
        "R@5, efficientnet-lite0, torch-antialias: N = 2 images of emoji64/model" in text
    )
    runs = [path.parent for path in sorted((Path(argv[6]) / "emoji64-2").rglob("manifest.jsonl"))]
    assert [path.name[:-9] for path in runs] == ["ddim_4_0,2", "ddim_4_off"]
    (file,) = runs[0].glob("retrieval-*.json")
    result = json.loads(file.read_text())
    assert result["protocol"]["n"] == 2 and result["samples"]["plan"] == "0,2"
    # MACs of an emoji64 prediction are as the timed runs count them: 2 of 4 encoders are saved.
    whole, fast = (float(line.split("|")[6]) for line in (plain, ours))
    assert 0.8 < fast / whole < 0.9


def test_what_is_done_is_not_made_again(made, capfd):
    argv, text = made
    before = {path: path.stat().st_mtime_ns for path in (Path(argv[6]) / "emoji64-2").rglob("*")}
    assert tables.main([*argv, "--timed", "0"]) == tables.main([*argv, "--show"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert capfd.readouterr().out.count(text) == 2


def test_results_of_different_protocols_are_refused(made, capfd):
    argv, _ = made
    (path,) = (Path(argv[6]) / "emoji64-2").glob("ddim_4_off-*/fid-*.json")
    kept, found = path.read_text(), read_result(path)
    replace(found, protocol={**found.protocol, "n": 3}).write(path)
    line = refused(capfd, [*argv, "--show"])
    path.write_text(kept)
    assert line.startswith("--runs: different protocols can't be compared") and "n (plain: 3, ours: 2)" in line


def tiny_job(made, row: Row) -> Job:
    """A row beside those of the table that was made."""
    argv, _ = made
    table = Table(name="t", title="t", source="s", columns=["seconds"], protocol={"emoji": "emoji64"}, rows=[row])
    sources = Sources(data=argv[4], device="cpu")
    (job,) = jobs_of(table, "emoji", Path(argv[6]), sources, 2, table.columns)
    return job


def test_images_are_timed_one_by_one(made, tmp_path):
    job = tiny_job(made, Row(label="a", steps=2, plan="0", parallel=1))
    found = time_images(job.request, "cpu", 2)
    assert len(found.seconds) == 2 and all(0 < u < s for u, s in zip(found.seconds_unet, found.seconds, strict=True))
    assert found.parallel == 1 and isinstance(found.memory, int) and not job.folder.exists()
    assert cost_values(found.model_copy(update={"seconds": [3.0, 1.0, 2.0]}))["seconds"] == 2.0
    kept = tmp_path / "cost.json"
    assert read_timing(kept) is None
    assert len(timed(job.request, "cpu", 2, kept).seconds) == len(read_timing(kept).seconds) == 2

    compare_timings({"plain": found, "ours": found})
    with pytest.raises(SettingError, match=r"rows were timed with different threads \(plain: \d+, ours: 64\)"):
        compare_timings({"plain": found, "ours": found.model_copy(update={"threads": 64})})


# Bad input


@pytest.mark.parametrize(
    "how, why",
    [
        ({"plan": "nope"}, "plan: unknown plan 'nope'; accepted: "),
        ({"steps": 5000}, "steps: steps must be 1..1000, "),
        ({"plan": "0,4"}, "plan: key 4 is past the last node 3"),
        ({"sampler": "nope"}, "sampler: there is no solver 'nope'; accepted: ddim, "),
        ({"sampler": "dpm-solver", "eta": 0.5}, "eta: dpm-solver has no choice of it; "),
        ({"plan": "auto:2"}, "plan: auto plans need a calibration of this model for ddim with 4 nodes"),
        ({"plan": "deepcache:2:9"}, "plan: 9 blocks are to run anew; this network has 6 on each side"),
        ({"plan": "deepcache:2", "propagate": "zeros"}, "propagate: zeros can stand for the encoder's features only"),
    ],
    ids=str,
)
def test_a_row_that_cant_be_run_is_named_before_any_is_made(made, tmp_path, capfd, how, why):
    file, runs = tmp_path / "t.yaml", tmp_path / "runs"
    rows = [{"label": "good", "steps": 4}, {"label": "bad", "steps": 4, **how}]
    file.write_text(
        yaml.safe_dump(
            {"title": "t", "source": "s", "columns": ["fid", "gflops"], "rows": rows, "protocol": {"emoji": "emoji64"}}
        )
    )
    for more in (["--timed", "0"], ["--gflops-only"]):
        argv = [str(file), *made[0][1:5], "--runs", str(runs), "--count", "2", "--device", "cpu", *more]
        assert refused(capfd, argv).startswith(f"TABLE: bad: {why}") and not runs.exists()


def test_a_timing_that_is_killed_is_one_line(made, tmp_path, monkeypatch):
    process = multiprocessing.context.SpawnProcess
    start = process.start

    def start_and_kill(self) -> None:
        start(self)
        self.kill()

    monkeypatch.setattr(process, "start", start_and_kill)
    with pytest.raises(SettingError, match=r"^timed: the process that timed images for .*cost\.json was killed, as "):
        timed(tiny_job(made, Row(label="a", steps=2)).request, "cpu", 1, tmp_path / "cost.json")
    assert not [*tmp_path.iterdir()]


def test_files_are_called_as_table_world_and_count_say(tmp_path):
    file = tmp_path / "my.v2.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "source": "s",
                "columns": ["gflops"],
                "rows": [{"label": "a", "steps": 4}],
                "protocol": dict.fromkeys(("coco", "emoji"), "emoji64"),
            }
        )
    )
    for world, more in (("coco", []), ("emoji", []), ("emoji", ["--count", "3"])):
        runs = str(tmp_path / "runs")
        assert tables.main([str(file), "--world", world, "--gflops-only", "--runs", runs, *more]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        f"my.v2-{stem}-gflops.{x}" for stem in ("coco", "emoji", "emoji-3") for x in ("csv", "md", "tex")
    }


def test_a_row_that_cant_be_run_does_not_hide_what_others_have(made, tmp_path, capfd):
    argv, _ = made
    file, how = tmp_path / "t.yaml", {"sampler": "ddim", "steps": 4}
    file.write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "source": "s",
                "columns": ["fid", "gflops"],
                "protocol": {"emoji": "emoji64"},
                "rows": [{"label": "good", **how, "plan": "off"}, {"label": "bad", **how, "plan": "auto:2"}],
            }
        )
    )
    for more in (["--show"], ["--rows", "1", "--timed", "0"]):
        assert tables.main([str(file), *argv[1:], *more]) == 0
        good, bad = capfd.readouterr().out.splitlines()[4:6]
        assert re.match(r"\| emoji64: good \| \d+\.\d\d \(.*\) \|  \| \d+\.\d \|  \|  \|$", good)
        assert bad.startswith("| bad |  |  |  |  | bad: plan: auto plans need a calibration of this model")


def test_a_plan_that_decides_on_the_way_says_why_it_has_no_gflops(tmp_path, capfd):
    file = tmp_path / "t.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "source": "s",
                "columns": ["gflops"],
                "rows": [
                    {"label": "plain", "steps": 4},
                    {"label": "online", "steps": 4, "plan": "online:0.1", "propagate": "linear"},
                ],
                "protocol": {"emoji": "emoji64"},
            }
        )
    )
    assert tables.main([str(file), "--world", "emoji", "--gflops-only", "--runs", str(tmp_path / "runs")]) == 0
    why = "online:0.1 decides during a run: its GFLOPs are not known before"
    assert f"\n| online |  |  | {why} |\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    "argv, why",
    [
        (["table2", "--world", "emoji"], "TABLE: unknown table 'table2'; accepted: rdm, table1, table3, table4, "),
        (["table1"], "the following arguments are required: --world"),
        (["table1", "--world", "moon"], "--world: invalid"),
        (
            ["table6", "--world", "emoji", "--gflops-only"],
            "--gflops-only: table6 has no GFLOPs; it has fid, clip_score",
        ),
        (["table1", "--world", "emoji", "--rows", "²"], "--rows: expected row numbers from 1"),
        (["table1", "--world", "emoji", "--rows", "0"], "--rows: expected row numbers from 1"),
        (["table1", "--world", "emoji", "--rows", "13"], "--rows: table1 has 8 rows in the emoji world; got 13"),
        (["table1", "--world", "coco", "--ckpt", "gone"], "--ckpt: gone: no such file; --gflops"),
        (["table15", "--world", "emoji"], "--world: table15 is not in the emoji world"),
        (
            ["table6", "--world", "emoji", "--show", "--data", "gone"],
            "TABLE: no row of table6 is finished in .*: data: .*gone/captions.json is not there, which emoji64 needs: ",
        ),
    ],
    ids=" ".join,
)
def test_bad_arguments(tmp_path, capfd, argv, why):
    assert re.match(why, refused(capfd, [*argv, "--runs", str(tmp_path / "runs")]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "column, why",
    [
        ("fid", "needs fid or adm, which say the network of Fréchet distances"),
        ("clip_score", "needs clip_score, or data with images in which concepts can be found"),
    ],
)
def test_a_protocol_that_can_not_be_judged_is_refused_before_the_work(tmp_path, capfd, column, why):
    file = tmp_path / "t.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "title": "t",
                "source": "s",
                "columns": [column],
                "rows": [{"label": "a"}],
                "protocol": {"emoji": "emoji64-prompts"},
            }
        )
    )
    line = refused(capfd, [str(file), "--world", "emoji", "--runs", str(tmp_path / "runs"), "--count", "1"])
    assert line == f"TABLE: protocol emoji64-prompts: metrics: {why}" and not (tmp_path / "runs").exists()


def test_what_the_papers_data_need(tmp_path, capfd):
    """Each file in turn, with how to get it, before anything is made."""
    runs, ckpt = ["--runs", str(tmp_path / "runs")], tmp_path / "model.safetensors"
    usual = refused(capfd, ["table1", "--world", "coco", *runs])
    assert re.match(
        r"--ckpt: .*v1-5-pruned-emaonly.safetensors: no such file; python scripts/download_models.py "
        r"sd-v1-5 fetches it; --gflops-only needs no weights",
        usual,
    )
    ckpt.write_bytes(b"")
    coco = tmp_path / "coco"
    argv = ["table1", "--world", "coco", *runs, "--ckpt", str(ckpt), "--data", str(coco)]
    assert re.match(
        r"--data: .*/annotations/captions_val2017.json is not there, which coco2017-10k needs: "
        r"annotations_trainval2017.zip of https://cocodataset.org/#download",
        refused(capfd, argv),
    )
    write_coco(coco)
    (coco / "val2017").rename(coco / "elsewhere")
    assert re.match(r"--data: .*/val2017 is not there, .*: val2017.zip of https", refused(capfd, argv))
    (coco / "elsewhere").rename(coco / "val2017")
    assert refused(capfd, [*argv, "--inception", str(tmp_path / "gone.pth")]).startswith("--inception: ")
    line = refused(capfd, ["table3", "--world", "coco", *runs, "--ckpt", str(ckpt), "--data", str(coco)])
    assert re.match(r"--data: .*/VIRTUAL_imagenet256_labeled.npz is not there, .*guided-diffusion", line)
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Sources:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, side=64)
    return Sources(data=str(folder))


def test_rows_share_a_folder_only_if_their_images_are_the_same(emoji):
    folders: dict[Path, set[tuple]] = {}
    for name in IN_EMOJI:
        table = load_table(name)
        assert table.rows_in("emoji")
        for job in jobs_of(table, "emoji", Path("runs"), emoji, 2, table.columns):
            if not job.missing:
                folders.setdefault(job.folder, set()).add(tuple(job.row.flags()))
    assert all(len(settings) == 1 for settings in folders.values()) and len(folders) > 20
    names = {folder.name[:-9] for folder in folders}
    assert {"ddim_50_off_tome-0.5", "dpm-solver++-published_20_off"} <= names
    assert Path("runs/emoji64-2") in {folder.parent for folder in folders}


def test_the_command_of_a_row_makes_its_images(emoji):
    job = replace(
        jobs_of(load_table("table6"), "emoji", Path("my runs"), emoji, 2, ["fid"])[0],
        row=Row(label="a", noise_below=-1e-7, eta=0, steps=3, plan="a b.yaml"),
    )
    method = job.row.method(job.bench.protocol)
    assert (method.noise_below, method.eta, method.steps, method.sampler) == (-1e-7, 0.0, 3, "ddim")
    job.__dict__["folder"] = Path("my runs/a")
    python, script, *argv = shlex.split(job.command())
    assert (python, script) == ("python", "evaluation/generate.py")
    args = generate.parser().parse_args(argv)
    assert generate.asked(args) == (job.bench.protocol, method)
    assert (args.out, args.data) == ("my runs/a", emoji.data)


def test_data_are_where_the_measures_look_for_them():
    table = load_table("table3")
    jobs = jobs_of(table, "coco", Path("runs"), Sources(), None, table.columns)
    assert any("data" not in job.bench.protocol.defaults for job in jobs)
    assert all(job.bench.data == job.bench.protocol.folder() for job in jobs)


def test_a_file_in_the_place_of_runs(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert tables.main(["table8", "--world", "emoji", "--rows", "1", "--runs", str(tmp_path / "file")]) == 2
    assert capfd.readouterr().err == f"tables.py: error: --runs: {tmp_path / 'file'} is a file; expected a directory\n"


def test_plans_of_one_name_have_folders_of_their_own(emoji, tmp_path):
    (job, *_) = jobs_of(load_table("table6"), "emoji", tmp_path / "runs", emoji, 2, ["fid"])
    (tmp_path / "a").mkdir()
    files = [tmp_path / "a" / "b.yaml", tmp_path / "a-b.yaml"]
    for number, file in enumerate(files):
        file.write_text(yaml.safe_dump({"source": "here", "steps": {50: [0, number + 1]}}))
    plans = ("uniform-2", "uniform:2", *map(str, files))
    folders = {plan: replace(job, row=Row(label="a", plan=plan)).folder for plan in plans}
    assert len({*folders.values()}) == len(plans) and {folder.parent.name for folder in folders.values()} == {
        "emoji64-2"
    }
    files[0].write_text(files[1].read_text())  # an edited plan is another run
    assert replace(job, row=Row(label="a", plan=plans[2])).folder != folders[plans[2]]
