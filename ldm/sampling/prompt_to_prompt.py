"""Prompt-to-prompt: an image changed by its prompt, through the attention of the image that it was.

Source: Hertz et al. (arXiv 2208.01626); the inversion of real images without tuning: Miyake et al. (arXiv 2305.16807).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.io.errors import SettingError
from ldm.models.diffusion.ddim import DDIM, inversion_nodes
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.loop import Edit, denoise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import Node, ddim_nodes, ddim_timesteps
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.attention_control import LARGEST, AttentionControl, AttentionMaps
from ldm.modules.encoders.tokenizer import Words
from ldm.sampling.generate import Item
from ldm.sampling.task import Attention, Start, Text, mean_latents
from ldm.sampling.word_alignment import EVERY_WORD, Bounds, marked, refinement, replacement, schedule


@dataclass(frozen=True)
class EditSettings:
    """How edits take attention from their source.

    refine:      words are added or left out; False = words are exchanged, one for one.
    cross_steps: when the source's cross-attention is taken, as shares of the steps, by word; EVERY_WORD = the others.
    self_steps:  when its self-attention is.
    weights:     factors of the attention to words of the edits.
    blend:       words; all that does not belong to one of them in source or edit stays as the source. () = no blend.
    threshold:   0..1, the share of the strongest attention above which a position belongs to a word.
    """

    refine: bool
    cross_steps: Mapping[str, Bounds] = field(default_factory=lambda: {EVERY_WORD: (0.0, 0.8)})
    self_steps: Bounds = (0.0, 0.4)
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: tuple[str, ...] = ()
    threshold: float = 0.3


def attention_tables(source: Words, edits: Sequence[Words], how: EditSettings, steps: int) -> tuple[Tensor, Tensor]:
    """`AttentionControl.cross` and `own` of so many steps.

    Raises:
        ValueError: words can't be replaced, see `replacement`.
    """
    tables = [_tables(source, edit, how, steps) for edit in edits]
    cross, own = zip(*tables, strict=True)
    return torch.stack(cross, dim=1), torch.stack(own, dim=1)


def _tables(source: Words, edit: Words, how: EditSettings, steps: int) -> tuple[Tensor, Tensor]:
    """The same of one edit, (S, L, L) and (S, L)."""
    if how.refine:
        mapper, old = refinement(source, edit)
        taken = F.one_hot(mapper % source.length, source.length).T * old  # (L, L)
    else:
        taken, old = replacement(source, edit), torch.ones(edit.length)
    when = schedule(edit, how.cross_steps, steps)[:steps]  # (S, L)
    weights = marked(edit, how.weights, 1.0) * when
    return taken * weights[:, None], (1 - old) * weights + 1 - when


class PromptToPrompt(Text):
    """Prompts whose images come in groups: that of the source, then its edits, which take attention from it.

    Args:
        words: of the source's prompt, and of each edit's.
        how: what is taken when.
        negative: see `Text`.
    """

    def __init__(self, words: Sequence[Words], how: EditSettings, negative: str = "") -> None:
        super().__init__(negative)
        self.words, self.how, self.together = words, how, len(words)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"edits": _as_json(asdict(self.how))}

    def tokens(self, model: LatentDiffusion) -> int:
        tokens = super().tokens(model)
        read = self.words[0].length
        self._need(tokens == read, f"its text encoder makes {tokens} vectors of {read} tokens")
        return tokens

    def attention(self, model: LatentDiffusion, items: Sequence[Item], nodes: Sequence[Node]) -> Attention:
        groups, rest = divmod(len(items), self.together)
        if rest:
            raise ValueError(f"a batch must have whole groups of {self.together} images; got {len(items)} images")
        source, *edits = self.words
        step_of = {node.t: i for i, node in reversed([*enumerate(nodes)])}
        cross, own = attention_tables(source, edits, self.how, len(nodes))
        low, high = (int(share * len(nodes)) for share in self.how.self_steps)
        maps = AttentionMaps(outer_attention(model)) if self.how.blend else None
        control = AttentionControl(cross, own, range(low, high), step_of, groups, maps=maps)
        return Attention(control, () if maps is None else (self._blend(maps, step_of),))

    def _blend(self, maps: AttentionMaps, step_of: Mapping[float, int]) -> Edit:
        chosen = torch.stack([marked(words, dict.fromkeys(self.how.blend, 1.0), 0.0) for words in self.words])
        threshold = self.how.threshold

        def blend(x: Tensor, node: Node) -> Tensor:
            attention = attention_to(maps.sums(step_of[node.t]), chosen, x)
            return blended(x.unflatten(0, (-1, len(chosen))), attention, threshold).flatten(0, 1)

        return Edit(blend, "update")


def outer_attention(model: LatentDiffusion) -> list[torch.nn.Module]:
    """The cross-attention layers of the encoder and the decoder, without those between the two, as published."""
    unet = model.model.diffusion_model
    blocks = chain(unet.input_blocks.modules(), unet.output_blocks.modules())
    return [block.attn2 for block in blocks if isinstance(block, BasicTransformerBlock)]


def attention_to(maps: Sequence[Tensor], chosen: Tensor, x: Tensor) -> Tensor:
    """How strongly each position attends to some tokens, in the largest maps, 0..1, (groups, group, 1, H, W).

    Args:
        maps: of some layers, summed over steps, each (groups * group, N, L).
        chosen: tokens of each prompt of a group, 1 or 0, (group, L).
        x: the latents, (groups * group, C, H, W).

    Raises:
        SettingError: there are no maps.
    """
    if not maps:
        raise SettingError(
            "blend", f"no attention of this network has at most {LARGEST} positions at this size; expected fewer pixels"
        )
    largest = max(one.shape[1] for one in maps)
    mean = torch.stack([one for one in maps if one.shape[1] == largest]).mean(0)  # (groups * group, N, L)
    mean = (mean.unflatten(0, (-1, len(chosen))) * chosen[:, None].to(mean)).sum(-1)  # (groups, group, N)
    height, width = x.shape[-2:]
    smaller = round(sqrt(height * width / largest))
    square = mean.unflatten(-1, (-(-height // smaller), -(-width // smaller)))
    wide = F.interpolate(F.max_pool2d(square, 3, 1, 1), size=(height, width))
    return (wide / wide.amax((-2, -1), keepdim=True))[:, :, None]


def blended(x: Tensor, attention: Tensor, threshold: float) -> Tensor:
    """The edits' latents where source or edit has attention, the source's elsewhere; (groups, group, C, H, W)."""
    mask = attention > threshold
    return torch.where(mask | mask[:, :1], x, x[:, :1])


class Inverted(Start):
    """One image for all items: its noise, found by inverting DDIM's steps under the image's prompt without guidance.

    From this noise the same steps lead back to about the image. Of the first stage's posterior the mean is taken.

    Args:
        image: (3, H, W) in [-1, 1].
        prompt: what it shows.
        steps: of the inversion, see `ddim_timesteps`; it ends at the node where sampling begins.
    """

    def __init__(self, image: Tensor, prompt: str, steps: int) -> None:
        self.image, self.prompt, self.steps = image, prompt, steps

    def settings(self) -> dict[str, Any]:
        return {"inversion_steps": self.steps}

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        grid = ddim_nodes(model.alphas_cumprod, ddim_timesteps(self.steps, model.num_timesteps))
        below = [one for one in grid if one.t < node.t]
        start = replace(node, abar_next=below[0].abar if below else grid[-1].abar_next)
        nodes = inversion_nodes((start, *below), true_timesteps=True)
        denoiser = model.denoiser(model.get_learned_conditioning([self.prompt]))
        plain = Plan(len(nodes), tuple(range(len(nodes))))
        *_, last = denoise(denoiser, DDIM(nodes), plain, mean_latents(model, self.image[None]))
        return last.x.expand(len(items), -1, -1, -1)


def _as_json(values: Any) -> Any:
    """Tuples as lists, as JSON gives them back: what is found is compared with this."""
    if isinstance(values, Mapping):
        return {key: _as_json(value) for key, value in values.items()}
    return [*map(_as_json, values)] if isinstance(values, tuple | list) else values
