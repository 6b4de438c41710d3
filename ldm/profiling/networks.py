"""Networks at their published sizes, each beside the same of the diffusers library, on the same random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint import diffusion_params
from ldm.checkpoint.conversion import unet_config, unet_to_diffusers, unet_to_ldm, video_to_ldm
from ldm.checkpoint.conversion_xl import VECTOR, framed_unet_config
from ldm.checkpoint.deepfloyd import NETWORK, network_params, to_original
from ldm.io.files import find_file, read_json
from ldm.modules.diffusionmodules.dit import position_embedding
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.packed import pack
from ldm.profiling.loading import Loading, in_new_process, load_network, random_weights
from ldm.profiling.timing import alternate
from ldm.util import instantiate_from_config

TIMESTEP = 500
TOKENS = 77
NOISE_LEVEL = 250  # of the smaller image
SIZES = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)  # numbers that frame an image of SDXL
SCORE = (1024.0, 1024.0, 0.0, 0.0, 6.0)  # and of its refiner
NUMBER_WIDTH = 256  # of their embeddings
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Twin:
    """A network as both libraries have it.

    ours: its config, `target` and `params`.
    kind, settings: its class in diffusers, and the arguments of that.
    renamed: weights under diffusers' names -> under ours.
    size: of the latents: height and width, or frames, height and width.
    given: makes what the two networks take beside latents and timestep, for a number of latents.
    adapted: changes diffusers' network to what is published.
    foreign: the published file has diffusers' names.
    """

    ours: Mapping[str, Any]
    kind: str
    settings: Mapping[str, Any]
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    size: Sequence[int]
    given: Callable[[nn.Module, int], tuple[dict[str, Any], dict[str, Any]]]
    adapted: Callable[[nn.Module], None] = lambda peer: None
    foreign: bool = False

    def stored(self) -> dict[str, Tensor]:
        """The weights as the published file has them, without content."""
        with torch.device("meta"):
            if self.foreign:
                return getattr(diffusers, self.kind)(**self.settings).state_dict()
            return instantiate_from_config(self.ours).state_dict()

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Ours and diffusers'; they share what has the same layout in both."""
        torch.manual_seed(0)
        peer = getattr(diffusers, self.kind)(**self.settings).eval().requires_grad_(False)
        self.adapted(peer)
        with torch.device("meta"):
            network = instantiate_from_config(self.ours).eval()
        network.load_state_dict(self.renamed(peer.state_dict()), assign=True)
        return network.requires_grad_(False), peer


# What networks take, ours and diffusers'


def text(network: nn.Module, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text, of which ours makes keys and values once for a run."""
    context = torch.randn(batch, TOKENS, network.context_dim)
    return {"context": network.project(context)}, {"encoder_hidden_states": context}


def states(network: nn.Module, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """States of T5, of which ours makes context and embedding once for a run; of a second stage, also a noise level."""
    given = torch.randn(batch, TOKENS, network.encoder_dim)
    level = None if network.aug_proj is None else torch.full((batch,), NOISE_LEVEL)
    context, y = network.condition(given, level)
    extra = {"encoder_hidden_states": given} | ({} if level is None else {"class_labels": level})
    return {"context": network.project(context), "y": y}, extra


def framed_text(
    network: nn.Module, batch: int, framing: Sequence[float] = SIZES
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text with its own vector, and the numbers that frame the image."""
    own, extra = text(network, batch)
    pooled = torch.randn(batch, network.adm_in_channels - len(framing) * NUMBER_WIDTH)
    numbers = torch.tensor(framing).repeat(batch, 1)
    y = torch.cat([pooled, timestep_embedding(numbers.flatten(), NUMBER_WIDTH).view(batch, -1)], dim=1)
    return own | {"y": y}, extra | {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers}}


