"""The frames of a short video by a model of images (Text2Video-Zero, arXiv 2303.13439)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.control import CrossFrame, WrappedNetwork
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import ConditionedNetwork, Conditioning, Denoiser
from ldm.models.diffusion.loop import Rule, denoise
from ldm.models.diffusion.motion import moved, noised_again
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.schedule import ImageNoise, Node
from ldm.modules.diffusionmodules.unet3d import VideoUNet, apart, together
from ldm.modules.diffusionmodules.util import Features
from ldm.profiling.cost import Macs
from ldm.sampling.engine import Recipe, Task
from ldm.sampling.generate import Item
from ldm.sampling.task import Condition, Network, Start

OWN = Network()  # of a single frame: the model's


@dataclass(frozen=True)
class Motion:
    """How the frames move.

    strength: see `moved`.
    t1, t0:   steps before the end of the run: all frames are sampled from t1 on; the first one alone is sampled on to
        t0, where it is moved for the others. 0 <= t0 < t1 < steps.
    """

    strength: tuple[float, float] = (12.0, 12.0)
    t1: int = 47
    t0: int = 44

    @staticmethod
    def of(
        steps: int, strength: tuple[float, float] | None = None, t1: int | None = None, t0: int | None = None
    ) -> Motion:
        """In a run of so many steps; None = as published, t1 and t0 in proportion to the published 50 steps."""
        t1 = round(0.96 * steps) - 1 if t1 is None else t1
        t0 = min(t1, round(0.9 * steps)) - 1 if t0 is None else t0
        return Motion(strength or Motion.strength, t1, t0)

    def first_node(self, nodes: int) -> int:
        """Where all frames begin, of a run of so many nodes.

        Raises:
            ValueError: t0 and t1 are not in it.
        """
        if not 0 <= self.t0 < self.t1 < nodes:
            raise ValueError(f"expected 0 <= t0 < t1 < {nodes}, the steps; got t0 {self.t0}, t1 {self.t1}")
        return nodes - 1 - self.t1


def first_frame(denoiser: Denoiser, rule: Rule, x_T: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """The first frame alone, in full: its latents where all frames begin, and where it is moved; (1, C, h, w) each."""
    nodes = len(rule.nodes)
    begin, there = motion.first_node(nodes), nodes - 1 - motion.t0
    at = {-1: x_T}
    for state in denoise(denoiser, rule, Plan(nodes, tuple(range(nodes))), x_T):
        at[state.node] = state.x
        if state.node == there - 1:
            break
    return at[begin - 1], at[there - 1]


def frames_of(
    first: tuple[Tensor, Tensor],
    noise: Tensor,
    numbers: Sequence[int],
    nodes: Sequence[Node],
    abar: Tensor,
    motion: Motion,
) -> Tensor:
    """The latents of frames where all of them begin, (F, C, h, w).

    Args:
        first: what `first_frame` returned.
        noise: unit normal, one for each frame, (F, C, h, w); that of frame 0 is not used.
        numbers: of the frames; 0 is the first.
        nodes: of the whole run.
        abar: the model's alphas_cumprod.
    """
    begin, there = nodes[motion.first_node(len(nodes))].t, nodes[len(nodes) - 1 - motion.t0].t
    warped = noised_again(moved(first[1], numbers, motion.strength), noise, abar, int(there), int(begin))
    return torch.stack([first[0][0] if number == 0 else one for number, one in zip(numbers, warped, strict=True)])


class Frames(Network):
    """The model's network with all images of a batch as frames of one video, or another network so.

    Args:
        network: the other network of the frames.
    """

    def __init__(self, network: Network = OWN) -> None:
        self.network, self.anew, self.controls = network, network.anew, network.controls

    def settings(self) -> dict[str, Any]:
        return self.network.settings()

    def of(self, model: LatentDiffusion, items: Sequence[Item]) -> ConditionedNetwork:
        return CrossFrame(self.network.of(model, items), len(items))

    def macs(self, unit: Macs, size: Sequence[int], tokens: int | None, guided: bool) -> Macs:
        return self.network.macs(unit, size, tokens, guided)


class WholeVideos(WrappedNetwork):
    """A network of videos as one of images: a batch is the frames of whole videos, one after the other.

    Args:
        network: takes and gives (B, C, F, H, W); its features are (B, F, ...).
        frames: F, of each video.
    """

    def __init__(self, network: ConditionedNetwork, frames: int) -> None:
        super().__init__(network)
        self.frames = frames

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return self._of_frames(self.inner.encode(apart(x, self.frames), *self._of_videos(t, cond), tome))

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        whole = self._whole(features)
        anew = self.inner.refresh(whole, apart(x, self.frames), *self._of_videos(t, cond), blocks, tome)
        return self._of_frames(anew)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        whole = self._whole(features)
        return self._of_frames(self.inner.advance(whole, *self._of_videos(t, cond), blocks, tome))

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return together(self.inner.decode(self._whole(features), *self._of_videos(t, cond), tome))

    def _of_videos(self, t: Tensor, cond: Conditioning) -> tuple[Tensor, Conditioning]:
        """Timestep and condition of each video: those of its first frame."""
        first = slice(None, None, self.frames)
        return t[first], cond.images(first)

    def _whole(self, features: Features) -> Features:
        return Features.of([tensor.unflatten(0, (-1, self.frames)) for tensor in features.tensors])

    def _of_frames(self, features: Features) -> Features:
        return Features.of([tensor.flatten(0, 1) for tensor in features.tensors])


class OneVideo(Network):
    """The model's network of videos, with all images of a batch as the frames of one.

    Args:
        frames: of the video, which must be in one batch.
    """

    videos = True

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def settings(self) -> dict[str, Any]:
        return {"frames": self.frames}  # each depends on all

    def of(self, model: LatentDiffusion, items: Sequence[Item]) -> ConditionedNetwork:
        return WholeVideos(model.model, self.frames)


def whole_videos(task: Task, network: nn.Module, frames: int) -> Task:
    """The task of single images with each batch as the frames of one video, by a network of videos.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(network, VideoUNet):
        raise ValueError("not a model of videos; expected one such as configs/video/videofusion.yaml")
    return replace(task, network=OneVideo(frames))


