"""Networks that make control images, from their published files: HED and MiDaS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoint.file import CheckpointError, read_checkpoint
from ldm.checkpoint.model import fill, unmade
from ldm.modules.hed import HED
from ldm.modules.midas.api import MiDaSInference

NUMBERS = {name: i for i, name in enumerate(("One", "Two", "Thr", "Fou", "Fiv"), start=1)}
OLDER = re.compile(r"(?:module|net)(Vgg|Score|Combine)(One|Two|Thr|Fou|Fiv)?\.?(\d*)\.?(weight|bias)")
DEPTH = ("depth_model.model.", "model.", "")  # what stands before the names of a depth network


def load_hed(path: str | Path) -> HED:
    """HED from either of its published files.

    Raises:
        OSError: no such file. CheckpointError: see `read_checkpoint`; or it is another network.
    """
    state = read_checkpoint(path)
    combined = "norm" not in state
    state = older_names(path, state) if combined else state
    network = unmade(lambda: HED(combined))
    fill(network, state, Path(path), "raw", assign=True)
    return network.eval().requires_grad_(False)


def older_names(path: str | Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The older network's weights under our names.

    Raises:
        CheckpointError: they are not those of HED.
    """
    named = {}
    for key, value in state.items():
        found = OLDER.fullmatch(key)
        if found is None:
            raise CheckpointError(f"{path}: not HED, which makes scribbles; it has weights {key}")
        part, stage, layer, kind = found.groups()
        if part == "Combine":
            named[f"combine.{kind}"] = value
        elif part == "Score":
            named[f"block{NUMBERS[stage]}.projection.{kind}"] = value
        else:  # of the layers, every second is an activation; all stages but the first begin with pooling
            named[f"block{NUMBERS[stage]}.convs.{int(layer) // 2}.{kind}"] = value
    return named


def load_midas(path: str | Path) -> MiDaSInference:
    """MiDaS (DPT-Hybrid) from its own file, or from that of a depth-to-image model of Stable Diffusion 2.

    Raises:
        OSError: no such file. CheckpointError: see `read_checkpoint`; or it is another network.
    """
    state = read_checkpoint(path)
    for prefix in DEPTH:
        if named := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix + "pretrained.")}:
            named |= {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix + "scratch.")}
            network = unmade(MiDaSInference)
            fill(network.model, named, Path(path), "raw", assign=True)
            return network.eval().requires_grad_(False)
    raise CheckpointError(f"{path}: not MiDaS (DPT-Hybrid), nor a depth-to-image model")
