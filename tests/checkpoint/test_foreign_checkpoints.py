"""Checkpoints of other trainers, of older versions, and hostile ones: read, or refused with what is in them."""

from __future__ import annotations

import io
import os
import pickle
import signal
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint import CheckpointError, fingerprint, load_state, load_weights, read_checkpoint
from ldm.checkpoint.file import weight_format

STATE = {"model.a.weight": torch.arange(6.0).view(2, 3), "model.a.bias": torch.ones(2)}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
BESIDE = {
    "best": np.float64(0.25),
    "lr": np.float32(1e-4),
    "step": np.int64(7),
    "done": np.bool_(True),
    "name": np.str_("x"),
    "history": np.arange(3.0),
    "dtype": np.dtype("float16"),
    "nested": [{"a": (np.uint8(1), np.zeros((2, 2), dtype=">i4"))}],
}


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def rewrite(path: Path, old: bytes, new: bytes) -> Path:
    """Other names in the pickle of a file, as another version of a library would have written them."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return path
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, content in records.items():
            target.writestr(name, content.replace(old, new) if name.endswith("data.pkl") else content)
    return path


def same(state: dict, expected: dict) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


# numpy beside the weights


@FORMATS
def test_numbers_of_numpy_beside_the_weights_are_let_be(tmp_path, zipped):
    path = save(tmp_path / "m.ckpt", {"state_dict": STATE, "callbacks": BESIDE}, zipped)
    assert same(read_checkpoint(path), STATE)


def test_and_under_the_names_of_older_numpy(tmp_path):
    """Before numpy 2 its modules had no underscore."""
    path = save(tmp_path / "m.ckpt", {"state_dict": STATE, "callbacks": BESIDE}, zipped=False)
    assert b"numpy._core.multiarray\nscalar" in path.read_bytes()
    rewrite(path, b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert b"numpy.core.multiarray\nscalar" in path.read_bytes() and same(read_checkpoint(path), STATE)


class Call:
    """Pickled as a call, which an unwary reader makes."""

    def __init__(self, function: Any, *args: Any, state: Any = None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class Name:
    """Pickled as the mere name of a function."""

    def __init__(self, function: str):
        self.function = function

    def __reduce__(self):
        return self.function


TOUCH = "touch hacked"
RECONSTRUCT, SCALAR = np._core.multiarray._reconstruct, np._core.multiarray.scalar
HOSTILE = {
    "a call": Call(os.system, TOUCH),
    "a call in an array": np.array([Call(os.system, TOUCH)], dtype=object),
    "a call in nested arrays": [
        {"a": np.array([np.array([Call(os.system, TOUCH), 1], dtype=object), 2], dtype=object)}
    ],
    "a call as an array's type": Call(RECONSTRUCT, Call(os.system, TOUCH), (0,), b"b"),
    "a call as an array's state": Call(
        RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, [Call(os.system, TOUCH)])
    ),
    "a call as a number": Call(SCALAR, np.dtype("f8"), Call(os.system, TOUCH)),
    "a call by eval": Call(eval, "__import__('os').system('touch hacked')"),
    "a call of numpy's": Call(np.fromfile, "secret"),
    "another of numpy's": Call(np.load, "secret", None, True),
    "a pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(os.system, TOUCH))),
    "a key": {Call(os.system, TOUCH): 1},
}
NOT_INERT = {
    "an array of objects": np.array([1, "a"], dtype=object),
    "a number of objects": Call(SCALAR, np.dtype("O"), b"x"),
    "an array of records": np.zeros(2, dtype=[("a", "f4"), ("b", "O")]),
}


@FORMATS
@pytest.mark.parametrize("name", sorted(HOSTILE | NOT_INERT))
def test_everything_else_is_still_refused_and_nothing_runs(tmp_path, monkeypatch, name, zipped):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("x")
    path = save(tmp_path / "m.ckpt", {"state_dict": STATE, "callbacks": (HOSTILE | NOT_INERT)[name]}, zipped)
    why = "refused, because the pickle (asks for code|holds a numpy array of dtype)"
    with pytest.raises(CheckpointError, match=why) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_a_stand_in_can_not_be_called_from_the_file(tmp_path, monkeypatch):
    """What stands for numpy's functions has no way on to others: neither its attributes nor its instances."""
    monkeypatch.chdir(tmp_path)
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR"
    for tail in (b"(tR", b"(dX\x01\x00\x00\x00ai\x01s(tR"):
        raw = b"\x80\x02" + dtype + tail + b"."
        path = tmp_path / "m.ckpt"
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="truncated, damaged"):
            read_checkpoint(path)


