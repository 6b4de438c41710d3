"""Every code block of docs/python.md runs, in order, in one process and from another folder."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_code_blocks_run(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == text.count("```") // 2 == 7
    assert len(blocks[0].strip().splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        block = block.replace('"models/', f'"{ROOT.as_posix()}/models/')      # paths of files are from the project
        exec(compile(block, f"docs/python.md, block {number + 1}", "exec"), names)
    assert Image.open("heart.png").size == (64, 64)
    assert names["pixels"].shape == (1, 3, 64, 64) and names["eps"].shape == (1, 24, 8, 8)
    plain, published, ours, edited = (names[name][0].tobytes() for name in ("plain", "published", "ours", "images"))
    assert len({plain, published, ours, edited}) == 4
