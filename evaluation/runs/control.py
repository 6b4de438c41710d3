"""What a control network follows in a run: edges or scribbles of the real images that the prompts are captions of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageOps
from torch import Tensor

from evaluation.protocols.protocol import Prompt, Protocol
from evaluation.runs.images import ImageArray, ImageFolder, captioned_images
from ldm.cli.parser import cli
from ldm.cli.setup import Setup
from ldm.io.errors import fault_of
from ldm.io.images import to_pil
from ldm.sampling.control import ControlInput, ControlledBy


@dataclass(frozen=True)
class Hints:
    """One for each prompt, made when it is asked for, of the image's centred square; see `ControlInput`."""

    images: ImageArray | ImageFolder
    kind: str
    hed: str | None  # weights of the network that finds what scribbles are made of
    side: int  # in pixels

    def __len__(self) -> int:
        return len(self.images.names)

    def __getitem__(self, places: Sequence[int]) -> Tensor:
        """(B, 3, side, side), RGB in [0, 1]."""
        settings = cli.control.ControlSettings((self.kind,), (), hed=self.hed)
        squares = (ImageOps.fit(to_pil(image[None])[0], (self.side,) * 2) for image in self.images.subset(places))
        drawn = (cli.control.drawn(settings, self.kind, square) for square in squares)
        return torch.stack([cli.control.conditions.as_hint(image) for image in drawn])


def controlled(protocol: Protocol, prompts: Sequence[Prompt], data: Path, setup: Setup) -> ControlledBy:
    """The model's network with the protocol's control network.
    Raises SettingError: `data`: images are not there; `control_model`: the file is none for this model."""
    with fault_of("data"):
        images = captioned_images(protocol, data, [prompt.image for prompt in prompts])
    files = protocol.added()
    network, name = cli.control.network(setup, str(files["control_model"][0]))
    hed = str(files["hed"][0]) if "hed" in files else None
    hints = Hints(images, protocol.control, hed, protocol.size)
    facts = {"control": {"kind": protocol.control, "images": images.sha256()}, "control_model": name}
    return ControlledBy([ControlInput(network, hints, 1.0, facts)])
