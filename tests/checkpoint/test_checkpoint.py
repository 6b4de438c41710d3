from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldm import checkpoint
from ldm.checkpoint import (
    CheckpointError,
    average_of,
    fingerprint,
    load_config,
    load_model,
    load_part,
    load_state,
    load_weights,
    read_checkpoint,
    save_weights,
)
from ldm.checkpoint.published import load_manifest
from ldm.modules.ema import LitEma
from ldm.util import ConfigError, instantiate_from_config
from tests.helpers.goldens import assert_golden, load_case
from tests.helpers.paths import ROOT

CASE, TENSORS = load_case("ldm_tiny_checkpoint")
STATE = {key.removeprefix("ckpt."): value for key, value in TENSORS.items() if key.startswith("ckpt.")}


def write(path: Path, state: dict) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 7, "epoch": 1}, path)
    return path


@pytest.fixture
def config(tmp_path) -> Path:
    model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": CASE["params"]}
    OmegaConf.save(OmegaConf.create({"model": model}), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


# The published layout


def test_a_part_is_filled_from_its_own_file_or_a_whole_models(tmp_path, config):
    whole = write(tmp_path / "whole.safetensors", load_model(config, write(tmp_path / "m.ckpt", STATE)).state_dict())
    own = {k.removeprefix("first_stage_model."): v for k, v in STATE.items() if k.startswith("first_stage_model.")}
    name = "decoder.conv_in.weight"
    for path in (whole, write(tmp_path / "part.safetensors", own)):
        model = instantiate_from_config(load_config(config).model)
        load_part(model, "first_stage_model", path)
        assert torch.equal(model.first_stage_model.state_dict()[name], own[name])
    with pytest.raises(ValueError, match="the model has no part 'unet'; it has model, "):
        load_part(model, "unet", whole)
    with pytest.raises(CheckpointError, match="diffusion_model"):
        load_part(model, "model", write(tmp_path / "other.safetensors", own))


@pytest.mark.parametrize("weights, eps", [("raw", "eps"), ("ema", "eps_ema"), ("auto", "eps_ema")])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_golden_checkpoint(tmp_path, config, suffix, weights, eps):
    model = load_model(config, write(tmp_path / f"model{suffix}", STATE), weights=weights)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    c = model.get_learned_conditioning(TENSORS["tokens"])
    assert_golden(c, TENSORS["c"], CASE)
    z = model.get_first_stage_encoding(model.encode_first_stage(TENSORS["x"]), TENSORS["enc_noise"])
    assert_golden(z, TENSORS["z_scaled"], CASE)
    assert_golden(model.decode_first_stage(TENSORS["z_scaled"]), TENSORS["decoded"], CASE)
    assert_golden(model.apply_model(TENSORS["z"], TENSORS["t"], c), TENSORS[eps], CASE)
    torch.testing.assert_close(model.betas, STATE["betas"], rtol=1e-6, atol=0)


def test_the_golden_tells_averages_from_live_weights():
    assert (TENSORS["eps"] - TENSORS["eps_ema"]).abs().max() > 100 * CASE["tolerance"]["atol"]


def test_report_names_what_was_left_aside(tmp_path, config, caplog):
    state = STATE | {"first_stage_model.loss.logvar": torch.zeros(()), "lvlb_weights": torch.zeros(1000)}
    state.pop("betas")
    with caplog.at_level(logging.INFO, logger="ldm.checkpoint"):
        load_model(config, write(tmp_path / "m.ckpt", state))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "ema weights" in line and "\n" not in line
    assert "2 optional keys ignored (first_stage_model.loss.logvar, lvlb_weights)" in line
    assert "1 optional keys absent (betas)" in line


@pytest.mark.parametrize(
    "key",
    [
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
        "loss.discriminator.main.0.weight",
        "logvar",
        "model_ema.decay",
    ],
)
def test_known_leftovers_are_accepted(tmp_path, config, key):
    load_model(config, write(tmp_path / "m.ckpt", STATE | {key: torch.zeros(2)}), weights="raw")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model.diffusion_model.out.2.bias": None}, "1 missing .model.diffusion_model.out.2.bias."),
        ({"model.diffusion_model.extra": torch.zeros(1)}, "1 unexpected .model.diffusion_model.extra."),
        ({"scale_factor": torch.tensor(0.2)}, "1 unexpected .scale_factor."),
        ({"cond_stage_model.decoder.conv_out.bias": torch.zeros(3)}, "1 unexpected"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(9)}, r"of another shape .*bias \(9,\), config \(4,\)"),
        ({f"other{i}": torch.zeros(1) for i in range(30)}, "30 unexpected .other0, .* and 22 more"),
    ],
)
def test_keys_that_do_not_match_are_named(tmp_path, config, change, why):
    state = {key: value for key, value in (STATE | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=why) as error:
        load_model(config, write(tmp_path / "m.safetensors", state), weights="raw")
    assert "config of another model" in str(error.value) and "\n" not in str(error.value)


def test_a_refused_file_leaves_the_module_as_it_was(tmp_path):
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(CheckpointError, match="missing"):
        load_weights(module, write(tmp_path / "m.ckpt", {"weight": torch.ones(2, 2)}))
    assert torch.equal(module.weight, before)


def test_a_first_stage_that_is_also_the_conditioner(tmp_path):
    class Both(nn.Module):
        def __init__(self, shared: bool):
            super().__init__()
            self.first_stage_model = nn.Linear(2, 2)
            if shared:
                self.cond_stage_model = self.first_stage_model

    twice = Both(shared=True).state_dict()
    once = {key: value for key, value in twice.items() if key.startswith("first")}
    for shared in (True, False):
        for n, state in enumerate((twice, once)):
            module = Both(shared)
            load_weights(module, write(tmp_path / f"{shared}{n}.ckpt", state))
            assert torch.equal(module.first_stage_model.weight, once["first_stage_model.weight"])
    with pytest.raises(CheckpointError, match="1 unexpected .cond_stage_model.bias"):
        differing = twice | {"cond_stage_model.bias": torch.ones(2)}
        load_weights(Both(False), write(tmp_path / "d.ckpt", differing))


# Averages


def test_averages_take_the_place_of_the_network_only():
    assert average_of("model.diffusion_model.time_embed.0.weight") in STATE


def test_choice_of_weights(tmp_path):
    raw = {"model.a.weight": torch.zeros(2), "model.frozen": torch.zeros(1), "first.b": torch.zeros(3)}
    both = raw | {
        "model_ema.aweight": torch.ones(2),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.num_updates": torch.tensor(3, dtype=torch.int32),
    }
    plain, averaged = write(tmp_path / "raw.ckpt", raw), write(tmp_path / "both.safetensors", both)
    assert load_state(averaged, "raw").keys() == load_state(averaged, "ema").keys() == raw.keys()
    assert load_state(averaged, "raw")["model.a.weight"].sum() == 0
    for weights in ("ema", "auto"):
        assert load_state(averaged, weights)["model.a.weight"].sum() == 2
    assert load_state(plain, "auto")["model.a.weight"].sum() == 0
    with pytest.raises(CheckpointError, match="no model_ema"):
        load_state(plain, "ema")
    with pytest.raises(ValueError, match="auto, ema, raw"):
        load_state(plain, "best")
    with pytest.raises(CheckpointError, match="averages without their model.* weight .model_ema.zzz."):
        load_state(write(tmp_path / "z.ckpt", both | {"model_ema.zzz": torch.zeros(1)}))


def test_a_modules_own_average_restarts_from_the_loaded_weights(tmp_path):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)
            self.model_ema = LitEma(self.model)

    module = Averaged()
    state = {"model.weight": torch.full((2, 2), 3.0), "model.bias": torch.zeros(2)}
    load_weights(module, write(tmp_path / "m.safetensors", state))
    assert torch.equal(module.model_ema.weight, module.model.weight) and module.model.weight[0, 0] == 3


