"""The Python of the README and of docs/python.md runs, from another folder than the project's."""

from __future__ import annotations

import re

from PIL import Image

from tests.helpers.paths import ROOT


def blocks_of(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.S)


def test_each_block_of_the_readme_runs_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, sampler = blocks_of("README.md")
    exec(compile(first, "README.md, block 1", "exec"), {})
    assert Image.open("heart.png").size == (64, 64)
    names: dict[str, object] = {}
    exec(compile(sampler, "README.md, block 2", "exec"), names)
    assert names["images"].shape == (1, 3, 64, 64)


def test_the_code_blocks_run(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = blocks_of("docs/python.md")
    assert len(blocks) == text.count("```") // 2 == 7
    assert len(blocks[0].strip().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        block = block.replace('"models/', f'"{ROOT.as_posix()}/models/')  # paths of files are from the project
        exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
    assert Image.open("heart.png").size == (64, 64)
    assert names["pixels"].shape == (1, 3, 64, 64) and names["eps"].shape == (1, 24, 8, 8)
    plain, published, ours, edited = (names[name][0].tobytes() for name in ("plain", "published", "ours", "images"))
    assert len({plain, published, ours, edited}) == 4