class MovedFrames(Start):
    """The first frame's latents, moved for each of the others; an item says which frame it is, see `frame_of`.

    Batches are of one video; the first frame is computed with each, for the others to attend to.

    Args:
        motion: see there.
        strength: share of the steps in which all frames are sampled.
        first: the item of the first frame; None = the first of each batch, which has all frames of a video.
        recipe: how all is sampled.
        condition: of the frames.
        network: of a single frame.
    """

    def __init__(
        self,
        motion: Motion,
        strength: float,
        first: Item | None,
        recipe: Recipe,
        condition: Condition,
        network: Network = OWN,
    ) -> None:
        self.motion, self.strength, self.first, self.recipe = motion, strength, first, recipe
        self.condition, self.network = condition, network

    def settings(self) -> dict[str, Any]:
        motion = self.motion
        return {"motion": [*motion.strength], "t1": motion.t1, "t0": motion.t0}

    def along(self, items: Sequence[Item]) -> Sequence[Item]:
        return items if frame_of(items[0]) == 0 else [self.first, *items]

    def latents(self, model: LatentDiffusion, items: Sequence[Item], x_T: Tensor, node: Node) -> Tensor:
        one = self.first or items[0]
        noise, used = ImageNoise([one.seed]).node, self.motion.t1 + 1  # by the nodes of all frames
        rule = self.recipe.rule(model.alphas_cumprod, lambda i, x: noise(used + i, x))
        cond, guidance = self.condition.encode(model, [one]), self.recipe.guidance
        uncond = None if guidance.scale == 1.0 else self.condition.unconditional(model, cond)
        denoiser = model.denoiser(cond, uncond, guidance, network=self.network.of(model, [one]))
        first = first_frame(denoiser, rule, x_T[:1], self.motion)
        return frames_of(first, x_T, [*map(frame_of, items)], rule.nodes, model.alphas_cumprod, self.motion)


def frame_of(item: Item) -> int:
    """Its "frame", or else which of its prompt's images it is."""
    return item.inputs.get("frame", item.sample)


def frames_task(task: Task, recipe: Recipe, nodes: int, motion: Motion, first: Item | None = None) -> Task:
    """The task of single images with the frames of videos in their place; nodes: of a whole run of the recipe.

    Raises:
        ValueError: the motion is not in it.
    """
    share = (nodes - motion.first_node(nodes)) / nodes
    start = MovedFrames(motion, share, first, recipe, task.condition, task.network)
    return replace(task, start=start, network=Frames(task.network))