# Where the state dict lies, and what its keys are called


@pytest.mark.parametrize(
    "wrapper", ["state_dict", "model", "ema", "model_ema", "ema_state_dict", "model_state_dict", "module"]
)
def test_the_state_dict_under_the_names_that_trainers_use(tmp_path, wrapper):
    content = {wrapper: STATE, "optimizer": {"state": {0: {"step": 3}}}, "args": {"lr": 0.1}, "epoch": 4}
    assert same(read_checkpoint(save(tmp_path / "m.ckpt", content)), STATE)


def test_several_state_dicts_are_named_not_guessed(tmp_path):
    path = save(tmp_path / "m.ckpt", {"model": STATE, "ema": STATE, "step": 3})
    with pytest.raises(CheckpointError, match=r"several state dicts: 'model' \(2 tensors\), 'ema' \(2 tensors\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content, why",
    [
        ({"optimizer": {}, "epoch": 3}, r"not tensors: \(epoch: int, optimizer: dict\)"),
        ({"state_dict": {"a": np.zeros(3)}}, r"not tensors: \(a: numpy array\)"),
        ({"state_dict": {1: torch.zeros(1)}}, r"not tensors: \(1: Tensor\)"),
        ({"model": {}, "ema": {}}, "not tensors: .ema: dict, model: dict"),
        (torch.zeros(2), "got Tensor"),
        ({}, "got dict without entries"),
    ],
)
def test_what_holds_none_says_what_is_there(tmp_path, content, why):
    with pytest.raises(CheckpointError, match=why):
        read_checkpoint(save(tmp_path / "m.ckpt", content))


def test_prefixes_of_parallel_and_compiled_training_are_taken_off(tmp_path):
    parallel = {f"module.{key}": value for key, value in STATE.items()}
    compiled = {key.replace("model.", "model._orig_mod."): value for key, value in STATE.items()}
    outside = {f"_orig_mod.module.{key}": value for key, value in STATE.items()}
    for number, state in enumerate((parallel, compiled, outside)):
        save_file(state, tmp_path / f"{number}.safetensors")
        save(tmp_path / f"{number}.ckpt", {"state_dict": state})
        for suffix in ("safetensors", "ckpt"):
            assert same(read_checkpoint(tmp_path / f"{number}.{suffix}"), STATE)
    averaged = STATE | {"model_ema._orig_modaweight": torch.zeros(2, 3)}
    assert load_state(save(tmp_path / "e.ckpt", averaged), "ema")["model.a.weight"].sum() == 0
    some_of_it = {"module.a": torch.ones(1), "b": torch.ones(1)}  # a part of the model that is called so
    assert same(read_checkpoint(save(tmp_path / "part.ckpt", some_of_it)), some_of_it)
    with pytest.raises(CheckpointError, match="the same weights twice"):
        read_checkpoint(save(tmp_path / "both.ckpt", STATE | compiled))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"a": nn.Linear(3, 2)})
        self.first = nn.Linear(1, 1)


