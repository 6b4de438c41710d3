"""scripts/benchmark_networks.py: both libraries have the same networks, at sizes where only that matters."""

from __future__ import annotations

import json

import pytest

from ldm.checkpoint import read_checkpoint
from tests.helpers.scripts import load_script
from tests.helpers.tiny_unet import network_params

networks = pytest.importorskip("ldm.profiling.networks", reason="needs diffusers")
main = load_script("benchmark_networks").main

VIDEO = {"model_channels": 64, "num_res_blocks": 1, "channel_mult": [1, 1], "context_dim": 24, "num_head_channels": 16}
DIT = {"input_size": 8, "patch_size": 2, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 10}


def params(module: str, **unet: object) -> dict:
    target = f"ldm.modules.diffusionmodules.{module}"
    return {"image_size": 8, "unet_config": {"target": target, "params": {"in_channels": 4, **unet}}}


def dit() -> networks.Twin:
    return networks.transformer(params("dit.DiT", **DIT, encoder_blocks=2))


SMALL = {"layers_per_block": 1, "attention_head_dim": 16, "encoder_hid_dim": 32, "addition_embed_type_num_heads": 4}
XL = {"num_head_channels": 16, "use_linear_in_transformer": True, "transformer_depth": [1, 2]}
FRAMED = network_params(**XL, num_classes="sequential", adm_in_channels=8 + 6 * 256)
FRAMED |= {"cond_stage_config": {"params": {"emb_models": [{"params": {"outdim": 256}}]}}}
REFINER = FRAMED | {
    "unet_config": network_params(**XL, num_classes="sequential", adm_in_channels=8 + 5 * 256)["unet_config"]
}
SECOND = SMALL | {
    "in_channels": 6,
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 4 * 32,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
    "only_cross_attention": True,
    "mid_block_only_cross_attention": True,
}
UPSCALER = network_params(
    in_channels=7, num_classes=10, disable_self_attentions=[True, False], attention_resolutions=[1, 2]
)
TINY = {
    "framed": lambda: networks.unet(FRAMED),
    "unet": lambda: networks.unet(network_params(attention_resolutions=[1, 2], num_res_blocks=2)),
    "video": lambda: networks.video(params("unet3d.VideoUNet", **VIDEO, out_channels=4), 2),
    "refiner": lambda: networks.unet(REFINER, networks.SCORE),
    "upscaler": lambda: networks.upscaler(UPSCALER),
    "second stage": lambda: networks.pixels(32, sample_size=8, **SECOND),
    "pixels": lambda: networks.pixels(32, sample_size=8, **SMALL),
    "transformer": dit,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", TINY)
def test_both_libraries_predict_the_same(kind):
    found = networks.compare(kind, TINY[kind](), networks.Work(1))
    assert found.difference < 1e-5 and found.ratio == found.ours / found.theirs


def test_every_network_is_made_of_its_config():
    sizes = {name: twin().size for name, twin in networks.NETWORKS.items() if not name.startswith("if")}
    assert sizes["sd-xl"] == sizes["sd-xl-refiner"] == sizes["x4-upscaler"] == (128, 128)
    assert sizes["dit-xl-2-512"] == (64, 64) and sizes["videofusion"] == (16, 32, 32)


def test_prints_a_row_and_writes_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", dit)
    assert main(["tiny", "--repeats", "1", "--unpacked", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["results"]
    assert (found["batch"], found["repeats"], found["packed"]) == (2, 1, False)
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["size"] == [8, 8]
    assert "tiny" in capsys.readouterr().out


def first_stage() -> networks.Twin:
    return networks.pixels(32, sample_size=8, **SMALL)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_libraries_in_processes_of_their_own_and_loading(tmp_path, capsys, monkeypatch):
    """Small networks take less than the process itself, which the exit code says."""
    monkeypatch.setitem(networks.NETWORKS, "tiny", first_stage)
    folder, out = tmp_path / "files", tmp_path / "out.json"
    folder.mkdir()
    asked = ["tiny", "--repeats", "1", "--apart", "--loading", str(folder), "--json", str(out)]
    assert main(asked) == 1
    (row,) = json.loads(out.read_text())["results"]
    assert row["difference"] < 1e-5 and row["ours"] > 0 and row["theirs"] > 0 and row["loading"] > 1.25
    assert f"; loading: {row['loading']:.2f} of the weights" in capsys.readouterr().out
    assert not [*folder.iterdir()]


def test_our_network_is_loaded_from_the_file_that_is_measured(tmp_path):
    """Under diffusers' names and under ours."""
    for make in (first_stage, dit):
        twin, path = make(), tmp_path / f"{make.__name__}.safetensors"
        networks._write(make, path)
        network, _ = twin.networks()
        found = networks.load_network(twin.ours, twin.renamed if twin.foreign else None, path)
        assert found.weights == sum(value.nbytes for value in network.state_dict().values())
        assert read_checkpoint(path).keys() == twin.stored().keys() and twin.foreign == (make is first_stage)
        assert twin.foreign == (twin.stored().keys() != network.state_dict().keys())


def test_a_stage_of_deepfloyd_if_by_its_folder(tmp_path, capsys):
    (tmp_path / "unet").mkdir()
    described = networks.pixels(32, sample_size=8, **SECOND).settings
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **described}))
    assert main([str(tmp_path), "--repeats", "1"]) == 0
    assert "8 x 8" in capsys.readouterr().out
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "NETWORK: not the config.json of a stage of DeepFloyd-IF" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["vqgan"], "NETWORK: expected sd-v1, sd-xl, sd-xl-refiner, x4-upscaler, dit-xl-2-256"),
        (["dit", "--size", "16", "16"], "--size: x must have shape ('B', 4, 8, 8) for this network"),
        (["dit", "--size", "16", "16", "--apart"], "--size: x must have shape ('B', 4, 8, 8) for this network"),
        (["dit", "--json", f"{__file__}/out.json"], "--json: can't write"),
        (["dit", "--loading", "missing"], "--loading: missing: no such directory"),
    ],
)
def test_bad_input(capsys, monkeypatch, arguments, why):
    monkeypatch.setitem(networks.NETWORKS, "dit", dit)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1
