"""Latent diffusion with encoder propagation (Faster Diffusion).

    import ldm

    model = ldm.load("emoji64")
    images = model.images(["a red heart, noto style"], plan="auto:9", seed=7)

docs/python.md has more. Importing the package imports nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ldm.api import Model


def load(
    name: str | Path | None = None,
    *,
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    device: str | torch.device = "auto",
    weights: str = "auto",
    precision: str | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    embedding: str | Path | Sequence[str | Path] = (),
    delta: str | Path | Sequence[str | Path] = (),
) -> Model:
    """A model to make images with; see `ldm.api.Model`.

    Args:
        name: a model of models/ldm, of models or of models/published.yaml, such as "emoji64", "rdm/emoji" or
            "sd-v1-5"; or a folder with a config.yaml and weights beside it. Weights are looked for from the working
            directory, then in the project.
        config, ckpt: the files of another model, in the place of its name; of a published model one of them is enough.
        device: auto, cpu, cuda, cuda:N or mps; or a torch.device.
        weights: "ema" or "raw", the averaged or the last weights of the UNet; "auto" = averaged if there are any.
        precision: "full" or "autocast" (the device's lower precision); None = autocast on cuda, else full.
        lora, embedding, delta: files that change a model that reads text, as the scripts take them
            (docs/personalization.md); "FILE:0.8" is a LoRA with the weight 0.8.

    Raises:
        FileNotFoundError: a file is not here; for a published model the message says where to get it.
        ValueError: no such model, or files that do not make one.
    """
    from ldm.api import load_by_name

    return load_by_name(name, config, ckpt, device, weights, precision, lora, embedding, delta)
