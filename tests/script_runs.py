"""Running the sampling scripts in this process, and published models at a tiny width for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_vocabulary import write_vocabulary
from contracts import recipe_weights
from omegaconf import OmegaConf
from PIL import Image
from tiny_clip import TINY_OPEN, TINY_TEXT
from txt2img_model import load_script

from ldm.checkpoint import save_weights
from ldm.sampling.generate import read_manifest
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
CODEBOOK = "first_stage_model.quantize.embedding.weight"
DEPTH_BIAS = "depth_model.model.scratch.output_conv.4.bias"
EMOJI64 = ROOT / "models" / "ldm" / "emoji64"


def tiny_model(folder: Path, published: str, latent: int = 8, **params: Any) -> list[str]:
    """The model of a published config, narrow, with one block per level and random weights; its files as arguments.

    Args:
        published: path of the config in the project.
        latent: height and width of its latents.
        params: other values in params.PATH, dots as __.
    """
    config = OmegaConf.load(ROOT / published)
    model = config.model.params
    model.image_size, model.use_ema = latent, False
    model.unet_config.params.update(image_size=latent, model_channels=32, num_res_blocks=1)
    if "n_embed" in model.first_stage_config.params:
        model.first_stage_config.params.n_embed = 1024
    model.first_stage_config.params.ddconfig.update(ch=32, num_res_blocks=1)
    for name, value in params.items():
        OmegaConf.update(model, name.replace("__", "."), value, force_add=True)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml")
    weights = recipe_weights(instantiate_from_config(config.model), seed=1, gain=0.6)
    state = weights.state_dict()
    if CODEBOOK in state:
        state[CODEBOOK] *= 10  # as wide as the latents of a random network, lest all become the same few codes
    if DEPTH_BIAS in state:
        state[DEPTH_BIAS] += 1  # the depth of a random network may be nowhere above 0, and is cut off there
    save_weights(folder / "model.safetensors", state)
    return ["--config", str(folder / "config.yaml"), "--ckpt", str(folder / "model.safetensors")]


def tiny_text_model(folder: Path, published: str, **params: Any) -> list[str]:
    """The same of a model of Stable Diffusion 1 or 2, whose text encoder reads words of the golden prompts."""
    model = OmegaConf.load(ROOT / published).model.params
    open_clip = model.cond_stage_config.target.endswith("FrozenOpenCLIPEmbedder")
    encoder = {"arch": TINY_OPEN} if open_clip else {"version": TINY_TEXT}
    encoder["vocabulary"] = str(write_vocabulary(folder))
    if "num_head_channels" in model.unet_config.params:
        params["unet_config__params__num_head_channels"] = 16
    return tiny_model(
        folder, published, unet_config__params__context_dim=16, cond_stage_config__params=encoder, **params
    )


class Script:
    """A script's main with arguments that every call has; its pictures in folder / out."""

    def __init__(self, name: str, folder: Path, *common: str):
        self.name, self.folder, self.out = name, folder, folder / "out"
        self.main: Callable[[list[str]], int] = load_script(name).main
        self.common = [*common, "--outdir", str(self.out)]

    def __call__(self, *arguments: str) -> list[dict[str, Any]]:
        """Run it; the entries of the manifest that are new."""
        before = len(self.entries())
        assert self.main([*self.common, *arguments]) == 0
        return self.entries()[before:]

    def entries(self) -> list[dict[str, Any]]:
        return read_manifest(self.out / "manifest.jsonl")

    def pixels(self, entry: dict[str, Any]) -> np.ndarray:
        """(H, W, 3) levels."""
        return np.asarray(Image.open(self.out / entry["file"])).astype(int)

    def refusal(self, capsys: pytest.CaptureFixture, *arguments: str) -> str:
        """Run it; it must refuse in one line and leave nothing; that line."""
        kept = sorted(self.folder.rglob("*"))
        capsys.readouterr()
        assert self.main([*self.common, *arguments]) == 2
        output = capsys.readouterr()
        (line,) = output.err.splitlines()
        assert output.out == "" and sorted(self.folder.rglob("*")) == kept
        start = f"{self.name}.py: error: "
        assert line.startswith(start)
        return line.removeprefix(start)


def check_batches(script: Script, one: Sequence[str], other: Sequence[str]) -> list[np.ndarray]:
    """Two calls that differ in their batches alone make the same pictures, to a level; these."""
    shown = [script.pixels(entry) for entry in script(*one)]
    for path in (script.out / "samples").iterdir():
        path.unlink()
    script(*other)
    for entry, before in zip(script.entries(), shown, strict=True):
        assert np.abs(script.pixels(entry) - before).max() <= 1
    return shown


def check_resume(script: Script, capsys: pytest.CaptureFixture, *arguments: str) -> None:
    """A second run finds all pictures and touches none; a lost one is made again, the same."""
    first = script(*arguments)
    files = {path: path.stat().st_mtime_ns for path in script.out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert script(*arguments) == []
    assert f"({0} made, {len(first)} found)" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in script.out.rglob("*") if path.is_file()}
    lost = script.out / first[-1]["file"]
    before = script.pixels(first[-1])
    lost.unlink()
    script(*arguments)
    assert f"(1 made, {len(first) - 1} found)" in capsys.readouterr().out
    assert np.abs(script.pixels(first[-1]) - before).max() <= 1
