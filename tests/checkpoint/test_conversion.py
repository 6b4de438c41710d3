"""CompVis and diffusers layouts of Stable Diffusion, held to the published keys and to the diffusers library."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoint import CheckpointError, fingerprint, read_checkpoint, save_weights
from ldm.checkpoint.conversion import (
    CLIP,
    NOT_IN_FOLDERS,
    OPENCLIP,
    UNET,
    VAE,
    ConversionError,
    diffusers_configs,
    is_openclip,
    to_diffusers,
    to_ldm,
    unet_to_diffusers,
)
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import DDPM
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers.clip_vocabulary import write_vocabulary
from tests.helpers.goldens import recipe_tensor, recipe_weights
from tests.helpers.paths import GOLDENS, ROOT
from tests.helpers.scripts import Script, load_script
from tests.helpers.tiny_models import tiny_model

MODELS = json.loads(gzip.decompress((GOLDENS / "state_dicts.json.gz").read_bytes()))
PUBLISHED = ["sd_v1", "sd_v2_base"]
LOST = {
    "sd_v1": {f"{CLIP}embeddings.position_ids"},
    "sd_v2_base": {f"{OPENCLIP}text_projection", f"{OPENCLIP}logit_scale"},
}
convert = load_script("convert").main


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


# The published models, by name and shape


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> tuple[str, dict, dict[str, Tensor]]:
    model = MODELS[request.param]
    params = OmegaConf.to_container(OmegaConf.load(ROOT / model["config"]).model.params)
    return request.param, params, {k: torch.empty(shape, device="meta") for k, (shape, _) in model["keys"].items()}


def test_every_published_key_has_its_place(published):
    name, _, state = published
    back = to_ldm(to_diffusers(state), is_openclip(state))
    schedule = {key for key in state if "." not in key}
    assert len(schedule) == 12 and state.keys() - back.keys() == schedule | LOST[name]
    assert shapes(back).items() <= shapes(state).items()


def test_the_other_side_has_the_names_and_shapes_that_diffusers_builds(published):
    _, params, state = published
    parts = to_diffusers(state)
    configs = diffusers_configs(params, parts, is_openclip(state))
    with torch.device("meta"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder"])),
        }
    for part, model in theirs.items():
        ours = {key.removeprefix("text_model."): shape for key, shape in shapes(parts[part]).items()}
        assert ours == {k.removeprefix("text_model."): s for k, s in shapes(model.state_dict()).items()}, part


# Small models of the same topology, by what they compute


class OpenClipText(nn.Module):
    """OpenCLIP's text encoder in its own names, up to the layer before the last."""

    def __init__(self, width: int = 64, layers: int = 3, vocabulary: int = 90, length: int = 7):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.ln_final = nn.LayerNorm(width)
        blocks = [
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": nn.MultiheadAttention(width, max(1, width // 64), batch_first=True),
                    "ln_2": nn.LayerNorm(width),
                    "mlp": nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}),
                }
            )
            for _ in range(layers)
        ]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        later = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer["resblocks"][:-1]:
            h = block["ln_1"](x)
            x = x + block["attn"](h, h, h, attn_mask=later, need_weights=False)[0]
            x = x + block["mlp"]["c_proj"](nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x))))
        return self.ln_final(x)


