"""The two layouts of SDXL's weights, held to published names and to the diffusers library."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ldm.checkpoint import CheckpointError, diffusion_params, load_model, read_checkpoint, save_weights
from ldm.checkpoint.conversion import UNET, VAE, ConversionError, openclip_to_diffusers, unet_to_diffusers
from ldm.checkpoint.conversion_xl import VECTOR, configs, to_diffusers, to_ldm
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder2
from tests.helpers.goldens import load_case, recipe_weights
from tests.helpers.paths import GOLDENS, ROOT
from tests.helpers.scripts import load_script
from tests.helpers.tiny_xl import tiny_xl

MODELS = json.loads(gzip.decompress((GOLDENS / "state_dicts.json.gz").read_bytes()))
NOT_OURS = ("logit_scale", "position_ids")
convert = load_script("convert").main


@pytest.mark.parametrize("name", ["sdxl_unet", "sdxl_unet_refiner"])
def test_every_weight_of_the_network_has_its_published_name(name):
    case, _ = load_case(name)
    state = {ours: torch.tensor(float(i)) for i, ours in enumerate(case["diffusers_to_compvis_keys"].values())}
    theirs = unet_to_diffusers(state, VECTOR)
    assert theirs == {key: state[ours] for key, ours in case["diffusers_to_compvis_keys"].items()}


@pytest.mark.parametrize("name, parts", [("sdxl_base", 4), ("sdxl_refiner", 3)])
def test_every_published_key_has_its_place(name, parts):
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in MODELS[name]["keys"].items()}
    folder = to_diffusers(state | {"denoiser.sigmas": torch.empty(1000)})
    back = to_ldm(folder)
    assert len(folder) == parts and {key.rpartition(".")[2] for key in state.keys() - back.keys()} <= set(NOT_OURS)
    assert all(value.shape == state[key].shape for key, value in back.items())
    described = configs(diffusion_params(ROOT / MODELS[name]["config"]), folder)["unet"]
    published = load_case("sdxl_unet")[0]["diffusers_config"].keys()
    assert published <= described.keys()
    assert described["projection_class_embeddings_input_dim"] == len(folder["unet"]["add_embedding.linear_1.weight"].T)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    assert convert([files[3], "--to", "diffusers", "--config", files[1], "--out", str(out)]) == 0
    return out


@torch.no_grad()
def test_diffusers_computes_the_same_from_the_folder(files, folder):
    model = load_model(files[1], files[3])
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    random = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 7, 32, generator=random)
    pooled, sizes = torch.randn(2, 8, generator=random), torch.tensor([[64, 80, 3, 5, 64, 64], [9, 80, 0, 0, 64, 32]])
    numbers = dict(zip(model.conditioner.numbers, sizes.float().split(2, dim=1), strict=True))
    y, t = model.conditioner.vector(pooled, numbers), torch.tensor([3, 700])
    expected = unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    torch.testing.assert_close(model.model.diffusion_model(x, t, context, y), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_computes_the_same_of_the_second_text_encoder():
    text = {"context_length": 7, "vocab_size": 90, "width": 64, "heads": 1, "layers": 3}
    ours = recipe_weights(FrozenOpenCLIPEmbedder2({"embed_dim": 8, "text_cfg": text}, max_length=7), seed=3)
    state = ours.model.state_dict()
    kept = {key: value for key, value in state.items() if key not in ("text_projection", "logit_scale")}
    named = openclip_to_diffusers(kept, unused=0) | {"text_projection.weight": state["text_projection"].T}
    sizes = {"vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 256, "max_position_embeddings": 7, "projection_dim": 8, "hidden_act": "gelu"}
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes, eos_token_id=89)).eval()
    prefix = "text_model." if any(key.startswith("text_model.") for key in theirs.state_dict()) else ""
    state = {key if "projection" in key else prefix + key: value for key, value in named.items()}
    assert not theirs.load_state_dict(state, strict=False).missing_keys
    tokens = torch.tensor([[1, 5, 7, 89, 0, 0, 0], [1, 8, 6, 4, 3, 89, 0]])
    result = theirs(input_ids=tokens, output_hidden_states=True)
    hidden, pooled = ours(tokens)
    torch.testing.assert_close(hidden, result.hidden_states[-2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, result.text_embeds, rtol=1e-4, atol=1e-4)


def test_a_folder_comes_back_as_it_was(files, folder, tmp_path):
    published, back = read_checkpoint(files[3]), read_checkpoint(folder)
    assert {key for key in published.keys() - back.keys() if "." in key and not key.endswith(NOT_OURS)} == set()
    assert all(torch.equal(value, published[key]) for key, value in back.items())
    assert convert([str(folder), "--to", "ldm", "--out", str(tmp_path / "back.safetensors")]) == 0
    assert load_file(tmp_path / "back.safetensors").keys() == back.keys()
    assert load_model(files[1], folder).conditioner.text_encoders


def test_a_refiner_has_one_text_encoder(tmp_path):
    config, ckpt = tiny_xl(tmp_path / "m", "refiner")[1::2]
    assert convert([ckpt, "--to", "diffusers", "--config", config, "--out", str(tmp_path / "out")]) == 0
    assert sorted(part.name for part in (tmp_path / "out").iterdir()) == ["scheduler", "text_encoder_2", "unet", "vae"]
    assert load_model(config, tmp_path / "out").refines


# Bad input


def test_a_missing_part_is_named(folder, files, tmp_path, capsys):
    weights = folder / "text_encoder_2" / "model.safetensors"
    kept = weights.rename(tmp_path / "kept")
    try:
        with pytest.raises(CheckpointError, match=r"without text_encoder_2/model.safetensors .*text_encoder_2/, any"):
            read_checkpoint(folder)
    finally:
        kept.rename(weights)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"conditioner.embedders.1.model.text_projection": None}, "text_encoder_2: without text_projection"),
        ({"conditioner.embedders.0": None}, r"text_encoder: .*no weights named conditioner.embedders.0.transformer"),
        ({VAE: None}, r"vae: the checkpoint has no weights named first_stage_model\.\*"),
        ({UNET + "label_emb.weight": torch.zeros(2)}, "unet: keys that these models do not have .*label_emb.weight"),
        ({"depth_model.a": torch.zeros(2)}, "keys that Stable Diffusion models do not have: depth_model.a"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, why, files):
    state = read_checkpoint(files[3])
    for key, value in change.items():
        state = {name: own for name, own in state.items() if value is not None or not name.startswith(key)}
        state |= {} if value is None else {key: value}
    with pytest.raises(ConversionError, match=why):
        to_diffusers(state)


def test_a_checkpoint_without_the_projection_is_refused(files, tmp_path):
    """Other models do not use theirs, so it may be missing there."""
    state = {key: value for key, value in read_checkpoint(files[3]).items() if not key.endswith("text_projection")}
    save_weights(tmp_path / "m.safetensors", state)
    with pytest.raises(CheckpointError, match="1 missing .conditioner.embedders.1.model.text_projection"):
        load_model(files[1], tmp_path / "m.safetensors")
