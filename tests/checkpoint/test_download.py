"""Downloads from a real HTTP server on this machine: ranges, broken transfers, wrong content, mirrors."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from ldm.checkpoint.download import DownloadError, fetch
from ldm.checkpoint.published import MANIFEST, ManifestError, Published, load_manifest
from ldm.io.files import alone
from tests.helpers.paths import ROOT
from tests.helpers.processes import Child
from tests.helpers.scripts import load_script


def weights(size: int, first: int = 0) -> bytes:
    """A safetensors file of so many bytes, the first of its numbers given."""
    header = json.dumps({"a": {"dtype": "U8", "shape": [size - 128], "data_offsets": [0, size - 128]}}).encode()
    data = bytes([first]) + (bytes(range(256)) * (size // 256 + 1))[1 : size - 128]
    return (120).to_bytes(8, "little") + header.ljust(120) + data


CONTENT = weights(1_024_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
main = load_script("download_models").main


@dataclass
class Site:
    """What a server does.

    files:   content by path.
    ranges:  answers to Range.
    breaks:  for each coming transfer, after how many bytes the connection is cut.
    asked:   the Range header of each request; if_range: its If-Range header.
    """

    files: dict[str, bytes]
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    etag: str = '"1"'
    type: str = "application/octet-stream"
    announce: bool = True
    headers: dict[str, str] = field(default_factory=dict)  # of every answer, instead of what is usual
    partial: dict[str, str] = field(default_factory=dict)  # of answers to Range
    statuses: list[int] = field(default_factory=list)  # of the coming answers, instead of content
    asked: list[str | None] = field(default_factory=list)
    if_range: list[str | None] = field(default_factory=list)
    address: str = ""


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            site.asked.append(wanted)
            site.if_range.append(self.headers["If-Range"])
            content = site.files.get(self.path.partition("?")[0])
            status = site.statuses.pop(0) if site.statuses else 200
            if content is None or status >= 400:
                self.send_error(404 if content is None else status)
                return
            # taken before the answer begins: the client may ask again while this thread is still sending
            stop = site.breaks.pop(0) if site.breaks else len(content)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            headers = {"Content-Type": site.type, "ETag": site.etag}
            if site.announce:
                headers["Content-Length"] = str(len(content) - start)
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_response(status if status != 200 else 206 if start else 200)
            for name, value in (headers | site.headers | (site.partial if start else {})).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(content[start : start + stop])
            except OSError:  # the client has seen enough
                pass

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site({"/model.ckpt": CONTENT})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(site))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "models" / "m" / "model.ckpt"


def parts(target: Path) -> list[Path]:
    return sorted(target.parent.glob("*.part"))


def test_a_file_comes_whole_and_alone(site, target):
    seen = []
    fetch(f"{site.address}/model.ckpt", target, SHA256, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == ["model.ckpt"]
    assert site.asked == [None] and seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_transfer_is_taken_up_where_it_stopped(site, target):
    site.breaks = [300_000, 0, 200_000]  # the first; the second looks only; then from 300,000 on
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT
    ranges = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in site.asked if asked]
    assert ranges == [300_000, 500_000]


def test_a_link_is_followed_and_what_is_no_file_is_left_alone(site, target, tmp_path):
    target.parent.mkdir(parents=True)
    target.symlink_to(tmp_path / "disk" / "real.ckpt")
    fetch(f"{site.address}/model.ckpt", target)
    assert target.is_symlink() and (tmp_path / "disk" / "real.ckpt").read_bytes() == CONTENT
    assert os.listdir(target.parent) == ["model.ckpt"] and os.listdir(tmp_path / "disk") == ["real.ckpt"]
    fifo = target.with_name("fifo")
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="a FIFO; expected a file"):
        fetch(f"{site.address}/model.ckpt", fifo)
    assert fifo.is_fifo()


def test_a_later_call_goes_on_with_what_is_there(site, target):
    site.breaks = [300_000] + [0] * 4
    with pytest.raises(DownloadError, match="broke off at 300000 of 1024000 bytes"):
        fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert not target.exists() and parts(target)[0].stat().st_size == 300_000
    site.breaks, site.asked = [], []
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT and site.asked == [None, "bytes=300000-"] and not parts(target)


def test_a_process_that_was_killed_leaves_what_it_had(site, target, tmp_path):
    site.files["/model.ckpt"] = weights(40_000_000)

    def work() -> None:
        fetch(f"{site.address}/model.ckpt", target, None, lambda done, total: done > 5e6 and os._exit(9))

    assert Child(work, tmp_path / "log").end() == 9 and not target.exists()
    have = parts(target)[0].stat().st_size
    assert have > 4e6
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == weights(40_000_000) and site.asked[-1] == f"bytes={have}-"


def test_a_server_without_ranges_sends_all_again(site, target):
    site.ranges, site.breaks = False, [300_000]
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT


def test_a_server_that_does_not_say_the_length(site, target):
    site.announce = False
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("change", ["etag", "content"])
def test_a_file_that_changed_meanwhile_is_not_pieced_together(site, target, change):
    site.breaks = [300_000] + [0] * 4
    with pytest.raises(DownloadError):
        fetch(f"{site.address}/model.ckpt", target)
    site.breaks = []
    if change == "etag":
        site.etag = '"2"'
    site.files["/model.ckpt"] = weights(len(CONTENT) + (0 if change == "etag" else 4), first=7)
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == site.files["/model.ckpt"]


def test_another_content_than_published_is_thrown_away(site, target):
    site.files["/model.ckpt"] = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=f"its SHA-256 is .*, not {SHA256}"):
        fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert not target.exists() and not parts(target)


def begun(site: Site, target: Path) -> None:
    """300,000 bytes are here of an earlier call."""
    site.breaks = [300_000] + [0] * 4
    with pytest.raises(DownloadError, match="broke off"):
        fetch(f"{site.address}/model.ckpt", target)
    site.breaks, site.asked, site.if_range = [], [], []
    assert [part.stat().st_size for part in parts(target)] == [300_000]


def test_the_rest_is_asked_for_of_this_version_only(site, target):
    begun(site, target)
    fetch(f"{site.address}/model.ckpt", target)
    assert site.if_range == [None, '"1"'] and target.read_bytes() == CONTENT
    target.unlink()
    site.etag = 'W/"1"'  # weak: does not tell two files apart byte for byte
    site.headers = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    begun(site, target)
    fetch(f"{site.address}/model.ckpt", target)
    assert site.if_range == [None, "Wed, 21 Oct 2015 07:28:00 GMT"] and target.read_bytes() == CONTENT


def test_without_a_version_it_begins_anew(site, target):
    site.etag, site.breaks = 'W/"1"', [300_000, 0]
    with pytest.raises(DownloadError, match="broke off"):
        fetch(f"{site.address}/model.ckpt", target)
    site.breaks, site.asked = [], []
    fetch(f"{site.address}/model.ckpt", target)
    assert site.asked == [None] and target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "partial, why",
    [
        ({"ETag": '"2"'}, "the file has changed on the server"),
        (
            {"Content-Range": "bytes 200000-1023999/1024000"},
            "other bytes than those asked for: Content-Range 'bytes 2000",
        ),
        ({"Content-Range": "bytes 300000-1023998/1023999"}, "other bytes than those asked for"),
        ({"Content-Range": ""}, "Content-Range ''"),
    ],
)
def test_an_answer_of_another_file_is_not_added(site, target, partial, why):
    begun(site, target)
    site.partial = partial
    with pytest.raises(DownloadError, match=f"{why}.*begins anew"):
        fetch(f"{site.address}/model.ckpt", target)
    assert not parts(target) and not target.exists()
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == CONTENT


def test_a_rest_that_the_server_does_not_have(site, target):
    begun(site, target)
    site.statuses = [200, 416]
    with pytest.raises(DownloadError, match="HTTP 416.*begins anew"):
        fetch(f"{site.address}/model.ckpt", target)
    assert not parts(target)  # it would be in the way for ever
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == CONTENT


def test_parts_of_other_versions_go_when_one_is_whole(site, target):
    begun(site, target)
    site.etag = '"2"'
    fetch(f"{site.address}/model.ckpt", target)
    assert os.listdir(target.parent) == ["model.ckpt"]


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><title>log in</title>", "web page"),
        (gzip.compress(CONTENT), "compressed with gzip"),
        (b'{"error": "no such file"}', "neither"),
        (CONTENT[:-1], "its header states 1024000"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS pointer"),
        (b"PK\x03\x04" + bytes(999), "table of contents at its end is not readable"),
    ],
)
def test_what_is_no_file_of_weights_is_not_kept(site, target, content, why):
    """Served as the usual bytes, with status 200; there is no SHA-256 to find it out."""
    site.files["/model.ckpt"] = content
    with pytest.raises(DownloadError, match=f"not a file of weights, discarded: .*{why}") as error:
        fetch(f"{site.address}/model.ckpt", target)
    assert not list(target.parent.iterdir()) and str(target) not in str(error.value)


@pytest.mark.parametrize(
    "headers, why",
    [
        ({"Content-Length": "abc"}, "Content-Length 'abc'"),
        ({"Content-Length": "-5"}, "Content-Length '-5'"),
        ({"Content-Length": "9" * 18}, r"needs 1000000000.00 GB; .* are free"),
        ({"Content-Length": "1" * 99}, "damaged"),
        ({"Content-Encoding": "gzip"}, "compressed with gzip, which was not requested"),
    ],
)
def test_nonsense_of_a_server_is_told(site, target, headers, why):
    site.headers = headers
    with pytest.raises(DownloadError, match=why):
        fetch(f"{site.address}/model.ckpt", target)


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "http://a b/",
        "file:///etc/passwd",
        "ftp://127.0.0.1:1/x",
        "//[/",
        "http://127.0.0.1:99999/",
        "gopher://x",
    ],
)
def test_addresses_that_a_server_leads_to(site, target, location):
    site.headers, site.statuses = {"Location": location}, [302]
    with pytest.raises(DownloadError):
        fetch(f"{site.address}/model.ckpt", target)


def test_two_processes_do_not_write_one_part(site, target):
    """The second says so; the first goes on, and neither's bytes are in the other's file."""
    begun(site, target)
    with alone(parts(target)[0]) as mine:
        assert mine
        with pytest.raises(DownloadError, match="another process is downloading it"):
            fetch(f"{site.address}/model.ckpt", target)
        assert parts(target)[0].stat().st_size == 300_000
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == CONTENT


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as files:
        for name in names:
            files.writestr(name, CONTENT)
    return file.getvalue()


def test_an_archive_gives_its_checkpoint(site, target):
    site.files["/kl-f8.zip"] = archive("config.yaml", "model.ckpt")
    fetch(f"{site.address}/kl-f8.zip", target, SHA256)
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == ["model.ckpt"]


@pytest.mark.parametrize(
    "content, why",
    [(archive("a.ckpt", "b.ckpt"), "one .ckpt file; got 2"), (archive("a.txt"), "got 0"), (b"text", "not a zip")],
)
def test_an_archive_of_something_else(site, target, content, why):
    site.files["/x.zip"] = content
    with pytest.raises(DownloadError, match=why):
        fetch(f"{site.address}/x.zip", target)
    assert not list(target.parent.iterdir())


def locked(content: bytes) -> bytes:
    """An archive that says of its files that they are encrypted: the flag stands in both of its headers."""
    content = bytearray(content)
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + place] |= 1
    return bytes(content)


def damaged(content: bytes) -> bytes:
    return content[:2000] + bytes(200) + content[2200:]


@pytest.mark.parametrize(
    "content, why",
    [
        (locked(archive("model.ckpt")), "an archive that can't be unpacked .*password"),
        (damaged(archive("model.ckpt")), "not a zip archive, or a damaged one"),
        (archive("model.ckpt").replace(CONTENT[128:500], b"<html>".ljust(372)), "damaged"),
    ],
)
def test_an_archive_that_does_not_open(site, target, content, why):
    site.files["/x.zip"] = content
    with pytest.raises(DownloadError, match=why):
        fetch(f"{site.address}/x.zip", target)
    assert not list(target.parent.iterdir())


def test_errors_of_the_server_are_told(site, target):
    with pytest.raises(DownloadError, match="HTTP 404, not there"):
        fetch(f"{site.address}/nothing", target)
    site.type = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="a web page, not a file"):
        fetch(f"{site.address}/model.ckpt", target)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="no connection .*refused"):
        fetch(f"http://127.0.0.1:{port}/model.ckpt", target)
    assert not target.parent.exists()


# The script


@pytest.fixture
def manifest(site, tmp_path) -> Path:
    entry = {"about": "a model", "config": "c.yaml", "licence": "MIT"}
    models = {
        "good": entry
        | {
            "path": "m/good.ckpt",
            "sha256": SHA256,
            "gb": 0.001,
            "urls": [f"{site.address}/nothing", f"{site.address}/model.ckpt"],
        },
        "plain": entry | {"path": "m/plain.ckpt", "urls": [f"{site.address}/model.ckpt?dl=1"]},
        "bad": entry | {"path": "m/bad.ckpt", "sha256": "0" * 64, "urls": [f"{site.address}/model.ckpt"]},
    }
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(models, sort_keys=False))
    return tmp_path / "published.yaml"


def call(manifest: Path, *args: str) -> int:
    return main([*args, "--manifest", str(manifest), "--root", str(manifest.parent)])


def test_list_download_and_verify(manifest, capsys):
    assert call(manifest, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["good", "absent", "0.00", "GB"] and "size unknown" in lines[2]
    assert "MIT; m/good.ckpt; 127.0.0.1:" in lines[1]

    assert call(manifest, "--verify") == 0
    assert capsys.readouterr().out == "none of the published models is here; --list shows them\n"
    assert call(manifest, "good", "plain") == 0  # the first mirror of `good` has it no more
    out = capsys.readouterr().out
    assert "good.ckpt: as published" in out and "plain.ckpt: here; no published SHA-256" in out
    assert call(manifest, "good") == 0 and "is here" in capsys.readouterr().out

    assert call(manifest, "--verify") == 0
    assert capsys.readouterr().out.splitlines() == [
        "m/good.ckpt: as published",
        "m/plain.ckpt: here; no published SHA-256 to hold it to; its size, first bytes "
        "and table of contents are those of weights",
    ]
    assert call(manifest, "--verify", "bad") == 1
    with (manifest.parent / "m" / "good.ckpt").open("r+b") as file:
        file.write(b"?")
    os.truncate(manifest.parent / "m" / "plain.ckpt", 1000)  # that is found out without a SHA-256
    assert call(manifest, "--verify") == 1
    out = capsys.readouterr().out
    assert "m/good.ckpt: NOT the published file" in out and "m/plain.ckpt: NOT the published file" in out


def test_a_reader_that_has_seen_enough(tmp_path):
    """As in --list | head: no traceback."""

    def work() -> int:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = os.fdopen(writer, "w")
        return main(["--list"])

    assert Child(work, tmp_path / "log").end() == 1 and (tmp_path / "log").read_text() == ""


def test_a_model_that_no_mirror_has(manifest, capsys):
    assert call(manifest, "bad") == 2
    error = capsys.readouterr().err
    assert error.startswith("download_models.py: error: bad: no mirror has it: http://127.0.0.1")
    assert "its SHA-256 is" in error and "put it at" in error and error.count("\n") == 1
    assert not (manifest.parent / "m" / "bad.ckpt").exists()


@pytest.mark.parametrize(
    "args, why",
    [
        (["nope"], "NAME: 'nope' is not one of good, plain, bad"),
        ([], "NAME: name the models"),
        (["--list", "--verify"], "not allowed with"),
    ],
)
def test_bad_arguments(manifest, capsys, args, why):
    assert call(manifest, *args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "change, why",
    [
        ({"urls": ["file:///etc/passwd"]}, "m.urls.0 should be an http or https address"),
        ({"urls": []}, "m.urls should have at least 1 item"),
        ({"urls": "http://a"}, "m.urls should be a valid list"),
        ({"path": "../x"}, "m.path should lie inside"),
        ({"path": "/x"}, "m.path should lie inside"),
        ({"sha256": "12"}, "m.sha256 should match pattern"),
        ({"md5": "1"}, "m has 'md5'; accepted: name, about"),
        ({"licence": None}, "m.licence is missing"),
        ({"urls": ["http://[::1"]}, "m.urls.0 should be an http or https address"),
        ({"urls": ["https://"]}, "m.urls.0 should be an http or https address"),
        ({"urls": [7]}, "m.urls.0 should be a valid string"),
        ({"urls": ["https://a b"]}, "m.urls.0 should be an http or https address"),
        ({"path": ["a"]}, "m.path should be a valid string"),
        ({"about": {"a": 1}}, "m.about should be a valid string"),
        ({"licence": 3}, "m.licence should be a valid string"),
        ({"sha256": 12}, "m.sha256 should be a valid string"),
        ({"gb": True}, "m.gb should be a valid number"),
        ({"gb": "4"}, "m.gb should be"),
        ({"gb": -1}, "m.gb should be"),
        ({"gb": float("nan")}, "m.gb should be"),
    ],
)
def test_a_manifest_with_a_fault_is_refused(tmp_path, change, why):
    entry = {"about": "a", "config": "c", "licence": "l", "path": "p", "urls": ["https://a"]} | change
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"m": {k: v for k, v in entry.items() if v is not None}}))
    with pytest.raises(ManifestError, match=why) as error:
        load_manifest(tmp_path / "m.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'm.yaml'}: ") and "\n" not in str(error.value)


def test_our_manifest(tmp_path):
    models = load_manifest()
    assert len({model.path for model in models.values()}) == len(models)
    hashes = [model.sha256 for model in models.values() if model.sha256]
    assert len(set(hashes)) == len(hashes) >= 11
    assert all(model.config.endswith(".yaml") and model.file().is_relative_to(ROOT) for model in models.values())
    assert isinstance(models["kl-f8"], Published) and MANIFEST.parent == ROOT / "models"
    for text, why in (
        ("- 1", "entries by name"),
        ("a: [", "not YAML"),
        ("[" * 9999, "nested deeper"),
        ("a: ${oc.env:HOME}", "a should be a mapping"),
        ("a: 1", "a should be a mapping"),
    ):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ManifestError, match=why):
            load_manifest(tmp_path / "m.yaml")
