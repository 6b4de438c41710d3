"""A task is a condition, a start, and the network that predicts.

The condition is what the network is conditioned on for each image: nothing, text, a class, boxes, or images joined to
its latents. The start is where the latents begin, and what of an image is kept: noise, an image, an image with a mask.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.models.diffusion.ddpm import ConditionLike, LatentDiffusion, StableDiffusionXL, StableDiffusionXLInpaint
from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning
from ldm.models.diffusion.loop import Edit
from ldm.models.diffusion.sampler import mask_edits
from ldm.models.diffusion.schedule import Node, diffuse
from ldm.modules.attention_control import AttentionControl
from ldm.modules.diffusionmodules.controlnet import ControlNet
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.modules import ClassEmbedder, ClassLabels, SpatialRescaler
from ldm.modules.encoders.tokenizer import AS_PUBLISHED, Reading, read
from ldm.profiling.cost import Macs
from ldm.sampling.generate import Item


class Attention(NamedTuple):
    """What items take of each other's attention, None = nothing; and what is changed in the latents by it."""

    control: AttentionControl | None = None
    edits: tuple[Edit, ...] = ()


class Condition:
    """No condition; and what every condition offers.

    together: items that belong together, and must be in one batch.
    """

    kind = "an unconditional model"
    key: str | None = None  # the model's conditioning_key
    together = 1

    def tokens(self, model: LatentDiffusion) -> int | None:
        """Context tokens of one image, None for a network without cross-attention.

        Raises:
            ValueError: the model does not take this condition.
        """
        self._need(
            model.model.conditioning_key == self.key,
            f"its conditioning_key is {model.model.conditioning_key!r}, expected {self.key!r}",
        )
        return None

    def settings(self) -> dict[str, Any]:
        """What images depend on beside the items, as JSON values."""
        return {}

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> ConditionLike:
        """The conditioning of these items."""
        return None

    def unconditional(self, model: LatentDiffusion, cond: ConditionLike) -> ConditionLike:
        """The conditioning that guidance leads away from.

        Args:
            cond: what `encode` returned for the same items.

        Raises:
            ValueError: the model has no such thing.
        """
        raise ValueError(f"guidance scale must be 1 for {self.kind}: it knows no absence of its condition")

    def attention(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> Attention:
        """What these items take of each other's attention in a run of these nodes."""
        return Attention()

    def cut(self, model: LatentDiffusion, texts: Sequence[str]) -> int:
        """How many of the texts are longer than what reads them takes."""
        return prompts_cut(model, texts)

    def check(self, texts: Sequence[str]) -> None:
        """Raise ValueError for a text that can't be read."""

    def _need(self, fits: bool, otherwise: str) -> None:
        if not fits:
            raise ValueError(f"not {self.kind}: {otherwise}")


def prompts_cut(model: LatentDiffusion, prompts: Sequence[str]) -> int:
    """How many of the prompts are longer than the model's text encoder reads: it gets only their beginnings."""
    return sum(model.cond_stage_model.cut(prompts)) if prompts else 0


def unknown_words(model: LatentDiffusion, prompts: Sequence[str]) -> list[str]:
    """Words such as <new1> in prompts that the text encoder was not given; it reads their letters instead."""
    added = getattr(model.cond_stage_model, "added", {})
    found = {word.lower() for prompt in prompts for word in re.findall(r"<[\w-]*[^\W\d][\w-]*>", prompt)}
    return sorted(found - added.keys())


class Text(Condition):
    """The items' prompts.

    Args:
        negative: the text that guidance leads away from.
        reading: how both are read; by default as published.
    """

    kind, key = "a text-to-image model", "crossattn"

    def __init__(self, negative: str = "", reading: Reading = AS_PUBLISHED):
        self.negative, self.reading = negative, reading

    def settings(self) -> dict[str, Any]:
        return ({"negative_prompt": self.negative} if self.negative else {}) | self.reading.settings()

    def cut(self, model: LatentDiffusion, texts: Sequence[str]) -> int:
        if self.reading.plain:
            return super().cut(model, texts)
        rows = model.cond_stage_model.rows
        return sum(rows(self.reading.spans(text), self.reading.chunks).left_out > 0 for text in texts)

    def unread(self, text: str) -> bool:
        """Whether there is a weight in it that is not read as one."""
        return not self.reading.weights and re.search(r"\([^()]+:\s*\d*\.?\d+\s*\)", text) is not None

    def check(self, texts: Sequence[str]) -> None:
        for text in dict.fromkeys(texts):
            self.reading.spans(text)

    def tokens(self, model: LatentDiffusion) -> int:
        super().tokens(model)
        try:
            return self._embed(model, [""]).shape[1]
        except (TypeError, AttributeError) as error:  # a ValueError says itself what a text encoder lacks
            raise ValueError(
                f"not {self.kind}: its conditioner {type(model.cond_stage_model).__name__} takes no text ({error})"
            ) from error

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        return self._embed(model, [item.inputs["prompt"] for item in items])  # (B, L, D)

    def unconditional(self, model: LatentDiffusion, cond: Tensor) -> Tensor:
        return self._embed(model, [self.negative]).expand_as(cond)

    @torch.no_grad()
    def _embed(self, model: LatentDiffusion, prompts: list[str]) -> Tensor:
        if self.reading.plain:
            return model.get_learned_conditioning(prompts)
        return read(model.cond_stage_model, prompts, self.reading)[0]


class Classes(Condition):
    """The items' class indices.

    Args:
        absent: the class that stands for none, which guidance leads away from; None = there is none.
    """

    kind, key = "a class-conditional model", "crossattn"
    conditioner: type[nn.Module] = ClassEmbedder

    def __init__(self, absent: int | None = None):
        self.absent = absent

    def tokens(self, model: LatentDiffusion) -> int | None:
        super().tokens(model)
        embedder = type(model.cond_stage_model).__name__
        self._need(isinstance(model.cond_stage_model, self.conditioner), f"its conditioner {embedder} takes no class")
        return 1

    def settings(self) -> dict[str, Any]:
        return {"uncond_class": self.absent}

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        return self._embed(model, [item.inputs["class"] for item in items])  # (B, 1, D)

    def unconditional(self, model: LatentDiffusion, cond: Tensor) -> Tensor:
        return (
            super().unconditional(model, cond) if self.absent is None else self._embed(model, [self.absent] * len(cond))
        )

    @torch.no_grad()
    def _embed(self, model: LatentDiffusion, classes: list[int]) -> Tensor:
        return model.get_learned_conditioning(torch.tensor(classes, device=model.device))


class Labels(Classes):
    """The items' class indices, for a network that takes them beside the timestep (DiT)."""

    key, conditioner = "adm", ClassLabels

    def tokens(self, model: LatentDiffusion) -> None:
        super().tokens(model)


def class_condition(conditioner: nn.Module, absent: int | None) -> Classes:
    """`Classes` or `Labels`, as a model's conditioner needs it; `absent`: see there."""
    return (Labels if isinstance(conditioner, ClassLabels) else Classes)(absent)


class Layout(Condition):
    """Classes and where they are, as token ids: layout to image.

    Args:
        ids: one row for each prompt_index, (N, L), see `box_tokens`.
    """

    kind, key = "a layout-to-image model", "crossattn"
    stage_key = "coordinates_bbox"  # the model's cond_stage_key

    def __init__(self, ids: Tensor):
        self.ids = ids

    def tokens(self, model: LatentDiffusion) -> int:
        super().tokens(model)
        self._need(
            model.cond_stage_key == self.stage_key,
            f"its cond_stage_key is {model.cond_stage_key!r}, expected {self.stage_key!r}",
        )
        return self.ids.shape[1]

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        with torch.no_grad():
            return model.get_learned_conditioning(self.ids[[item.prompt_index for item in items]])  # (B, L, D)


class ImageConcat(Condition):
    """An image beside the latents: low resolution for super-resolution.

    Args:
        images: one for each prompt_index, (N, C, H, W); after the model's conditioner as high and wide as
            the latents.
    """

    kind, key = "a super-resolution model", "concat"

    def __init__(self, images: Tensor):
        self.images = images

    def tokens(self, model: LatentDiffusion) -> None:
        super().tokens(model)
        unet = model.model.diffusion_model
        extra = self._channels(model)
        self._need(
            unet.in_channels == model.channels + extra,
            f"its UNet takes {unet.in_channels} channels, expected {model.channels} of the latents and {extra}",
        )

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        with torch.no_grad():
            return model.get_learned_conditioning(self._chosen(self.images, items).to(model.device))

    def _channels(self, model: LatentDiffusion) -> int:
        """How many channels the conditioner makes."""
        return self.images.shape[1]

    @staticmethod
    def _chosen(inputs: Tensor, items: Sequence[Item]) -> Tensor:
        return inputs[[item.prompt_index for item in items]]


class SemanticMap(ImageConcat):
    """A map of class labels beside the latents: semantic synthesis.

    Args:
        images: label of every pixel, (N, H, W) integers, 0..in_channels-1 of the model's rescaler.
    """

    kind = "a semantic synthesis model"

    def tokens(self, model: LatentDiffusion) -> None:
        rescaler = model.cond_stage_model
        self._need(
            isinstance(rescaler, SpatialRescaler) and rescaler.channel_mapper is not None,
            f"its conditioner {type(rescaler).__name__} takes no map of labels",
        )
        super().tokens(model)

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        labels = self._chosen(self.images, items).to(model.device)  # (B, H, W)
        classes = model.cond_stage_model.channel_mapper.in_channels
        one_hot = torch.zeros(len(labels), classes, *labels.shape[1:], device=labels.device)  # (B, classes, H, W)
        one_hot.scatter_(1, labels[:, None], 1.0)
        with torch.no_grad():
            return model.get_learned_conditioning(one_hot)  # (B, C', h, w)

    def _channels(self, model: LatentDiffusion) -> int:
        return model.cond_stage_model.channel_mapper.out_channels


class MaskedImage(ImageConcat):
    """The latents of an image without its masked part, and the mask, beside the latents: LDM inpainting.

    As published the masked part is black, and the mask -1 where the image stays and 1 where it is painted.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        masks: 1 = to be painted, 0 = stays; (N, 1, H, W).
    """

    kind = "an inpainting model"

    def __init__(self, images: Tensor, masks: Tensor):
        super().__init__(torch.where(masks > 0, -1.0, images))
        self.masks = masks

    def encode(self, model: LatentDiffusion, items: Sequence[Item]) -> Tensor:
        seen = super().encode(model, items)  # (B, C, h, w)
        masks = self._chosen(self.masks, items).to(seen)
        return torch.cat([seen, 2 * F.interpolate(masks, size=seen.shape[-2:]) - 1], dim=1)

    def _channels(self, model: LatentDiffusion) -> int:
        return model.channels + 1


# Text, and how the image is framed: the conditions of SDXL (arXiv 2307.01952, section 2.2)


@dataclass(frozen=True)
class Framing:
    """Size and crop that condition the network; heights before widths, tops before lefts, in pixels.

    target:         the size that is to be made.
    original:       size before it was cropped; a small one asks for the look of a small image.
    crop:           where the crop begins; (0, 0) asks for what stands in the middle.
    score:          how much people like it, 0..10; the refiner has this in the place of the target.
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


# Networks


class Network:
    """The model's own network, and what every other offers.

    anew: something beside the encoder is to run at every node, see `Plan.control`.
    controls: control networks beside the encoder.
    videos: it is one of videos, and a batch is the frames of one.
    """

    anew: bool = False
    videos: bool = False
    controls: Sequence[ControlNet] = ()

    def settings(self) -> dict[str, Any]:
        """What images depend on beside the items, as JSON values."""
        return {}

    def prepare(self, items: Sequence[Item]) -> None:
        """Do what these items need once, whatever samples them: it counts for none of the methods that are timed."""

    def of(self, model: LatentDiffusion, items: Sequence[Item]) -> ConditionedNetwork:
        """What predicts for these items."""
        return model.model

    def macs(self, unit: Macs, size: Sequence[int], tokens: int | None, guided: bool) -> Macs:
        """What one prediction of one image costs.

        Args:
            unit: what that of the model's own network costs.
            size: height and width of the latents.
            tokens: of the context.
            guided: whether every second prediction is an unconditional one.
        """
        return unit


# Starts


class Start:
    """Noise, and what every start offers.

    strength: share of the steps that are run, the last ones; 1 = all.
    """

    strength: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What images depend on beside the items, as JSON values."""
        return {}

    def along(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items with those before them that are to be sampled in the same batch, and are not kept."""
        return items

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        """The latents at the first node, from the items' noise x_T; both (B, C, h, w)."""
        return x_T

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        """What is changed on the way."""
        return ()

    def finish(self, images: Tensor, items: Sequence[Item]) -> Tensor:
        """The images as they are shown, from those that were decoded; both (B, 3, H, W)."""
        return images


class ImageStart(Start):
    """One image for all items, noised to the level where the run begins: image to image.

    The first stage's mean encoding is taken where the published script draws from its posterior. The noise
    level is that of the first step run, where the published script's is one step noisier, see
    `DDIMSampler.stochastic_encode`.

    Args:
        image: (3, H, W) in [-1, 1].
        strength: 0..1; 1 keeps next to nothing of the image.

    Source: SDEdit (arXiv 2108.01073).
    """

    def __init__(self, image: Tensor, strength: float):
        self.image, self.strength = image, strength

    def settings(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        return diffuse(mean_latents(model, self.image[None]), x_T, node.abar)


class KeepOutsideMask(Start):
    """Images whose unmasked part is put back, to the pixel, when the run is finished.

    Args:
        images: one for each prompt_index, (N, 3, H, W) in [-1, 1].
        masks: 1 = to be painted, 0 = stays as it is, to the pixel; (N, 1, H, W).
    """

    def __init__(self, images: Tensor, masks: Tensor):
        self.images, self.masks = images, masks

    def finish(self, images: Tensor, items: Sequence[Item]) -> Tensor:
        height, width = images.shape[-2:]
        originals, masks = (part[..., :height, :width].to(images) for part in self._chosen(items))
        return torch.where(masks > 0, images, originals)

    def _chosen(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        indices = [item.prompt_index for item in items]
        return self.images[indices], self.masks[indices]


class LatentInpaint(KeepOutsideMask):
    """The same for a model that takes no mask: the rest is kept in the latents too, see `inpainting`.

    A latent is painted if any of its pixels is.
    """

    def edits(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> tuple[Edit, ...]:
        originals, masks = (part.to(model.device) for part in self._chosen(items))
        x0 = mean_latents(model, originals)  # (B, C, h, w)
        kept = 1 - F.adaptive_max_pool2d(masks, x0.shape[-2:])  # (B, 1, h, w)
        return mask_edits(kept, x0, nodes, [item.seed for item in items])


@torch.no_grad()
def mean_latents(model: LatentDiffusion, images: Tensor) -> Tensor:
    """The latents (B, C, h, w) of images (B, 3, H, W); of a posterior its mean."""
    encoded = model.encode_first_stage(images.to(model.device))
    mean = encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
    return model.get_first_stage_encoding(mean)