# Files that are not checkpoints


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


class Opaque:
    pass


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def bad_files(folder: Path) -> dict[str, Path]:
    paths = {
        name: folder / name
        for name in (
            "empty.ckpt",
            "page.safetensors",
            "pointer.ckpt",
            "text.ckpt",
            "short.safetensors",
            "plain.pkl",
            "list.ckpt",
            "strange.ckpt",
            "none.ckpt",
            "evil.ckpt",
            "evil_old.ckpt",
            "opaque.ckpt",
        )
    }
    paths["empty.ckpt"].touch()
    paths["page.safetensors"].write_text("\n<!DOCTYPE html><title>404</title>")
    paths["pointer.ckpt"].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    paths["text.ckpt"].write_text("weights")
    paths["short.safetensors"].write_bytes((10**6).to_bytes(8, "little") + b'{"a":')
    paths["plain.pkl"].write_bytes(pickle.dumps({"a": 1}, protocol=4))
    torch.save([torch.zeros(1)], paths["list.ckpt"])
    torch.save({"net": {"a": torch.zeros(1)}, "step": 3}, paths["strange.ckpt"])
    torch.save({"state_dict": {}}, paths["none.ckpt"])
    torch.save({"state_dict": {}, "x": Evil()}, paths["evil.ckpt"])
    torch.save({"state_dict": {}, "x": Evil()}, paths["evil_old.ckpt"], _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {}, "x": Opaque()}, paths["opaque.ckpt"])
    for old in (True, False):
        paths[f"cut{old}.ckpt"] = folder / f"cut{old}.ckpt"
        torch.save({"a": torch.zeros(999)}, folder / f"cut{old}.ckpt", _use_new_zipfile_serialization=not old)
        cut(folder / f"cut{old}.ckpt")
    save_file({"a": torch.zeros(999)}, folder / "cut.safetensors")
    cut(folder / "cut.safetensors")
    return paths | {name: folder / name for name in ("cut.safetensors", "missing.ckpt")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "name, why",
    [
        ("empty.ckpt", "empty"),
        ("page.safetensors", "web page"),
        ("pointer.ckpt", "git lfs pull"),
        ("text.ckpt", "neither"),
        ("short.safetensors", "truncated"),
        ("cut.safetensors", "truncated"),
        ("cutTrue.ckpt", "truncated"),
        ("cutFalse.ckpt", "truncated"),
        ("plain.pkl", "not a PyTorch checkpoint"),
        ("list.ckpt", "got list"),
        ("strange.ckpt", "not tensors: .net: dict, step: int."),
        ("none.ckpt", "without entries"),
        ("evil.ckpt", "refused.*asks for code .(posix|nt).system.;.*save_weights"),
        ("evil_old.ckpt", "refused.*asks for code .(posix|nt).system.;"),
        ("opaque.ckpt", "refused.*Opaque"),
        ("missing.ckpt", "no such file"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused_in_one_line(tmp_path, monkeypatch, name, why):
    monkeypatch.chdir(tmp_path)
    path = bad_files(tmp_path)[name]
    with pytest.raises((CheckpointError, FileNotFoundError), match=why) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_the_content_of_a_file_decides_its_format(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "really_safetensors.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert torch.equal(read_checkpoint(path)["a"], torch.ones(2))
    torch.save({"a": torch.ones(2)}, tmp_path / "really_pickle.safetensors")
    with pytest.raises(CheckpointError, match="rename it to .ckpt"):
        read_checkpoint(tmp_path / "really_pickle.safetensors")


def test_a_callback_named_by_published_checkpoints_does_no_harm(tmp_path):
    """They hold the class as a dictionary key; it is neither imported nor called."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with pytest.MonkeyPatch.context() as patch:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, module)
        state = {"state_dict": {"a": torch.ones(2)}, "callbacks": {module.ModelCheckpoint: {"best": 1}}}
        torch.save(state, tmp_path / "m.ckpt")
    assert read_checkpoint(tmp_path / "m.ckpt").keys() == {"a"}


# Configs


@pytest.mark.parametrize(
    "text, why",
    [
        ("a: [", "not YAML"),
        ("- 1", "not a model's config: it should be a mapping"),
        ("a: 1", "not a model's config: model is missing"),
        ("", "not a model's config: model is missing"),
        ("model: {params: {}}", "not a model's config: model.target is missing"),
    ],
)
def test_what_is_not_a_config_is_refused_in_one_line(tmp_path, text, why):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="config"):
        load_config(tmp_path / "missing.yaml")


PLAIN = "model: {target: torch.nn.Identity}"


@pytest.mark.parametrize(
    "text, why",
    [
        ("sampling: true", "sampling should be a mapping; got True"),
        ("sampling: {scale: true}", "sampling.scale should be a valid number; got True"),
        ("sampling: {scale: high}", "sampling.scale should be a valid number; got 'high'"),
        ("sampling: {scale: .nan}", "sampling.scale should be a finite number; got nan"),
        ("data: {path: '${oc.env:HOME}'}", "data.path: an interpolation, '${oc.env:HOME}'; write the value itself"),
        ("data: [1, {a: '${model.target}'}]", "data.1.a: an interpolation"),
        ("seed: ???", "seed: no value"),
        ("a: '${'", "(a: an interpolation|not a YAML config)"),
        ("a: &a [1]\nb: [*a, *a]", None),
        ("a: " + "[" * 200 + "]" * 200, "nested deeper"),
        ("a: " + "[" * 100_000, "not YAML"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "\n".join(
                f"{chr(98 + i)}: &{chr(98 + i)} [{','.join('*' + chr(97 + i) for _ in range(10))}]" for i in range(9)
            ),
            "more than 20000000 values",
        ),
    ],
)
def test_a_config_is_data(tmp_path, text, why):
    """Nothing of the machine gets into it, and what is too much is told before it is made."""
    (tmp_path / "c.yaml").write_text(f"{PLAIN}\n{text}\n")
    if why is None:
        assert load_config(tmp_path / "c.yaml").b == [[1], [1]]
        return
    with pytest.raises(ConfigError, match=why.replace("$", r"\$").replace("{", r"\{")) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model",
    [
        "true",
        "[1]",
        "???",
        "x",
        "{target: [1]}",
        "{target: ???}",
        "{target: true}",
        "{target: torch.nn.Identity, params: true}",
        "'${oc.env:HOME}'",
        "{target: torch.nn.Linear, params: {in_features: true, out_features: 1}}",
    ],
)
def test_a_model_of_another_kind(tmp_path, model):
    (tmp_path / "c.yaml").write_text(f"model: {model}\n")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("timesteps", [-5, 0, 10**13])
def test_a_number_of_timesteps_has_bounds(tmp_path, config, timesteps):
    changed = OmegaConf.load(config)
    changed.model.params.timesteps = timesteps
    OmegaConf.save(changed, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=f"params.timesteps should be .* to (1|100000); got {timesteps}"):
        load_config(tmp_path / "c.yaml")


def test_a_number_of_layers_has_bounds(tmp_path, config):
    changed = OmegaConf.load(config)
    changed.model.params.unet_config.params.num_res_blocks = 10**9
    OmegaConf.save(changed, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="a model of more than 10000 tensors"):
        checkpoint.unmade_model(load_config(tmp_path / "c.yaml"))


def test_every_published_config_is_read():
    for path in {model.config for model in load_manifest().values()}:
        load_config(ROOT / path)


def test_building_to_load_draws_no_random_numbers(tmp_path, config):
    before = torch.get_rng_state()
    load_model(config, write(tmp_path / "m.safetensors", STATE))
    assert torch.equal(torch.get_rng_state(), before)


# Memory


def test_a_loaded_model_has_every_weight_and_real_buffers(tmp_path, config):
    model = load_model(config, write(tmp_path / "m.safetensors", STATE))
    kept_out = set(dict(model.named_buffers())) - model.state_dict().keys()
    assert kept_out and not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.logvar.eq(0).all() and model.lvlb_weights.gt(0).all()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_layout_of_a_file_does_not_change_what_is_computed(tmp_path, config, suffix):
    """Weights at an odd place of the file are moved to where PyTorch would have put them."""
    for size in range(1, 5):  # shifts what comes after it
        state = {key: value.float() for key, value in STATE.items()} | {"betas": torch.zeros(1000 + size)[size:]}
        state["model_ema.decay"] = torch.zeros(size)
        model = load_model(config, write(tmp_path / f"{size}{suffix}", state), weights="raw")
        assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


def test_a_schedule_in_half_precision_is_left_to_the_config(tmp_path, config):
    halved = {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    model = load_model(config, write(tmp_path / "m.safetensors", halved))
    torch.testing.assert_close(model.alphas_cumprod, STATE["alphas_cumprod"], rtol=1e-6, atol=0)
    assert not torch.allclose(halved["alphas_cumprod"].float(), STATE["alphas_cumprod"], rtol=1e-6, atol=0)


def test_weights_that_do_not_fit_into_memory_are_refused(tmp_path, config):
    """A PyTorch file in the model's precision is not copied; another is cast, or its tensors are not aligned."""
    halved = {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()}
    whole = {key: value.float() for key, value in STATE.items()}
    load_model(config, write(tmp_path / "whole.ckpt", whole), free=0)
    for name, state in (("half.ckpt", halved), ("half.safetensors", halved), ("whole.safetensors", whole)):
        with pytest.raises(CheckpointError, match=f"{name}: its weights take 0.0 GB, 0.0 GB are free"):
            load_model(config, write(tmp_path / name, state), free=1000)


def test_what_the_file_leaves_out_and_nothing_reads_is_zero(tmp_path, monkeypatch):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))
            self.text_projection = nn.Parameter(torch.empty(2, 2))

    monkeypatch.setattr(checkpoint.model, "instantiate_from_config", lambda config: Text())
    (tmp_path / "c.yaml").write_text("model: {target: torch.nn.Identity}")
    model = load_model(tmp_path / "c.yaml", write(tmp_path / "m.safetensors", {"weight": torch.ones(2)}))
    assert torch.equal(model.text_projection, torch.zeros(2, 2)) and model.weight.sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_is_let_go_of_while_it_is_cast(tmp_path, dtype):
    """The process holds the weights once: the file's own pages, or the cast ones and a part of the file."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    params = {"d_model": 1024, "nhead": 8, "num_encoder_layers": 2, "num_decoder_layers": 1, "batch_first": True}
    config = {"model": {"target": "torch.nn.Transformer", "params": params}}  # 0.17 GB of weights in float32
    OmegaConf.save(OmegaConf.create(config), tmp_path / "c.yaml")
    shapes = checkpoint.unmade_model(load_config(tmp_path / "c.yaml")).state_dict()
    write(tmp_path / "m.safetensors", {key: torch.ones(v.shape, dtype=dtype) for key, v in shapes.items()})
    code = """if True:
        from ldm import checkpoint
        checkpoint.file.GROUP = 2 ** 22
        peak = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
        before = peak()
        model = checkpoint.load_model("c.yaml", "m.safetensors")
        weights = sum(p.nbytes for p in model.parameters())
        assert sum(p.sum().item() for p in model.parameters()) == weights / 4
        print((peak() - before) / weights)
    """
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.2


# Writing


def test_saved_weights_come_back_and_shared_ones_too(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "a": shared,
        "b": shared,
        "view": shared.T,
        "half": torch.ones(2, dtype=torch.float16),
        "n": torch.tensor(3, dtype=torch.int32),
    }
    save_weights(tmp_path / "sub" / "m.safetensors", state, {"source": "test"})
    back = read_checkpoint(tmp_path / "sub" / "m.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) and back[key].dtype == state[key].dtype for key in state)
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["m.safetensors"]
    assert fingerprint(tmp_path / "sub" / "m.safetensors") != fingerprint(__file__)


def test_a_failed_save_keeps_the_old_weights(tmp_path, monkeypatch):
    save_weights(tmp_path / "m.safetensors", {"a": torch.ones(2)})

    def half(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.file, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_weights(tmp_path / "m.safetensors", {"a": torch.zeros(2)})
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "m.safetensors")["a"].sum() == 2
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_weights_are_read_for_their_hash_once_and_again_when_they_change(tmp_path, monkeypatch):
    read = []
    whole = checkpoint.file.file_sha256
    monkeypatch.setattr(checkpoint.file, "file_sha256", lambda *files: read.append(files) or whole(*files))
    file = write(tmp_path / "m.safetensors", {"a": torch.zeros(3)})
    before = fingerprint(file)
    assert fingerprint(file) == before and len(read) == 1
    write(file, {"a": torch.ones(3)})
    assert fingerprint(file) != before and len(read) == 2
