"""Files from outside are read with care; files are written whole or not at all, and into what stands there.

What a file holds is taken as it stands, or refused in one line that names the value.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from ldm.checkpoint import save_weights
from ldm.io.files import (
    MOST_DEPTH,
    UNFINISHED,
    AboveZero,
    Count,
    FileError,
    NotAFile,
    NotNegative,
    Number,
    Schema,
    Seed,
    Share,
    Text,
    add_line,
    appending,
    atomic_write,
    check_names,
    clean,
    file_sha256,
    parse,
    parse_json_lines,
    read_bytes,
    read_config,
    read_json,
    read_lines,
    read_text,
    read_yaml,
)
from tests.helpers.paths import ROOT

READERS: list[Callable[[Path], object]] = [
    read_bytes,
    read_text,
    read_lines,
    read_json,
    read_yaml,
    read_config,
    file_sha256,
]


def test_lines_end_where_editors_end_them(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\x0c\x1c\x85same\rthree\n\nfive".encode())
    assert read_lines(path) == ["one\u2028still one", "two\x0b\x0c\x1c\x85same", "three", "", "five"]


@pytest.mark.parametrize("content, lines", [("", []), ("\n", [""]), ("a", ["a"]), ("a\n", ["a"]), ("a\n\n", ["a", ""])])
def test_the_last_line_needs_no_end(tmp_path, content, lines):
    (tmp_path / "x").write_text(content)
    assert read_lines(tmp_path / "x") == lines


def test_a_byte_order_mark_is_no_part_of_the_value(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == read_yaml(path) == read_config(path) == {"a": 1}


@pytest.mark.parametrize("content", [b"caf\xe9", "café".encode("utf-16")])
def test_what_is_not_utf8_is_said(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileError, match="x: not UTF-8 text .byte 0x.. at [03]"):
        read_text(tmp_path / "x")


@pytest.mark.parametrize("read", READERS)
def test_only_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with pytest.raises(NotAFile, match="fifo: a FIFO; expected a file$"):
        read(tmp_path / "fifo")
    with pytest.raises(NotAFile, match="link: a FIFO"):
        read(tmp_path / "link")
    error = pickle.loads(pickle.dumps(NotAFile(tmp_path / "fifo", "a FIFO")))  # as from another process
    assert isinstance(error, NotAFile) and str(error).endswith("fifo: a FIFO; expected a file")
    with pytest.raises(NotAFile, match="a folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("read", [read_json, read_yaml, read_config])
@pytest.mark.parametrize("depth", [MOST_DEPTH + 2, 100_000])
def test_what_is_nested_too_deep_is_said_in_a_line(tmp_path, read, depth):
    path = tmp_path / "deep"
    path.write_text('{"a":' * depth + "1" + "}" * depth if read is read_json else "[" * depth + "]" * depth)
    with pytest.raises(FileError, match="deep: .*nested deeper") as error:
        read(path)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_what_is_nested_less_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_text("[" * MOST_DEPTH + "]" * MOST_DEPTH)
    assert read_json(path) == read_yaml(path)


@pytest.mark.parametrize("read", [read_yaml, read_config])
def test_references_can_not_multiply_without_end(tmp_path, read):
    path = tmp_path / "x"
    path.write_text(
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 20))
    )
    with pytest.raises(FileError, match="more than [0-9]+ values"):
        read(path)


@pytest.mark.parametrize(
    "content, why", [("{", "line 1, column 2: not JSON"), ("9" * 5000, "not JSON"), ('["\\ud800"]', "lone surrogate")]
)
def test_json_that_can_not_be_used_is_said(tmp_path, content, why):
    (tmp_path / "x").write_text(content)
    with pytest.raises(FileError, match=f"x: .*{why}"):
        read_json(tmp_path / "x")


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "x").write_text('"\\ud83d\\ude00"')
    assert read_json(tmp_path / "x") == "😀"


def test_json_lines_keep_their_numbers_and_separators():
    text = '{"a": "x\u2028y"}\n\n{"a": 2}\n'
    assert parse_json_lines(text) == [(0, {"a": "x\u2028y"}), (2, {"a": 2})]
    with pytest.raises(FileError, match="line 2, column 2: not JSON"):
        parse_json_lines("1\n{\n")


# Writing


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/target").write_text("old")
    for name, target in (("link", "there/target"), ("second", "link"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
    for name in ("second", "dangling"):
        with atomic_write(tmp_path / name) as temporary:
            temporary.write_text(name)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "there/target").read_text() == "second"
    assert (tmp_path / "there/new").read_text() == "dangling"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"), atomic_write(tmp_path / "loop"):
        pass
    assert (tmp_path / "loop").is_symlink()


def test_a_fifo_gets_the_bytes_and_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="No such device"), atomic_write(fifo):  # nobody reads: it does not wait
        pass
    reader, got = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), []
    os.set_blocking(reader, True)
    content = b"x" * 1_000_000  # more than a pipe holds
    reading = threading.Thread(target=lambda: got.append(os.fdopen(reader, "rb").read()))
    with atomic_write(fifo) as temporary:
        reading.start()
        temporary.write_bytes(content)
    reading.join(10)
    assert got == [content]
    assert fifo.is_fifo()


def test_a_device_gets_the_bytes_and_stays(tmp_path):
    """A terminal of our own stands for devices."""
    leader, follower = os.openpty()
    device = Path(os.ttyname(follower))
    (tmp_path / "link").symlink_to(device)
    for path in (device, tmp_path / "link"):
        with atomic_write(path) as temporary:
            temporary.write_text("hello")
        assert os.read(leader, 100) == b"hello"
        assert device.is_char_device()
    os.close(leader)
    os.close(follower)


def test_a_folder_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(NotAFile, match="a folder; expected a file"), atomic_write(tmp_path):
        pytest.fail("the block ran")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "model.safetensors", {"a": torch.zeros(1)})  # made for its owner alone
        with atomic_write(tmp_path / "text") as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


HOLD = """
import sys
from ldm.io.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_is_cleaned_and_what_a_living_one_writes_is_not(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / f"{k}.txt"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for k in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"writing\n"
        assert len([*tmp_path.glob(f"{UNFINISHED}*")]) == 2
        writers[0].send_signal(signal.SIGKILL)
        writers[0].wait()
        (tmp_path / ".foreign").touch()
        with atomic_write(tmp_path / "own.txt") as temporary:
            temporary.write_text("whole")
            clean(tmp_path)
        assert len([*tmp_path.glob(f"{UNFINISHED}*")]) == 1
        writers[1].send_signal(signal.SIGKILL)
        writers[1].wait()
        clean(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".foreign", "own.txt"]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()


ADD = """
import sys
from ldm.io.files import add_line, appending
for k in range(200):
    with appending(sys.argv[1]) as stream:
        stream.seek(0)
        if (line := str(k).encode()) not in stream.read().split():
            add_line(stream, line)
"""


def test_two_processes_add_each_line_once(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"cut off")
    writers = [subprocess.Popen([sys.executable, "-c", ADD, path]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert path.read_text().split("\n") == ["cut off", *map(str, range(200)), ""]


def test_lines_are_added_to_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NotAFile, match="a FIFO"), appending(tmp_path / "fifo"):
        pass
    with appending(tmp_path / "new") as stream:
        add_line(stream, json.dumps({"a": 1}).encode())
    assert (tmp_path / "new").read_bytes() == b'{"a": 1}\n'


# The whole tree

READS = {  # what reads a file or text from outside, and where alone it may stand
    ("Image", "open"): {"ldm/io/images.py"},
    ("json", "load"): set(),
    ("json", "loads"): {"ldm/io/files.py"},
    ("yaml", "safe_load"): {"ldm/io/files.py"},
    ("OmegaConf", "load"): {"ldm/io/files.py"},
    ("np", "load"): {"ldm/data/emoji.py"},  # mapped into memory, after a look at what it is
    (None, "splitlines"): {
        "ldm/profiling/timing.py",
        "ldm/profiling/cost.py",  # of /proc
        "ldm/data/emoji_set/packages.py",
        "scripts/benchmark_images.py",
        "evaluation/plots/tasks.py",  # of what commands printed
    },
    (None, "read_text"): {"ldm/io/files.py", "ldm/profiling/timing.py", "ldm/profiling/cost.py"},
}


def test_what_comes_from_outside_is_read_in_one_place():
    root = ROOT
    files = [path for top in ("ldm", "evaluation", "scripts") for path in (root / top).rglob("*.py")]
    strays = []
    for path in files:
        name = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else None
                for key in ((owner, node.attr), (None, node.attr)):
                    if key in READS and name not in READS[key]:
                        strays.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert strays == []


class Part(Schema):
    name: Text = "a"
    kind: Literal["one", "two"] = "one"
    share: Share | None = None


class Whole(Schema):
    count: Count
    part: Part = Part()
    parts: list[Part] = []
    more: dict[str, Any] = {}


def test_a_file_becomes_a_schema():
    whole = parse(
        Whole, {"count": 3, "part": {"name": " b ", "share": 1}, "parts": [{"kind": "two"}], "more": {"x": 1}}
    )
    assert (whole.count, whole.part.name, whole.part.share, whole.parts[0].kind) == (3, "b", 1.0, "two")
    with pytest.raises(ValidationError, match="frozen"):
        whole.count = 4


@pytest.mark.parametrize(
    "change, why",
    [
        ({"count": "3"}, "f.count should be a valid integer; got '3'"),
        ({"count": True}, "f.count should be a valid integer; got True"),
        ({"count": 0}, "f.count should be greater than or equal to 1; got 0"),
        ({"count": 2**40}, f"f.count should be less than 4294967296; got {2**40}"),
        ({"part": 3}, "f.part should be a mapping; got 3"),
        ({"part": {"name": " "}}, "f.part.name should have at least 1 character; got ' '"),
        ({"part": {"name": False}}, "f.part.name should be a text: in YAML off, on, yes and no need quotes; got False"),
        ({"part": {"kind": "three"}}, "f.part.kind should be 'one' or 'two'; got 'three'"),
        ({"part": {"share": 1.5}}, "f.part.share should be less than or equal to 1; got 1.5"),
        ({"part": {"nane": "b"}}, "f.part has 'nane'; accepted: name, kind, share; did you mean name?"),
        ({"parts": [{}, {"kind": None}]}, "f.parts.1.kind should be 'one' or 'two'; got None"),
        ({"more": []}, "f.more should be a mapping; got []"),
        ({"x" * 5000: 1}, "f has 'xxx"),
        ({"count": "9" * 5000}, "f.count should be a valid integer; got '999"),
    ],
)
def test_the_first_fault_is_named_in_one_short_line(change, why):
    with pytest.raises(ValueError) as error:
        parse(Whole, {"count": 1} | change, "f")
    assert str(error.value).startswith(why) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="^count is missing$"):
        parse(Whole, {})
    with pytest.raises(ValueError, match=r"^it should be a mapping; got \[1\]$"):
        parse(Whole, [1])


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (Number, [0, -1.5, 1e300], [float("nan"), float("-inf"), True, "1", None]),
        (NotNegative, [0, 0.5], [-1e-9]),
        (AboveZero, [1e-9], [0]),
        (Share, [0, 1], [-0.1, 1.1]),
        (Seed, [0, 2**32 - 1], [-1, 2**32, 1.0]),
        (list[int], [[], [1]], [[True], [1.0], ["1"], (1,), "1"]),
    ],
)
def test_the_bounds_of_each_type(kind, good, bad):
    assert [parse(kind, value) for value in good] == good
    for value in bad:
        with pytest.raises(ValueError):
            parse(kind, value)


def test_names_may_be_checked_by_themselves():
    check_names(["a", "b"], ["b", "a", "c"])
    with pytest.raises(ValueError, match="^has '3', 'stepz'; accepted: steps, size$"):
        check_names(["stepz", 3, "size"], ["steps", "size"])
