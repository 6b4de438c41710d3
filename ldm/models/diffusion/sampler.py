"""What the published sampler classes have in common, on top of the one denoising loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.loop import Edit, Rule, State, denoise, inpainting
from ldm.models.diffusion.propagation.load import RunFacts, load_plan
from ldm.models.diffusion.propagation.plan import AnyPlan, Plan
from ldm.models.diffusion.schedule import ImageNoise, Levels, Node, Spacings, timesteps_of

MASK_STREAM = 1  # appended to an image's seed: the noise of a kept region is not the solver's noise

Intermediates = dict[str, list[Tensor]]


class Sampler:
    """Base of the published sampler classes.

    Args:
        model: a `LatentDiffusion`.
        schedule: 'linear', the only published value.
        device: as in Stability's signature; None or the model's, where the samples come out.
        seed: noise that a call draws itself depends on this and on the number of images that this sampler has
            drawn before, not on the batch size and not on any global generator.

    Raises:
        ValueError: another schedule or device.
    """

    solver: str  # its name among `ldm.models.diffusion.solvers.registry`, for which calibrations are made

    def __init__(
        self, model: Any, schedule: str = "linear", device: torch.device | str | None = None, *, seed: int = 0
    ) -> None:
        if schedule != "linear":
            raise ValueError(f"schedule must be 'linear'; got {schedule!r}")
        if device is not None and not same_device(torch.device(device), model.device):
            raise ValueError(f"device must be the model's, {model.device}, or left out; got {device}")
        self.model = model
        self.ddpm_num_timesteps: int = model.num_timesteps
        self._seeds = ((seed, n) for n in count())

    def draw_seeds(self, batch: int) -> list[tuple[int, ...]]:
        """Seeds of the next `batch` images."""
        return list(islice(self._seeds, batch))

    def start(self, shape: Sequence[int], x_T: Tensor | None, seeds: Sequence[tuple[int, ...]]) -> Tensor:
        """Starting latents (B, C, H, W): x_T if given, else unit normal noise.

        Raises:
            ValueError: x_T is not of this shape.
        """
        if x_T is None:
            return ImageNoise(seeds).start(tuple(shape[1:])).to(self.model.device)
        if x_T.shape != tuple(shape):
            raise ValueError(f"x_T must have the shape {tuple(shape)} of batch_size and shape; got {tuple(x_T.shape)}")
        return x_T.to(self.model.device)

    def states(
        self,
        denoiser: Denoiser,
        rule: Rule,
        x: Tensor,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
    ) -> Iterator[State]:
        """The loop's states under a plan given as a Plan, as a spec for `load_plan`, or not at all (off)."""
        return denoise(denoiser, rule, self.loaded_plan(plan, rule, parallel, self.solver), x, edits)

    def loaded_plan(self, plan: AnyPlan | str | None, rule: Rule, parallel: int, solver: str, **facts: Any) -> AnyPlan:
        """The plan of a run.

        solver: what a calibration for it is named by, see `Spacings.name_of`; facts: more that one is made for.
        """
        if plan is None:
            return load_plan("off", len(rule.nodes), parallel)
        if isinstance(plan, str):
            run = RunFacts.of(solver, self.model.weights_file, timesteps=timesteps_of(rule.nodes), **facts)
            return load_plan(plan, len(rule.nodes), parallel, run=run)
        return plan

    def run(
        self,
        denoiser: Denoiser,
        rule: Rule,
        x: Tensor,
        *,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        verbose: bool = False,
    ) -> tuple[Tensor, Intermediates]:
        """The published outcome of a run: samples and what they came from.

        Args:
            plan: a Plan; or a spec for `load_plan`, with decoder batches of at most `parallel`; None = off.
            callback, img_callback: called after node i (0 = noisiest), as callback(i) and as
                img_callback(pred_x0, i).
            log_every_t: keep intermediates at the nodes whose number, counted down to 0, this divides; and of
                the first node.
            verbose: show a progress bar.

        Returns:
            samples (B, C, H, W) and {'x_inter': latents, 'pred_x0': estimates of the clean latents}, both
            beginning with x.
        """
        if log_every_t < 1:
            raise ValueError(f"log_every_t must be at least 1; got {log_every_t}")
        total = len(rule.nodes)
        intermediates: Intermediates = {"x_inter": [x], "pred_x0": [x]}
        state, states = State(x), self.states(denoiser, rule, x, plan, parallel, edits)
        for i, state in enumerate(tqdm(states, total=total, disable=not verbose, leave=False)):
            if callback is not None:
                callback(i)
            if img_callback is not None:
                img_callback(state.x0, i)
            if i == 0 or (total - 1 - i) % log_every_t == 0:
                intermediates["x_inter"].append(state.x)
                intermediates["pred_x0"].append(state.x0)
        return state.x, intermediates


