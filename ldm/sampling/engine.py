"""The engine behind every script: items to images, one batch of a latent diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ldm.io.files import parse
from ldm.io.images import to_pil
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import BatchBackoff, ConditionedNetwork, Denoiser, Guidance
from ldm.models.diffusion.loop import Edit, Rule, denoise, prior_noise
from ldm.models.diffusion.parallel import DistributedDecode, first_process
from ldm.models.diffusion.propagation.plan import AnyPlan, Compute
from ldm.models.diffusion.schedule import ImageNoise
from ldm.models.diffusion.solvers.registry import SOLVERS, levels_of, solver
from ldm.modules.packed import pack
from ldm.profiling.cost import (
    Kept,
    Macs,
    WarmUp,
    decoder_bytes,
    kept_bytes,
    sampling_bytes,
    shared_bytes,
    timed,
    unet_macs,
)
from ldm.sampling.generate import Item
from ldm.sampling.task import Attention, Condition, Network, Start, prompts_cut


class Ran(NamedTuple):
    """Which part of the network ran at each node, and the nodes' timesteps; a node that was redone is there again.

    error: the largest relative error of a forecast that was let pass, where the plan measures it.
    after: the same of another model that ran the last nodes, see `ldm.sampling.refined`.
    """

    computes: list[Compute]
    ts: list[float]
    error: float | None = None
    after: Ran | None = None


@dataclass(frozen=True)
class Sizes:
    """What a model's config says of its images.

    channels: of the latents.
    factor:   pixels per latent position, in each direction.
    multiple: height and width in pixels must be multiples of this, for the UNet to halve its latents evenly.
    default:  height and width in pixels that the model was trained with.
    """

    channels: int
    factor: int
    multiple: int
    default: int

    def whole(self, side: int) -> int:
        """The side in pixels, or the next multiple above it."""
        return -(-side // self.multiple) * self.multiple

    @staticmethod
    def of(config: Mapping[str, Any]) -> Sizes:
        """From the `model` part of a config.

        Raises:
            ValueError: it is not that of a latent diffusion model.
        """
        params = config.get("params") or {}
        try:
            first, unet = params["first_stage_config"], params["unet_config"]["params"]
            dd = (first.get("params") or {}).get("ddconfig")
            if dd is not None:
                parse(list[int], [*dd["ch_mult"]], "ddconfig.ch_mult")
            factor = 1 if dd is None else dd.get("patch_size", 1) * 2 ** (len(dd["ch_mult"]) - 1)
            default = params["image_size"] * factor
            # A transformer takes no size but its own.
            halvings = len(unet.get("channel_mult", (1, 2, 4, 8))) - 1
            multiple = default if "patch_size" in unet else factor * 2**halvings
            return Sizes(params["channels"], factor, multiple, default)
        except (KeyError, TypeError, AttributeError) as error:
            why = f"without {getattr(error, 'key', error)}" if isinstance(error, KeyError) else f"in which {error}"
            raise ValueError(f"not the config of a latent diffusion model: {config.get('target')} {why}") from error


def usual_scale(config: Mapping[str, Any]) -> float:
    """The guidance scale that a model's config recommends (`sampling.scale`); if it does not, 7.5."""
    return config.get("sampling", {}).get("scale", 7.5)


FRAME_PIXELS = 2**18  # of a video that are decoded at a time, 4 frames of 256 x 256
NODE_FIELDS = ("spacing", "timesteps_at")  # of a recipe, recorded only where they say something