def labelled_text(network: nn.Module, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A text, and a label for each latent."""
    (own, extra), (label_, labels) = text(network, batch), label(network, batch)
    return own | label_, extra | labels


def label(network: nn.Module, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    y = torch.arange(batch)
    return {"y": y}, {"class_labels": y}


# The networks


def unet(params: Mapping[str, Any], framing: Sequence[float] = SIZES) -> Twin:
    """A UNet of Stable Diffusion, also XL; `params`: of the model, here and below."""
    ours, framed = params["unet_config"], "adm_in_channels" in params["unet_config"]["params"]
    more = VECTOR if framed else None
    given = partial(framed_text, framing=framing) if framed else text
    with torch.device("meta"):
        weights = unet_to_diffusers(instantiate_from_config(ours).state_dict(), more)
    settings = framed_unet_config(params, weights) if framed else unet_config(params, ours["params"], weights)
    renamed, size = partial(unet_to_ldm, more=more), (params["image_size"],) * 2
    return Twin(ours, settings.pop("_class_name"), settings, renamed, size, given)


def upscaler(params: Mapping[str, Any]) -> Twin:
    """A UNet of the x4 upscaler, whose label is the noise level of the smaller image."""
    ours, more = params["unet_config"], {"label_emb": "class_embedding"}
    with torch.device("meta"):
        weights = unet_to_diffusers(instantiate_from_config(ours).state_dict(), more)
    settings = unet_config(params, ours["params"], weights) | {
        "num_class_embeds": ours["params"]["num_classes"],
        "only_cross_attention": [*ours["params"]["disable_self_attentions"]],
    }
    renamed, size = partial(unet_to_ldm, more=more), (params["image_size"],) * 2
    return Twin(ours, settings.pop("_class_name"), settings, renamed, size, labelled_text)


def video(params: Mapping[str, Any], frames: int = 16) -> Twin:
    """A UNet of VideoFusion."""
    ours = params["unet_config"]["params"]
    attended = len(ours["channel_mult"]) - 1
    settings = {
        "block_out_channels": [ours["model_channels"] * m for m in ours["channel_mult"]],
        "layers_per_block": ours["num_res_blocks"],
        "cross_attention_dim": ours["context_dim"],
        "attention_head_dim": ours["num_head_channels"],
        "down_block_types": ["CrossAttnDownBlock3D"] * attended + ["DownBlock3D"],
        "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * attended,
    }
    size = (frames, *(params["image_size"],) * 2)
    return Twin(params["unet_config"], "UNet3DConditionModel", settings, video_to_ldm, size, text)


def pixels(width: int, **changes: Any) -> Twin:
    """The first stage of DeepFloyd-IF, whose first level has `width` channels."""
    settings = {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": [width * m for m in (1, 2, 3, 4)],
        "layers_per_block": 3,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
        "cross_attention_dim": 4 * width,
        "attention_head_dim": 64,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 64,
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    } | changes
    return described_pixels(settings)


def described_pixels(settings: Mapping[str, Any]) -> Twin:
    """A stage of DeepFloyd-IF by its description in diffusers."""
    params = network_params(settings)
    renamed, size = partial(to_original, network=params), (settings["sample_size"],) * 2
    ours, kept = {"target": NETWORK, "params": params}, {k: v for k, v in settings.items() if not k.startswith("_")}
    return Twin(ours, "UNet2DConditionModel", kept, renamed, size, states, foreign=True)


BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def transformer(params: Mapping[str, Any]) -> Twin:
    """A DiT."""
    p = params["unet_config"]["params"]
    width, side, patch, depth = p["hidden_size"], p["input_size"], p["patch_size"], p["depth"]
    names = ENDS | {f"transformer_blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in BLOCK.items()}

    def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = [(a, b, kind) for a, b in names.items() for kind in ("weight", "bias")]
        found = {f"{b}.{kind}": state[f"{a}.{kind}"] for a, b, kind in kinds if f"{a}.{kind}" in state}
        for i in range(depth):
            for kind in ("weight", "bias"):
                parts = [state[f"transformer_blocks.{i}.attn1.to_{part}.{kind}"] for part in "qkv"]
                found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
        return found | {"pos_embed": position_embedding(side // patch, width)}

    def adapted(peer: nn.Module) -> None:
        """One embedding for all blocks, with the published frequencies; diffusers has others, and a copy in each."""
        embedding = peer.transformer_blocks[0].norm1.emb
        embedding.time_proj.downscale_freq_shift = 0
        for block in peer.transformer_blocks:
            block.norm1.emb = embedding

    settings = {
        "sample_size": side,
        "patch_size": patch,
        "in_channels": p["in_channels"],
        "out_channels": 2 * p["in_channels"],
        "num_layers": depth,
        "num_attention_heads": p["num_heads"],
        "attention_head_dim": width // p["num_heads"],
        "num_embeds_ada_norm": p["num_classes"],
        "norm_eps": 1e-6,
    }
    return Twin(params["unet_config"], "DiTTransformer2DModel", settings, renamed, (side, side), label, adapted)


def published(make: Callable[[Mapping[str, Any]], Twin], config: str) -> Twin:
    """The network of one of our configs."""
    return make(diffusion_params(find_file(config)))


# A network is added here: its name, and what makes its twin. The widths of IF-I-L and IF-I-M are those that give their
# published numbers of weights.
NETWORKS: dict[str, Callable[[], Twin]] = {
    "sd-v1": partial(published, unet, "configs/stable-diffusion/v1-inference.yaml"),
    "sd-xl": partial(published, unet, "configs/stable-diffusion/sd_xl_base.yaml"),
    "sd-xl-refiner": partial(published, partial(unet, framing=SCORE), "configs/stable-diffusion/sd_xl_refiner.yaml"),
    "x4-upscaler": partial(published, upscaler, "configs/stable-diffusion/x4-upscaling.yaml"),
    "dit-xl-2-256": partial(published, transformer, "configs/dit/dit-xl-2-256.yaml"),
    "dit-xl-2-512": partial(published, transformer, "configs/dit/dit-xl-2-512.yaml"),
    "if-i-m": partial(pixels, 192),
    "if-i-l": partial(pixels, 320),
    "if-i-xl": partial(pixels, 704),
    "videofusion": partial(published, video, "configs/video/videofusion.yaml"),
}


def described(name: str) -> Callable[[], Twin] | None:
    """What makes the network of a name, or of the folder of a stage of DeepFloyd-IF; None = there is none.

    Raises:
        ValueError, OSError: the folder describes no stage.
    """
    if not (config := Path(name) / "unet" / "config.json").is_file():
        return NETWORKS.get(name)
    settings = read_json(config)
    network_params(settings)
    return partial(described_pixels, settings)


# Times and memory


@dataclass(frozen=True)
class Comparison:
    """One prediction by both libraries.

    weights: their number. size: of the latents.
    ours, theirs: seconds, medians. setting: how diffusers is fastest.
    difference: the largest of the two predictions, as a share of the largest value.
    """

    name: str
    weights: int
    size: Sequence[int]
    ours: float
    theirs: float
    setting: str
    difference: float

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


@dataclass(frozen=True)
class Work:
    """What is timed.

    repeats: timed predictions of each library, after one that is not.
    batch: latents, 2 for a guided prediction of one image.
    size: height and width of the latents; None = the network's.
    packed: our layers are packed, as in every run on a CPU, and have weights of their own.
    """

    repeats: int
    batch: int = 2
    size: Sequence[int] | None = None
    packed: bool = True

    def shape(self, twin: Twin) -> tuple[int, ...]:
        """The shape of a latent, without its channels."""
        return (*twin.size[:-2], *(self.size or twin.size[-2:]))

    def inputs(self, twin: Twin, network: nn.Module) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
        """Latents, timesteps, and what else our network takes, and diffusers'."""
        x = torch.randn(self.batch, network.in_channels, *self.shape(twin))
        return x, torch.full((self.batch,), TIMESTEP), *twin.given(network, self.batch)

    def call_of_ours(self, network: nn.Module, x: Tensor, t: Tensor, given: Mapping[str, Any]) -> Callable[[], Tensor]:
        """A prediction by our network, whose layers are packed for it."""
        if self.packed:
            pack(network, x.shape[-2:], None if network.context_dim is None else TOKENS)
        return lambda: network.decode(network.encode(x, t, **given), t, **given)


def call_of_theirs(peer: nn.Module, x: Tensor, t: Tensor, extra: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A prediction by diffusers' network."""
    return lambda: peer(x, t, **extra).sample


def count(network: nn.Module) -> int:
    """The number of its weights."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.inference_mode()
def compare(name: str, twin: Twin, work: Work) -> Comparison:
    """Time predictions of both libraries in turn.

    Raises:
        ValueError: a size that the network does not take.
    """
    network, peer = twin.networks()
    weights = count(network)
    x, t, given, extra = work.inputs(twin, network)
    calls = {"ours": work.call_of_ours(network, x, t, given), "theirs": call_of_theirs(peer, x, t, extra)}
    ours, theirs = (call() for call in calls.values())
    setting = fastest_format(peer, calls["theirs"])
    taken = alternate(calls, work.repeats)
    seconds = {which: taken[which].median for which in calls}
    return Comparison(name, weights, work.shape(twin), **seconds, setting=setting, difference=between(ours, theirs))


def between(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two predictions, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@dataclass(frozen=True)
class Alone:
    """What one library took; the prediction is an array, which goes from process to process."""

    weights: int
    seconds: float
    setting: str
    prediction: np.ndarray


def compare_apart(name: str, make: Callable[[], Twin], work: Work) -> Comparison:
    """The same, each library in a process of its own, one after the other: the weights of one are in memory at a time.

    Args:
        make: makes the twin; a process can be given it.
    """
    ours, theirs = (in_new_process(alone, make, work, which) for which in ("ours", "theirs"))
    difference = between(torch.from_numpy(ours.prediction), torch.from_numpy(theirs.prediction))
    shape = work.shape(make())
    return Comparison(name, ours.weights, shape, ours.seconds, theirs.seconds, theirs.setting, difference)


@torch.inference_mode()
def alone(make: Callable[[], Twin], work: Work, which: str) -> Alone:
    """Time predictions of one library; the other's network is let go of before the first."""
    twin = make()
    network, peer = twin.networks()
    weights, setting = count(network), ""
    x, t, given, extra = work.inputs(twin, network)
    if which == "ours":
        del peer
        call = work.call_of_ours(network, x, t, given)
    else:
        del network, given
        call = call_of_theirs(peer, x, t, extra)
    prediction = call()
    if which == "theirs":
        setting = fastest_format(peer, call)
    return Alone(weights, alternate({which: call}, work.repeats)[which].median, setting, prediction.numpy())


MOST_MEMORY = 1.25  # times the weights, at the peak of loading


def measure_loading(make: Callable[[], Twin], folder: str) -> Loading:
    """Load our network, in a new process, from a file of random weights as it is published.

    Args:
        make: see `compare_apart`.
        folder: where the file lies for that time.
    """
    twin = make()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path = Path(place) / "network.safetensors"
        in_new_process(_write, make, path)
        return in_new_process(load_network, twin.ours, twin.renamed if twin.foreign else None, path)


def _write(make: Callable[[], Twin], path: Path) -> None:
    save_file(random_weights(make().stored()), path)


def fastest_format(peer: nn.Module, call: Callable[[], Any]) -> str:
    """Leave diffusers' network in the memory format in which a second call is the fastest; that format's name."""
    seconds, flat = {}, all(parameter.ndim < 5 for parameter in peer.parameters())
    for name, memory in FORMATS.items() if flat else [("contiguous", FORMATS["contiguous"])]:
        peer.to(memory_format=memory)
        call()
        seconds[name] = alternate({name: call}, 1)[name].median
    best = min(seconds, key=seconds.get)
    peer.to(memory_format=FORMATS[best])
    return best
