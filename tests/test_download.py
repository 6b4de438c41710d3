"""Downloads from a real HTTP server on this machine: ranges, broken transfers, wrong content, mirrors."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from txt2img_model import load_script

from ldm.download import DownloadError, fetch
from ldm.published import MANIFEST, ManifestError, Published, load_manifest

CONTENT = bytes(range(256)) * 4000              # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ROOT = Path(__file__).parents[1]
main = load_script("download_models").main


@dataclass
class Site:
    """What a server does.

    files:   content by path.
    ranges:  answers to Range.
    breaks:  for each coming transfer, after how many bytes the connection is cut.
    asked:   the Range header of each request.
    """

    files: dict[str, bytes]
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)
    etag: str = '"1"'
    type: str = "application/octet-stream"
    announce: bool = True
    asked: list[str | None] = field(default_factory=list)
    address: str = ""


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            site.asked.append(wanted)
            content = site.files.get(self.path.partition("?")[0])
            if content is None:
                self.send_error(404)
                return
            # taken before the answer begins: the client may ask again while this thread is still sending
            stop = site.breaks.pop(0) if site.breaks else len(content)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if site.announce:
                self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Content-Type", site.type)
            self.send_header("ETag", site.etag)
            self.end_headers()
            try:
                self.wfile.write(content[start:start + stop])
            except OSError:                     # the client has seen enough
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
    site.breaks = [300_000, 0, 200_000]         # the first; the second looks only; then from 300,000 on
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT
    ranges = [int(asked.removeprefix("bytes=").rstrip("-")) for asked in site.asked if asked]
    assert ranges == [300_000, 500_000]


def test_a_later_call_goes_on_with_what_is_there(site, target):
    site.breaks = [300_000] + [0] * 4
    with pytest.raises(DownloadError, match="broke off at 300000 of 1024000 bytes"):
        fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert not target.exists() and parts(target)[0].stat().st_size == 300_000
    site.breaks, site.asked = [], []
    fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert target.read_bytes() == CONTENT and site.asked == [None, "bytes=300000-"] and not parts(target)


def test_a_process_that_was_killed_leaves_what_it_had(site, target):
    site.files["/model.ckpt"] = CONTENT * 40
    code = ("import os, sys; from pathlib import Path; from ldm.download import fetch\n"
            "fetch(sys.argv[1], Path(sys.argv[2]), None, lambda done, total: done > 5e6 and os._exit(9))")
    run = subprocess.run([sys.executable, "-c", code, f"{site.address}/model.ckpt", str(target)], cwd=ROOT,
                         env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 9 and not target.exists()
    have = parts(target)[0].stat().st_size
    assert have > 4e6
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == CONTENT * 40 and site.asked[-1] == f"bytes={have}-"


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
    site.files["/model.ckpt"] = CONTENT[::-1] + (b"" if change == "etag" else b"more")
    fetch(f"{site.address}/model.ckpt", target)
    assert target.read_bytes() == site.files["/model.ckpt"]


def test_another_content_than_published_is_thrown_away(site, target):
    site.files["/model.ckpt"] = CONTENT[:-1] + b"!"
    with pytest.raises(DownloadError, match=f"its SHA-256 is .*, not {SHA256}"):
        fetch(f"{site.address}/model.ckpt", target, SHA256)
    assert not target.exists() and not parts(target)


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


@pytest.mark.parametrize("content, why", [
    (archive("a.ckpt", "b.ckpt"), "one .ckpt file; got 2"), (archive("a.txt"), "got 0"), (b"text", "not a zip")])
def test_an_archive_of_something_else(site, target, content, why):
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
        "good": entry | {"path": "m/good.ckpt", "sha256": SHA256, "gb": 0.001,
                         "urls": [f"{site.address}/nothing", f"{site.address}/model.ckpt"]},
        "plain": entry | {"path": "m/plain.ckpt", "urls": [f"{site.address}/model.ckpt?dl=1"]},
        "bad": entry | {"path": "m/bad.ckpt", "sha256": "0" * 64, "urls": [f"{site.address}/model.ckpt"]}}
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
    assert call(manifest, "good", "plain") == 0            # the first mirror of `good` has it no more
    out = capsys.readouterr().out
    assert "good.ckpt: as published" in out and "plain.ckpt: here; no published SHA-256" in out
    assert call(manifest, "good") == 0 and "is here" in capsys.readouterr().out

    assert call(manifest, "--verify") == 0
    assert capsys.readouterr().out.splitlines() == [
        "m/good.ckpt: as published", "m/plain.ckpt: here; no published SHA-256 to hold it to"]
    assert call(manifest, "--verify", "bad") == 1
    with (manifest.parent / "m" / "good.ckpt").open("r+b") as file:
        file.write(b"?")
    assert call(manifest, "--verify") == 1
    assert "m/good.ckpt: NOT the published file" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough():
    """As in --list | head: no traceback."""
    command = [sys.executable, str(ROOT / "scripts" / "download_models.py"), "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_a_model_that_no_mirror_has(manifest, capsys):
    assert call(manifest, "bad") == 2
    error = capsys.readouterr().err
    assert error.startswith("download_models.py: error: bad: no mirror has it: http://127.0.0.1")
    assert "its SHA-256 is" in error and "put it at" in error and error.count("\n") == 1
    assert not (manifest.parent / "m" / "bad.ckpt").exists()


@pytest.mark.parametrize("args, why", [
    (["nope"], "NAME: 'nope' is not one of good, plain, bad"), ([], "NAME: name the models"),
    (["--list", "--verify"], "not allowed with")])
def test_bad_arguments(manifest, capsys, args, why):
    assert call(manifest, *args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


@pytest.mark.parametrize("change, why", [
    ({"urls": ["file:///etc/passwd"]}, "m: urls must be http"), ({"urls": []}, "m: urls must be"),
    ({"urls": "http://a"}, "m: expected an entry with a list of urls"), ({"path": "../x"}, "m: path must lie inside"),
    ({"path": "/x"}, "m: path must lie inside"), ({"sha256": "12"}, "m: sha256 must be 64"),
    ({"md5": "1"}, "m: unknown md5; known: about"), ({"licence": None}, "m: without licence")])
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
    assert len(set(hashes)) == len(hashes) >= 8
    assert all(model.config.endswith(".yaml") and model.file().is_relative_to(ROOT) for model in models.values())
    assert isinstance(models["kl-f8"], Published) and MANIFEST.parent == ROOT / "models"
    for text, why in (("- 1", "entries by name"), ("a: [", "not a YAML")):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ManifestError, match=why):
            load_manifest(tmp_path / "m.yaml")