def test_a_file_of_averages_alone_is_a_model(tmp_path):
    rest = {"first.weight": torch.ones(1, 1), "first.bias": torch.ones(1)}
    averages = {
        "model_ema.aweight": STATE["model.a.weight"],
        "model_ema.abias": STATE["model.a.bias"],
        "model_ema.decay": torch.tensor(0.9),
    }
    path = save(tmp_path / "m.ckpt", {"state_dict": averages | rest})
    for weights in ("auto", "ema"):
        network = Network()
        assert load_weights(network, path, weights).weights == "ema"
        assert torch.equal(network.model["a"].weight, STATE["model.a.weight"])
    with pytest.raises(CheckpointError, match="only averages .model_ema.*. of the network"):
        load_weights(Network(), path, "raw")
    averages["model_ema.other"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="averages without their model.* weight .model_ema.other."):
        load_weights(Network(), save(tmp_path / "o.ckpt", averages | rest))


# Tensors that are no weights


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_are_real_numbers(tmp_path, dtype, suffix):
    state = {"weight": torch.ones(2, 3, dtype=dtype), "bias": torch.zeros(2)}
    path = tmp_path / f"m.{suffix}"
    save_file(state, path) if suffix == "safetensors" else save(path, state)
    module = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=rf"not floating-point numbers .weight {dtype}, config torch.float32."):
        load_weights(module, path)
    for taken in (torch.float16, torch.bfloat16, torch.float64):
        load_weights(module, save(tmp_path / "ok.ckpt", {k: v.real.to(taken) for k, v in state.items()}))


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.ones(2, device="meta"), "no data"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_kinds_that_no_layer_takes(tmp_path, make, kind):
    with pytest.raises(CheckpointError, match=rf"expected plain tensors; got \(weight: {kind}\)"):
        read_checkpoint(save(tmp_path / "m.ckpt", {"weight": make()}))


# Files that are no files, and damaged ones


@pytest.fixture
def alarm():
    """A reader that waits for a FIFO or reads a device without end fails, instead of the suite standing still. The time
    is so long that none but those reach it."""

    def ring(*_):
        raise TimeoutError("it was read")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def special_files(folder: Path) -> list[Path]:
    os.mkfifo(folder / "fifo.ckpt")
    paths = [folder / "fifo.ckpt"]
    try:  # nodes of our own: endless zeros, and always empty
        for name, minor in (("zero.ckpt", 5), ("null.ckpt", 3)):
            os.mknod(folder / name, stat.S_IFCHR | 0o600, os.makedev(1, minor))
            paths.append(folder / name)
    except PermissionError:
        pass
    return paths


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, alarm):
    for path in special_files(tmp_path):
        (tmp_path / "link.ckpt").symlink_to(path)
        for name in (path, tmp_path / "link.ckpt"):
            for read in (read_checkpoint, fingerprint):
                with pytest.raises((ValueError, OSError), match=": (a FIFO|a device); expected a"):
                    read(name)
        (tmp_path / "link.ckpt").unlink()


def header(text: bytes, data: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    "content, why",
    [
        (header(b'{"a":' * 100_000), "header is not a table of tensors"),
        (header(b"{}"), "without tensors"),
        (header(b"{[]"), "header is not a table"),
        (header(b'{"a":{"data_offsets":["0","4"]}}', 4), "not a table"),
        (header(b'{"a":[1]}'), "not a table"),
        (header(b'{"a":{"dtype":"F32","shape":[9999999999],"data_offsets":[0,4]}}', 4), "damaged"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 3), "its header states"),
        (header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 5), "its header states"),
        ((2**62).to_bytes(8, "little") + b"{", "truncated"),
        (b"\x1f\x8b\x08" + bytes(99), "compressed with gzip"),
        (b"\xef\xbb\xbf  <html>", "web page"),
        (b"GGUF" + bytes(99), "GGUF"),
        (b'{"error": "gone"}', "neither"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, why):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=why) as error:
        read_checkpoint(tmp_path / "m.safetensors")
    assert "\n" not in str(error.value)


def test_archives_that_are_no_checkpoints(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("model.ckpt", b"x" * 99)
    (tmp_path / "m.ckpt").write_bytes(archive.getvalue())
    with pytest.raises(CheckpointError, match="a zip archive, not a PyTorch checkpoint"):
        weight_format(tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "j.pt", "w") as files:
        files.writestr("j/data.pkl", b"x")
        files.writestr("j/constants.pkl", b"x")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "j.pt")
