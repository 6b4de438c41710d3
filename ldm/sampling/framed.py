"""Text together with how the image is framed: the conditions of SDXL (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion, StableDiffusionXL, StableDiffusionXLInpaint
from ldm.models.diffusion.denoiser import Conditioning
from ldm.modules.encoders.tokenizer import AS_PUBLISHED, Reading
from ldm.sampling.generate import Item
from ldm.sampling.task import Text


@dataclass(frozen=True)
class Framing:
    """What the network is told of the picture; heights before widths, tops before lefts, in pixels.

    target:         the size that is to be made.
    original:       of the picture before it was cropped; a small one asks for the look of a small picture.
    crop:           where the crop begins; (0, 0) asks for what stands in the middle.
    score:          how much people like it, 0..10; the refiner is told this in the place of the target.
    negative_score: that of what guidance leads away from.
    """

    target: tuple[int, int]
    original: tuple[int, int]
    crop: tuple[int, int] = (0, 0)
    score: float = 6.0
    negative_score: float = 2.5

    def numbers(self, keys: Sequence[str], batch: int, device: torch.device, score: float) -> dict[str, Tensor]:
        """Those of the keys that a `GeneralConditioner` takes, each (batch, n)."""
        known = {
            "original_size_as_tuple": self.original,
            "crop_coords_top_left": self.crop,
            "target_size_as_tuple": self.target,
            "aesthetic_score": (score,),
        }
        return {key: torch.tensor([known[key]], dtype=torch.float32, device=device).repeat(batch, 1) for key in keys}


class FramedText(Text):
    """The items' prompts, and one framing for all of them.

    As published, guidance of the base model leads away from nothing at all where the negative prompt is empty: its
    text is zeros. The refiner reads the empty text, with a low score.

    Args:
        framing: of all images.
        negative, reading: see `Text`.
    """

    kind, key = "a text-to-image model of SDXL", "crossattn-adm"

    def __init__(self, framing: Framing, negative: str = "", reading: Reading = AS_PUBLISHED):
        super().__init__(negative, reading)
        self.framing = framing

    def settings(self) -> dict[str, Any]:
        framing = self.framing
        return super().settings() | {"original_size": [*framing.original], "crop": [*framing.crop]}

    def tokens(self, model: StableDiffusionXL) -> int:
        self._need(isinstance(model, StableDiffusionXL), f"it is a {type(model).__name__}")
        self._need(
            model.model.conditioning_key == self.key,
            f"its conditioning_key is {model.model.conditioning_key!r}, expected {self.key!r}",
        )
        return model.conditioner.max_length * self.reading.chunks

    def encode(self, model: StableDiffusionXL, items: Sequence[Item]) -> Conditioning:
        return self._framed(model, [item.inputs["prompt"] for item in items], self.framing.score)

    def unconditional(self, model: StableDiffusionXL, cond: Conditioning) -> Conditioning:
        nothing = not self.negative and not model.refines
        away = self._framed(model, [self.negative] * len(cond.y), self.framing.negative_score, nothing)
        return replace(away, concat=cond.concat)

    @torch.no_grad()
    def _framed(
        self, model: StableDiffusionXL, prompts: list[str], score: float, nothing: bool = False
    ) -> Conditioning:
        """The condition of prompts; `nothing`: with zeros in the place of what their text says."""
        context, pooled = model.conditioner.encode_text(prompts, self.reading)
        if nothing:
            context, pooled = torch.zeros_like(context), torch.zeros_like(pooled)
        numbers = self.framing.numbers(model.conditioner.numbers, len(prompts), model.device, score)
        return Conditioning(context, y=model.conditioner.vector(pooled, numbers))


def text_for(model: LatentDiffusion, size: tuple[int, int]) -> Text:
    """The condition from a text that the model takes, for images of this height and width that are not cropped."""
    return FramedText(Framing(size, size)) if isinstance(model, StableDiffusionXL) else Text()


class FramedTextAndMaskedImage(FramedText):
    """The same with what is around the masked part of an image, and the mask: inpainting.

    Args:
        images, masks: see `ldm.sampling.hybrid.TextAndMaskedImage`.
        framing, negative, reading: see `FramedText`.
    """

    kind, key = "a model of SDXL for inpainting", "hybrid-adm"

    def __init__(
        self, images: Tensor, masks: Tensor, framing: Framing, negative: str = "", reading: Reading = AS_PUBLISHED
    ):
        super().__init__(framing, negative, reading)
        self.images, self.masks = images, masks

    def encode(self, model: StableDiffusionXLInpaint, items: Sequence[Item]) -> Conditioning:
        indices = [item.prompt_index for item in items]
        images, masks = (part[indices].to(model.device) for part in (self.images, self.masks))
        return replace(super().encode(model, items), concat=model.seen(images, masks, noise=torch.zeros(())))