@dataclass(frozen=True)
class Recipe:
    """How images are sampled, whatever the model, the task and the plan.

    height, width: in pixels. Where they are no multiple of what the model needs, larger images are made and
        cut off on the right and at the bottom.
    sampler, steps, eta: see `ldm.models.diffusion.solvers.registry.solver`.
    scale: guidance scale; exactly 1 = none.
    guidance_interval, guidance_reuse: see `Guidance`.
    tome: share of the UNet's finest tokens merged for self-attention, see `Merging`; 0 = none.
    noise_weight, noise_below, noise_order: prior noise injection, see `prior_noise`; weight 0 = none.
    spacing, timesteps_at: where the steps begin, see `levels_of`; with timesteps_at, steps is their number.
    """

    height: int
    width: int
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    scale: float = 7.5
    guidance_interval: tuple[float, float] | None = None
    guidance_reuse: bool | str = False
    tome: float = 0.0
    noise_weight: float = 0.0
    noise_below: float = 500
    noise_order: str = "before"
    spacing: str | None = None
    timesteps_at: tuple[int, ...] | None = None

    def rule(self, alphas_cumprod: Tensor, noise: Callable[[int, Tensor], Tensor], strength: float = 1.0) -> Rule:
        """The solver of a run of the last `strength` (0..1) of all steps, rounded down.

        Raises:
            ValueError: see `solver`; or no step is left.
        """
        total = self.total(alphas_cumprod)
        kept = int(strength * total + 1e-9)  # 0.29 of 100 steps is 29
        if kept < 1:
            raise ValueError(f"{strength:g} of {total} steps leaves none")
        return solver(self.sampler, alphas_cumprod, self.steps, self.eta, noise, total - kept, **self._where)

    def total(self, alphas_cumprod: Tensor) -> int:
        """The number of steps; DDIM's may be one more than those asked for."""
        return len(levels_of(self.sampler, alphas_cumprod, self.steps, **self._where)) - 1

    @property
    def _where(self) -> dict[str, Any]:
        return {"spacing": self.spacing, "timesteps_at": self.timesteps_at}

    @property
    def solver_name(self) -> str:
        """The solver with its nodes, see `Spacings.name_of`."""
        chosen = SOLVERS[self.sampler]
        return chosen.spacings.name_of(self.sampler, chosen.chosen(self.spacing, self.timesteps_at), self.timesteps_at)

    def facts(self, strength: float = 1.0) -> dict[str, Any]:
        """What a calibration of such runs is good for, beside the sampler and the weights; strength: see `rule`."""
        interval = self.guidance_interval
        return {
            "steps": self.steps,
            "strength": strength,
            "eta": self.eta,
            "scale": self.scale,
            "guidance_interval": interval and [*interval],
            "tome": self.tome,
        }

    def settings(self) -> dict[str, Any]:
        """What images depend on, as JSON values.

        Without a spacing where it is the solver's published one, and nothing else is its default: so an image that was
        made before there was a choice keeps its settings.
        """
        fields = asdict(self)
        chosen = SOLVERS[self.sampler]
        fields["spacing"] = chosen.chosen(self.spacing, self.timesteps_at)
        if chosen.spacing is None and fields["spacing"] == chosen.spacings.published:
            fields["spacing"] = None
        # Lists, as JSON gives them back: what is found is compared with this.
        return {
            name: [*value] if isinstance(value, tuple) else value
            for name, value in fields.items()
            if value is not None or name not in NODE_FIELDS
        }

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.scale, self.guidance_interval, self.guidance_reuse)

    def edits(self, x_T: Tensor) -> tuple[Edit, ...]:
        if self.noise_weight == 0:
            return ()
        return (prior_noise(x_T, self.noise_weight, self.noise_below, self.noise_order),)


def num_nodes(recipe: Recipe, timesteps: int = 1000, strength: float = 1.0) -> int:
    """How many predictions a recipe makes, which is what a plan counts.

    Raises:
        ValueError: see `Recipe.rule`.
    """
    return len(recipe.rule(_any_schedule(timesteps), lambda i, x: x, strength).nodes)


def predicts_once(recipe: Recipe, timesteps: int = 1000) -> bool:
    """Whether a recipe makes one prediction in each step."""
    return recipe.total(_any_schedule(timesteps)) == num_nodes(recipe, timesteps)


def _any_schedule(timesteps: int) -> Tensor:
    """Every schedule of so many timesteps has as many steps and nodes."""
    return torch.linspace(0.999, 0.001, timesteps)


@dataclass(frozen=True)
class Task:
    """What the network is conditioned on, where the latents begin, and the network that predicts."""

    condition: Condition
    start: Start = Start()
    network: Network = Network()