class Small:
    """A model of each published kind with 4 levels, at a fraction of the width."""

    def __init__(self, kind: str):
        heads = {
            "sd_v1": {"num_heads": 2, "legacy": False},
            "sd_v2_base": {"num_head_channels": 8, "use_linear_in_transformer": True, "legacy": False},
        }[kind]
        self.unet_params = {
            "image_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": 2,
            "attention_resolutions": [4, 2, 1],
            "channel_mult": [1, 2, 2, 2],
            "use_spatial_transformer": True,
            "transformer_depth": 1,
            "context_dim": 64,
            **heads,
        }
        self.vae_params = {
            "embed_dim": 4,
            "ddconfig": {
                "double_z": True,
                "z_channels": 4,
                "resolution": 64,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2, 2, 2],
                "num_res_blocks": 2,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
        }
        self.params = {
            "image_size": 8,
            "scale_factor": 0.18215,
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "parameterization": "eps" if kind == "sd_v1" else "v",
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": self.unet_params},
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": self.vae_params},
            "cond_stage_config": {
                "target": f"ldm.modules.encoders.modules.Frozen{'' if kind == 'sd_v1' else 'Open'}CLIPEmbedder"
            },
        }
        self.unet = recipe_weights(UNetModel(**self.unet_params), seed=3, gain=0.8)
        self.vae = recipe_weights(AutoencoderKL(**self.vae_params), seed=4)
        self.text = recipe_weights(OpenClipText(), seed=5) if kind == "sd_v2_base" else None
        self.tokens = torch.tensor([[1, 5, 7, 9, 2, 2, 2], [1, 8, 6, 4, 3, 89, 2]])
        text = self.text.state_dict() if self.text else clip_weights()
        prefixes = {UNET: self.unet.state_dict(), VAE: self.vae.state_dict(), OPENCLIP if self.text else CLIP: text}
        self.state = {prefix + key: v for prefix, weights in prefixes.items() for key, v in weights.items()}

    def files(self, folder: Path) -> tuple[str, str]:
        """Config and checkpoint."""
        model = {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": self.params}
        OmegaConf.save(OmegaConf.create({"model": model}), folder / "c.yaml")
        extra = {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}
        save_weights(folder / "m.safetensors", self.state | extra)
        return str(folder / "c.yaml"), str(folder / "m.safetensors")


def clip_weights(layers: int = 2, width: int = 64) -> dict[str, Tensor]:
    """Random weights of a CLIP text encoder in its published names."""
    linear = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "self_attn.v_proj": (width, width),
        "self_attn.out_proj": (width, width),
        "mlp.fc2": (width, 4 * width),
        "layer_norm1": (width,),
        "layer_norm2": (width,),
    }
    sizes = {
        "embeddings.token_embedding.weight": (90, width),
        "embeddings.position_embedding.weight": (7, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        for name, size in linear.items():
            sizes |= {f"encoder.layers.{i}.{name}.weight": size, f"encoder.layers.{i}.{name}.bias": size[:1]}
    return {key: recipe_tensor(key, size, seed=6, gain=1.0) for key, size in sizes.items()}


@pytest.fixture(scope="module", params=["sd_v1", "sd_v2_base"])
def converted(request, tmp_path_factory) -> tuple[Small, Path]:
    """A small model, and the folder that the script makes of it."""
    small, folder = Small(request.param), tmp_path_factory.mktemp(request.param)
    config, ckpt = small.files(folder)
    assert convert([ckpt, "--to", "diffusers", "--config", config, "--out", str(folder / "out")]) == 0
    return small, folder / "out"


@torch.no_grad()
def test_diffusers_computes_the_same_from_the_folder(converted):
    small, folder = converted
    random = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 7, 64, generator=random)
    t = torch.tensor([3, 700])
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    torch.testing.assert_close(unet(x, t, context).sample, small.unet(x, t, context), rtol=1e-4, atol=1e-4)

    images = torch.randn(1, 3, 32, 32, generator=random)
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    torch.testing.assert_close(vae.encode(images).latent_dist.mean, small.vae.encode(images).mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(x[:1]).sample, small.vae.decode(x[:1]), rtol=1e-4, atol=1e-4)

    text, info = transformers.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if small.text is None:
        theirs = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
        assert theirs.keys() == clip_weights().keys()
        assert all(torch.equal(theirs[key], value) for key, value in clip_weights().items())
        assert text.config.hidden_act == "quick_gelu"
    else:
        torch.testing.assert_close(
            text.eval()(small.tokens).last_hidden_state, small.text(small.tokens), rtol=1e-4, atol=1e-4
        )

    schedule = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ours = DDPM(small.params["unet_config"], linear_start=0.00085, linear_end=0.012, use_ema=False)
    torch.testing.assert_close(schedule.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=0)
    assert schedule.config.prediction_type == ("epsilon" if small.text is None else "v_prediction")


def assert_same_model(state: dict[str, Tensor], small: Small) -> None:
    lost = {key for key in small.state if NOT_IN_FOLDERS.fullmatch(key)}
    assert state.keys() == small.state.keys() - lost
    unused = f"{OPENCLIP}transformer.resblocks.2."
    for key, value in state.items():
        expected = torch.zeros_like(value) if key.startswith(unused) else small.state[key]
        assert torch.equal(value, expected), key


def test_a_folder_comes_back_as_it_was(converted, tmp_path):
    small, folder = converted
    assert_same_model(read_checkpoint(folder), small)
    assert convert([str(folder), "--to", "ldm", "--out", str(tmp_path / "back.safetensors")]) == 0
    assert_same_model(read_checkpoint(tmp_path / "back.safetensors"), small)


def test_a_folder_that_diffusers_wrote_is_read(converted, tmp_path):
    small, folder = converted
    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    for part, kind in kinds.items():
        kind.from_pretrained(folder, subfolder=part).save_pretrained(tmp_path / part)
    assert_same_model(read_checkpoint(tmp_path), small)


def test_older_names_and_files_are_read(converted, tmp_path):
    """Attention of the first stage under its older names, text keys with positions, pickles of .bin files."""
    small, folder = converted
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for part in ("unet", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        state = load_file(next((folder / part).glob("*.safetensors")))
        if part == "vae":
            for new, old in older.items():
                state = {key.replace(f"attentions.0.{new}", f"attentions.0.{old}"): v for key, v in state.items()}
            assert any(".query." in key for key in state)
        if part == "text_encoder":
            state["text_model.embeddings.position_ids"] = torch.arange(7)[None]
            (tmp_path / part / "config.json").write_text((folder / part / "config.json").read_text())
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(state, tmp_path / part / f"{stem}.bin")
    assert_same_model(read_checkpoint(tmp_path), small)
    assert fingerprint(tmp_path) != fingerprint(folder)


# A script on a folder


@pytest.mark.parametrize(
    "published, text",
    [
        (
            "v1-inference",
            {
                "version": {
                    "vocab_size": 49408,
                    "hidden_size": 64,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 1,
                    "max_position_embeddings": 77,
                    "hidden_act": "quick_gelu",
                }
            },
        ),
        (
            "v2-inference",
            {
                "arch": {
                    "embed_dim": 64,
                    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
                }
            },
        ),
    ],
)
def test_a_script_takes_a_folder(tmp_path, published, text):
    """The images are those of the checkpoint that the folder was made of."""
    _, config, _, ckpt = files = tiny_model(
        tmp_path / "m",
        f"configs/stable-diffusion/{published}.yaml",
        unet_config__params__context_dim=64,
        **({} if published == "v1-inference" else {"unet_config__params__num_head_channels": 8}),
        cond_stage_config__params=text | {"vocabulary": str(write_vocabulary(tmp_path))},
    )
    folder = tmp_path / "f"
    assert convert([ckpt, "--to", "diffusers", "--config", config, "--out", str(folder)]) == 0
    made = []
    for name, weights in (("file", ckpt), ("folder", str(folder))):
        script = Script(
            "txt2img",
            tmp_path / name,
            *files[:2],
            "--ckpt",
            weights,
            "--prompt",
            "a cat",
            "--steps",
            "2",
            "--n_samples",
            "1",
        )
        (entry,) = script()
        made.append(script.pixels(entry))
    assert made[0].std() > 1 and (made[0] == made[1]).all()


# Bad input


@pytest.fixture
def folder(tmp_path) -> Path:
    """The smallest folder with three parts."""
    small = Small("sd_v1")
    (tmp_path / "s").mkdir()
    config, ckpt = small.files(tmp_path / "s")
    assert convert([ckpt, "--to", "diffusers", "--config", config, "--out", str(tmp_path / "f")]) == 0
    return tmp_path / "f"


@pytest.mark.parametrize(
    "part, name", [("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")]
)
def test_a_missing_part_is_named(folder, part, name, capsys):
    (folder / part / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"without {part}/{name}.safetensors"):
        read_checkpoint(folder)
    capsys.readouterr()
    out = folder.parent / "out.safetensors"
    assert convert([str(folder), "--to", "ldm", "--out", str(out)]) == 2 and not out.exists()
    error = capsys.readouterr().err
    assert error.startswith("convert.py: error: source:") and f"without {part}/" in error and error.count("\n") == 1


@pytest.mark.parametrize("text, why", [("{}", "KeyError"), ('{"hidden_act": "relu"}', "relu"), ("[", "not JSON")])
def test_a_text_encoder_of_another_kind_is_refused(folder, text, why):
    (folder / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config.json: expected JSON with hidden_act quick_gelu or gelu.*{why}"):
        read_checkpoint(folder)


def test_keys_of_another_model_are_named(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"add_embedding.linear_1.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="unet: keys .* do not have .add_embedding.linear_1.weight"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"model.diffusion_model.label_emb.weight": torch.zeros(2)}, "unet: keys .*label_emb.weight"),
        ({"first_stage_model.encoder.down.0.attn.0.q.weight": torch.zeros(2)}, "vae: keys .*attn.0.q.weight"),
        ({"cond_stage_model.transformer.token_emb.weight": torch.zeros(2)}, "text_encoder: keys .*token_emb"),
        ({"depth_model.a.b": torch.zeros(2)}, "keys .*depth_model.a.b"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change, why):
    with pytest.raises(ConversionError, match=why):
        to_diffusers(Small("sd_v1").state | change)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_other_numbers_are_refused(dtype):
    key = "model.diffusion_model.out.2.bias"
    state = Small("sd_v1").state
    with pytest.raises(
        ConversionError, match=f"unet: weights that are not floating-point numbers .conv_out.bias {dtype}"
    ):
        to_diffusers(state | {key: state[key].to(dtype)})


def test_a_checkpoint_without_a_part_is_refused():
    state = {key: value for key, value in Small("sd_v1").state.items() if not key.startswith(VAE)}
    with pytest.raises(ConversionError, match=r"vae: the checkpoint has no weights named first_stage_model\.\*"):
        to_diffusers(state)


@pytest.mark.parametrize(
    "args, why",
    [
        (["m", "--to", "diffusers", "--out", "o"], "--config: needed"),
        (["m", "--to", "ldm", "--out", "o"], "source: m: no such folder"),
        (["m", "--to", "ldm", "--out", "o", "--weights", "ema"], "--config, --weights: only with --to diffusers"),
        (["m", "--to", "diffusers", "--config", "c.yaml", "--out", "."], "--out: . exists"),
        (["m", "--to", "diffusers", "--config", "c.yaml", "--out", "o"], "--config: c.yaml: no such file"),
        (["m", "--to", "a1111", "--out", "o"], "--to: invalid choice: 'a1111'"),
    ],
)
def test_bad_arguments(args, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(args) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_folder_with_a_network_of_videos_is_read(converted, tmp_path):
    """VideoFusion: the other parts are those of Stable Diffusion."""
    _, folder = converted
    shutil.copytree(folder, tmp_path / "video")
    theirs = {
        "transformer_in.norm.weight": (8,),
        "down_blocks.0.resnets.0.norm1.weight": (8,),
        "down_blocks.0.temp_attentions.0.proj_in.weight": (8, 8),
        "down_blocks.1.resnets.0.norm1.weight": (8,),
    }
    unet = tmp_path / "video" / "unet" / "diffusion_pytorch_model.safetensors"
    save_weights(unet, {key: torch.ones(shape) for key, shape in theirs.items()})
    state = read_checkpoint(tmp_path / "video")
    found = {key: tuple(value.shape) for key, value in state.items() if key.startswith("model.")}
    assert found == {
        "model.diffusion_model.input_blocks.0.1.norm.weight": (8,),
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (8,),
        "model.diffusion_model.input_blocks.1.2.proj_in.weight": (8, 8, 1),
        "model.diffusion_model.input_blocks.3.0.in_layers.0.weight": (8,),
    }
    assert any(key.startswith("first_stage_model.") for key in state)


def test_a_transformer_is_no_unet():
    with pytest.raises(ConversionError, match=r"no input_blocks.*: not a UNet \(blocks.0.attn.qkv.weight\)"):
        unet_to_diffusers({"blocks.0.attn.qkv.weight": torch.ones(1)})