class DeterministicSampler(Sampler, ABC):
    """A published sampler class that needs no more than its rule.

    Beyond the published arguments: `plan` (encoder propagation), `parallel` (decoder steps per batch),
    `edits`, `spacing` and `timesteps_at` (where the steps begin); noise comes from `seed`, see `Sampler`.
    """

    spacings: Spacings

    @abstractmethod
    def rule(self, levels: Levels) -> Rule:
        """The update rule of a run whose steps begin and end at these levels."""

    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Sequence[Tensor] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: object | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        *,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
        spacing: str | None = None,
        timesteps_at: Sequence[int] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Sample a batch of latents.

        Args:
            S: steps, 1 to the timesteps that the model was trained with.
            batch_size: images B.
            shape: of one latent, (C, H, W).
            conditioning, unconditional_conditioning: anything that `model.denoiser` takes, for B images.
            unconditional_guidance_scale: exactly 1 leaves the unconditional branch out.
            callback, img_callback, log_every_t: see `Sampler.run`.
            temperature: factor of the steps' noise, of which there is none: no effect.
            mask, x0: keep clean latents x0 where mask is 1, see `inpainting`.
            x_T: starting latents (B, C, H, W); drawn if None.
            verbose: show a progress bar.
            plan: a `Plan`, or a spec for `load_plan`; None = the encoder runs at every node.
            parallel: most decoder steps in one batch, for a plan given as a spec.
            edits: changes of the latents; inpainting comes before them.
            spacing, timesteps_at: see `Spacings.levels`; the published grid if both are None.

        Returns:
            samples (B, C, H, W) and {'x_inter': [...], 'pred_x0': [...]}.

        Raises:
            ValueError: a value out of range, or an argument that is not supported: eta, normals_sequence,
                quantize_x0, noise_dropout, score_corrector, corrector_kwargs, dynamic_threshold.
        """
        refuse(
            eta=eta,
            normals_sequence=normals_sequence,
            quantize_x0=quantize_x0,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            dynamic_threshold=dynamic_threshold,
        )
        rule = self.rule(self.spacings.levels(self.model.alphas_cumprod, S, spacing, timesteps_at))
        seeds = self.draw_seeds(batch_size)
        return self.run(
            self.model.denoiser(conditioning, unconditional_conditioning, unconditional_guidance_scale),
            rule,
            self.start((batch_size, *shape), x_T, seeds),
            plan=self.loaded_plan(
                plan,
                rule,
                parallel,
                self.spacings.name_of(self.solver, spacing, timesteps_at),
                scale=float(unconditional_guidance_scale),
            ),
            edits=(*mask_edits(mask, x0, rule.nodes, seeds), *edits),
            callback=callback,
            img_callback=img_callback,
            log_every_t=log_every_t,
            verbose=verbose,
        )


def same_device(asked: torch.device, real: torch.device) -> bool:
    """Whether a tensor on `real` is on the device asked for; 'cuda' asks for any."""
    return asked.type == real.type and asked.index in (None, real.index)


def mask_edits(
    mask: Tensor | None, x0: Tensor | None, nodes: Sequence[Node], seeds: Sequence[tuple[int, ...]]
) -> tuple[Edit, ...]:
    """The published mask / x0 arguments as edits: none, or inpainting with each image's own noise.

    Raises:
        ValueError: only one of mask and x0 is given.
    """
    if (mask is None) != (x0 is None):
        raise ValueError("mask and x0 belong together: mask 1 keeps x0; got only one of them")
    if mask is None:
        return ()
    index = {node: i for i, node in enumerate(nodes)}
    noise = ImageNoise([(*seed, MASK_STREAM) for seed in seeds])
    return (inpainting(x0, mask, lambda x, node: noise.node(index[node], x)),)


def refuse(**arguments: object) -> None:
    """Raise for published arguments that are set but have no meaning here.

    Raises:
        ValueError: an argument is neither None nor 0 nor False.
    """
    for name, value in arguments.items():
        if value is not None and (isinstance(value, Tensor) or value != 0):
            raise ValueError(f"{name} is not supported by this sampler; leave it out (got {value!r})")


def per_image(values: Tensor, index: Tensor | int, x: Tensor, name: str) -> Tensor:
    """values[index] shaped to multiply x: (B, 1, 1, 1).

    Raises:
        ValueError: an index outside the table.
    """
    index = torch.as_tensor(index, device=values.device).expand(len(x))  # (B,)
    if index.min() < 0 or index.max() >= len(values):
        raise ValueError(f"{name} must be 0..{len(values) - 1}; got {index.tolist()}")
    return values[index].view(-1, *[1] * (x.ndim - 1)).to(x)