@dataclass(frozen=True)
class Cost:
    """What sampling one image cost, in MACs of the UNet: in all, and on the critical path (`Macs.critical_path`)."""

    macs: int
    critical: int

    @staticmethod
    def mean(parts: Sequence[Cost]) -> Cost:
        return Cost(sum(p.macs for p in parts) // len(parts), sum(p.critical for p in parts) // len(parts))


class Engine:
    """Makes the images of a batch of items; a `make` for `ldm.sampling.generate.generate`.

    An image depends on the weights, the task, the recipe, the keys of the plan and its item. Its batch, and threads,
    change the last digits of what is computed: some values of the 8-bit image may differ by one level.

    Args:
        model: its device is used.
        sizes: of the model's config.
        recipe, plan: how; the plan is for the recipe's nodes.
        task: what.
        autocast: run the networks in the device's lower precision.
        spread: share decoders with the other processes of the run, see `DistributedDecode`; each must make the same
            images.
        tile: decode images in tiles of so many pixels a side, see `decode_tiled`; None = whole.

    Raises:
        ValueError: the model does not take the task's condition.
    """

    # Of the run's nodes, those of another engine before this one's, and how many this one computes; None = the rest.
    first: int = 0
    stop: int | None = None

    def __init__(
        self,
        model: LatentDiffusion,
        sizes: Sizes,
        recipe: Recipe,
        plan: AnyPlan,
        task: Task,
        autocast: bool = False,
        spread: bool = False,
        tile: int | None = None,
    ):
        self.model, self.recipe, self.plan, self.task = model, recipe, plan, task
        self.autocast, self.spread, self.tile = autocast, spread, tile
        self._most: int | None = None  # decoders in a batch, if memory has run out
        self.shape = (sizes.channels, *(sizes.whole(side) // sizes.factor for side in (recipe.height, recipe.width)))
        self._tokens = task.condition.tokens(model)

    def with_plan(self, plan: AnyPlan) -> Engine:
        """The same engine with another plan."""
        other = copy(self)
        other.plan = plan
        return other

    def with_task(self, task: Task) -> Engine:
        """The same engine with another task of the same kind, such as the condition of other items."""
        other = copy(self)
        other.task = task
        return other

    @property
    def parallel(self) -> int:
        """Most decoder steps in one batch."""
        return self.plan.parallel

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads."""
        return prompts_cut(self.model, texts)

    def pack(self) -> None:
        """Exchange the layers of the model's UNet for packed ones, for good, where they are faster; see `pack`."""
        if not self.autocast:
            network = self.model.model
            pack(network.diffusion_model, self.shape[1:], self._tokens, network.config)

    @cached_property
    def unit(self) -> Macs:
        """What one prediction of one image without guidance costs."""
        own = unet_macs(self.model.model.config, self.shape[1:], 1, self._tokens, self.recipe.tome)
        return self.task.network.macs(own, self.shape[1:], self._tokens, self.recipe.scale != 1.0)

    @property
    def kept(self) -> Kept:
        """What one prediction of one image leaves for later steps."""
        return kept_bytes(self.model.model.config, self.shape[1:], self._tokens, self.recipe.tome)

    def sampling_bytes(self, images: int) -> int:
        """What so many images at a time need at least, in the precision of the weights."""
        predictions = images * (1 if self.recipe.scale == 1.0 else 2)
        networks = self.model.model.diffusion_model, self.model.first_stage_model
        return sampling_bytes(
            *networks,
            self.shape,
            images,
            predictions,
            self._tokens,
            self.recipe.tome,
            self.tile,
            self.task.network.controls,
        )

    def decoder_bytes(self, batch: int) -> int:
        """What one decoder node of `batch` predictions needs; see `ldm.profiling.cost`."""
        return decoder_bytes(self.model.model.config, self.shape[1:], batch, self._tokens, self.recipe.tome)

    def shared_bytes(self) -> int:
        """What all decoder nodes need together; see `ldm.profiling.cost`."""
        return shared_bytes(self.model.model.diffusion_model)

    def settings(self) -> dict[str, Any]:
        """What images depend on beside weights and item, as JSON values."""
        return (
            self.recipe.settings()
            | self.plan.settings()
            | {"precision": "autocast" if self.autocast else "full"}
            | self.task.condition.settings()
            | self.task.start.settings()
            | self.task.network.settings()
        )

    def __call__(
        self, items: Sequence[Item], on_node: Callable[[], object] = lambda: None
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        """The items' images, and for each of them what it cost: seconds, and MACs of the UNet.

        Args:
            on_node: called after every node of the batch, for progress.

        Raises:
            NonFiniteLatents: with the step and the layer.
            ValueError: the decoded images are not finite.
        """
        device = self.model.device
        self.task.network.prepare(items)
        (latents, runs), sampling = timed(lambda: self._sample(items, on_node), device)
        images, decoding = timed(lambda: to_pil(self.task.start.finish(self.decode(latents), items)), device)
        cost, measured = self._cost(runs), [run.error for run in runs if run.error is not None]
        seconds, seconds_unet = (round(total / len(items), 4) for total in (sampling + decoding, sampling))
        return images, {
            "seconds": seconds,
            "seconds_unet": seconds_unet,
            "unet_macs": cost.macs,
            "batch": len(items),
            "parallel": min(self.plan.parallel, self._most or self.plan.parallel),
            "device": device.type,
            **({} if self.tile is None else {"tile": self.tile}),
        } | ({"forecast_error": float(f"{max(measured):.4g}")} if measured else {})

    def warm_up(self, items: Sequence[Item], first_calls: dict[Hashable, float]) -> float:
        """Call all that makes a batch of items, once for every shape, so that what is timed later is sampling alone.

        Args:
            first_calls: see `WarmUp`; one for all engines of the process. Shapes that it lacks are added.

        Returns:
            The seconds that the batch takes longer when it is the first of a process.
        """
        items = items[:1] if self.plan.per_image else items
        with self._precision():
            network = WarmUp(self.task.network.of(self.model, items), first_calls, self.model.device)
        _, first = timed(lambda: self.decode(self._run(items, network)[0]), self.model.device)
        _, again = timed(lambda: self.decode(self._run(items, network)[0]), self.model.device)
        rest = ("rest", len(items))  # text encoder, first stage, solver
        first_calls.setdefault(rest, max(0.0, first - network.seconds - again))
        return sum(first_calls[key] for key in (rest, *network.results))

    def latents(self, items: Sequence[Item]) -> Tensor:
        """The items' sampled latents, (B, C, h, w); what they cost is not counted."""
        return self._sample(items)[0]

    def plain_run(self, items: Sequence[Item]) -> tuple[Denoiser, Rule, Tensor]:
        """What `denoise` needs for the items: the model with their conditions, the solver, the starting latents."""
        noise = ImageNoise([item.seed for item in items]).node
        with self._precision():
            rule = self.recipe.rule(self.model.alphas_cumprod, noise, self.task.start.strength)
            x = self.task.start.latents(self.model, items, self._noise(items), rule.nodes[0])
            return self._denoiser(items, self._attention(items, rule)), rule, x

    def sampled(self, items: Sequence[Item]) -> tuple[Tensor, Cost]:
        """The items' latents, (B, C, h, w), and what one of them cost."""
        latents, runs = self._sample(items)
        return latents, self._cost(runs)

    def _sample(self, items: Sequence[Item], on_node: Callable[[], object] = lambda: None) -> tuple[Tensor, list[Ran]]:
        """The items' latents, and what ran: once for all of them, or for each if it depends on the image."""
        parts = [[item] for item in items] if self.plan.per_image else [items]
        latents, runs = zip(*(self._run(part, on_node=on_node) for part in parts), strict=True)
        return torch.cat(latents), [*runs]

    def _cost(self, runs: Sequence[Ran]) -> Cost:
        """What one image cost, on average."""
        images = [self.recipe.guidance.images(run.computes, run.ts) for run in runs]
        return Cost.mean(
            [
                Cost(self.unit.run(self.plan, run.computes, n), self.unit.critical_path(self.plan, run.computes, n))
                for run, n in zip(runs, images, strict=True)
            ]
        )

    def _run(
        self,
        items: Sequence[Item],
        network: ConditionedNetwork | None = None,
        on_node: Callable[[], object] = lambda: None,
    ) -> tuple[Tensor, Ran]:
        """The items' latents, by the model's network or another, and what ran."""
        with self._precision():
            start, asked = self.task.start, len(items)
            items = start.along(items)
            noise = ImageNoise([item.seed for item in items]).node
            rule = self.recipe.rule(self.model.alphas_cumprod, lambda i, x: noise(self.first + i, x), start.strength)
            x_T = self._noise(items)
            x, ran = start.latents(self.model, items, x_T, rule.nodes[0]), Ran([], [])
            attention = self._attention(items, rule)
            edits = (*start.edits(self.model, items, rule.nodes), *attention.edits, *self.recipe.edits(x_T))
            backoff = BatchBackoff(self._denoiser(items, attention, network), self._most)
            denoiser, agreed = (DistributedDecode(backoff), first_process) if self.spread else (backoff, float)
            for state in islice(denoise(denoiser, rule, self.plan, x, edits, agreed), self.stop):
                x = state.x
                ran.computes.append(state.compute)
                ran.ts.append(rule.nodes[state.node].t)
                on_node()
            self._most = backoff.most
        return x[-asked:], ran._replace(error=state.error)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1]; the frames of a video a few at a time."""
        height, width = self.recipe.height, self.recipe.width
        at_once = max(1, FRAME_PIXELS // (height * width)) if self.task.network.videos else len(latents)
        with self._precision():
            images = [self.model.decode_first_stage(part, tile=self.tile) for part in latents.split(at_once)]
            return torch.cat(images)[..., :height, :width]

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.model.device.type, enabled=self.autocast):
            yield

    def _noise(self, items: Sequence[Item]) -> Tensor:
        return ImageNoise([item.start for item in items]).start(self.shape).to(self.model.device)

    def _attention(self, items: Sequence[Item], rule: Rule) -> Attention:
        return self.task.condition.attention(self.model, items, rule.nodes)

    def _denoiser(
        self, items: Sequence[Item], attention: Attention, network: ConditionedNetwork | None = None
    ) -> Denoiser:
        condition, guidance = self.task.condition, self.recipe.guidance
        cond = condition.encode(self.model, items)
        uncond = None if guidance.scale == 1.0 else condition.unconditional(self.model, cond)
        network = self.task.network.of(self.model, items) if network is None else network
        variance = SOLVERS[self.recipe.sampler].takes_variance
        return self.model.denoiser(cond, uncond, guidance, self.recipe.tome, network, variance, attention.control)
