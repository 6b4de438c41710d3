"""The Python of the README and of docs/python.md runs, from another folder than the project's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.helpers.clip_vocabulary import lines
from tests.helpers.paths import ROOT
from tests.helpers.tiny_clip import TINY_TEXT, TINY_VISION


def blocks_of(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S)


def test_each_block_of_the_readme_runs_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, sampler, _ = blocks_of("README.md")
    exec(compile(first, "README.md, block 1", "exec"), {})
    assert Image.open("heart.png").size == (64, 64)
    names: dict[str, object] = {}
    exec(compile(sampler, "README.md, block 2", "exec"), names)
    assert names["images"].shape == (1, 3, 64, 64)


def test_the_measures_of_the_readme_run(tmp_path, monkeypatch):
    """On two prompts and two real images, with a CLIP of random weights."""
    from transformers import CLIPConfig, CLIPModel

    monkeypatch.chdir(tmp_path)
    block = blocks_of("README.md")[2]
    (tmp_path / "prompts.txt").write_text("a red heart, noto style\na green apple, twemoji style\n", encoding="utf-8")
    files = {
        name: f"models/ldm/emoji64/{file}" for name, file in (("config", "config.yaml"), ("ckpt", "model.safetensors"))
    }
    protocol = {
        "data": {"kind": "prompts", "file": "prompts.txt"},
        "size": 64,
        "guidance": 2.0,
        "defaults": {"data": str(tmp_path), **files},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(protocol), encoding="utf-8")
    real = tmp_path / "REAL_IMAGES"
    real.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(real / f"{i}.png")
    clip = tmp_path / "CLIP_FOLDER"
    CLIPModel(CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_VISION, projection_dim=8)).save_pretrained(clip)
    (clip / "merges.txt").write_text("\n".join(lines()), encoding="utf-8")
    for written, small in (
        ("emoji64-prompts", "two.yaml"),
        ('weights="CLIP_FOLDER"', 'variant="hessel", weights="CLIP_FOLDER"'),  # any CLIP, not that of the paper
        ("hessel-b32", "hessel"),
    ):
        assert written in block
        block = block.replace(written, small)
    names: dict[str, object] = {}
    exec(compile(block, "README.md, block 3", "exec"), names)
    assert len(list(Path("outputs/fast/samples").glob("*.png"))) == 2
    assert names["fid"].values["fid_real"] > 0 and 0 <= names["score"].values["clip_score_hessel"] <= 2.5


def test_the_code_blocks_run(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = blocks_of("docs/python.md")
    assert len(blocks) == text.count("```") // 2 == 8
    assert len(blocks[0].strip().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        block = block.replace('"models/', f'"{ROOT.as_posix()}/models/')  # paths of files are from the project
        exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
    assert Image.open("heart.png").size == (64, 64)
    assert names["pixels"].shape == (1, 3, 64, 64) and names["eps"].shape == (1, 24, 8, 8)
    made = [names[name][0] for name in ("plain", "published", "ours", "images", "green")]
    assert len({image.tobytes() for image in made}) == 5 and names["large"][0].size == (128, 128)
