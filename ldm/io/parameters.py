"""The settings of an image as the PNG text `parameters`, in the format of AUTOMATIC1111's web UI.

Many programs read it:

    a red heart, noto style
    Negative prompt: grey
    Steps: 50, Sampler: DDIM, CFG scale: 2.0, Seed: 42, Size: 64x64, Model hash: 0123456789, Model: model, ...

Those programs draw other noise, so the same settings do not give the same image there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

# Our sampler names -> the names that readers know; other names stay.
SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm-solver++": "DPM++ 2M",
    "dpm-solver++-published": "DPM++ 2M",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
}
SCHEDULES = {"karras": "Karras", "logsnr": "Exponential"}  # our spacings -> the names that readers know
# The fields of the last line: name -> our setting, and how its value is written.
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Steps": ("steps", str),
    "Sampler": ("sampler", lambda name: SAMPLERS.get(name, name)),
    "Schedule type": ("spacing", lambda name: SCHEDULES.get(name, name)),
    "Timesteps": ("timesteps_at", lambda timesteps: ",".join(map(str, timesteps))),
    "CFG scale": ("scale", str),
    "Seed": ("seed", itemgetter(0)),
    "Size": ("size", str),
    "Model hash": ("weights", lambda digest: digest[:10]),
    "Model": ("ckpt", lambda file: PurePosixPath(file).stem),
    "Eta": ("eta", str),
    "Denoising strength": ("strength", str),
    "Key steps": ("keys", lambda keys: ",".join(map(str, keys))),
    "Propagate": ("propagate", str),
    "Prior noise": ("noise_weight", str),
    "Sample": ("sample", str),
}


def parameters(settings: Mapping[str, Any]) -> str:
    """The text for an image with these settings: those of its item, its model files and its sampler."""
    if "width" in settings:
        settings = {**settings, "size": f"{settings['width']}x{settings['height']}"}
    given = {key: value for key, value in settings.items() if value is not None}  # without keys, a plain run
    last = [f"{name}: {_quoted(str(of(given[key])))}" for name, (key, of) in FIELDS.items() if key in given]
    negative = settings.get("negative_prompt")
    return "\n".join(
        [
            settings.get("prompt", ""),
            *([f"Negative prompt: {negative}"] if negative else []),
            ", ".join([*last, "Version: Faster Diffusion"]),
        ]
    )


def _quoted(text: str) -> str:
    """A value with characters that would end its field stands in quotes, as readers expect."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
