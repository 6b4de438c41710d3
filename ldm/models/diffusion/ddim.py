"""Denoising diffusion implicit models (arXiv 2010.02502): update rule and published sampler class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.loop import Edit, State
from ldm.models.diffusion.propagation.plan import AnyPlan, Plan
from ldm.models.diffusion.sampler import Intermediates, Sampler, mask_edits, per_image, refuse
from ldm.models.diffusion.schedule import (
    CLEAN,
    OF_DDIM,
    ImageNoise,
    Levels,
    Node,
    ddim_levels,
    ddim_nodes,
    ddim_sigma,
    ddim_timesteps,
    diffuse,
    nodes_between,
    predict_x0,
)

Noise = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class DDIM:
    """The DDIM update: to x0 and back up to the next level, along the predicted noise and fresh noise.

    x <- sqrt(abar') x0 + sqrt(1 - abar' - sigma^2) eps + temperature * sigma * noise

    Nodes of rising noise (abar_next < abar, eta 0) invert: they take an image to its noise.

    Args:
        nodes: noisiest first.
        eta: 0 = deterministic, 1 = ancestral sampling.
        noise: (i, x) -> unit normal noise of node i, like x; not called where sigma is 0.
        temperature: factor of the fresh noise.

    Raises:
        ValueError: eta is not in 0..1, or is positive without a source of noise.

    Source: DDIM (arXiv 2010.02502), eq. 12 and 16.
    """

    nodes: tuple[Node, ...]
    eta: float = 0.0
    noise: Noise | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be 0 (deterministic) to 1 (ancestral); got {self.eta}")
        if self.eta > 0 and self.noise is None:
            raise ValueError(f"eta {self.eta} needs noise, the source of each node's fresh noise")

    def step(self, state: State, i: int, eps: Tensor) -> State:
        node = self.nodes[i]
        sigma = ddim_sigma(node, self.eta)
        x0 = predict_x0(state.x, eps, node.abar)  # (B, C, H, W)
        x = sqrt(node.abar_next) * x0 + sqrt(max(0.0, 1 - node.abar_next - sigma**2)) * eps
        if sigma > 0:
            x = x + self.temperature * sigma * self.noise(i, state.x)
        return State(x, x0=x0)


class DDIMSampler(Sampler):
    """DDIM sampling, image-to-image and inversion with the published signatures.

    Beyond them: `plan` (encoder propagation), `parallel` (decoder steps per batch), `edits`, `spacing` and
    `timesteps_at` (where the steps begin); noise comes from `seed`, see `Sampler`, where the published class uses the
    global generator.
    """

    solver = "ddim"
    ddim_timesteps: tuple[float, ...] = ()
    ddim_eta: float = 0.0
    _levels: Levels = ()

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
        *,
        spacing: str | None = None,
        timesteps_at: Sequence[int] | None = None,
    ) -> None:
        """Fix the timestep grid and eta for `decode`, `encode`, `stochastic_encode` and `ddim_sampling`.

        Args:
            ddim_num_steps, ddim_discretize: see `ddim_timesteps`.
            ddim_eta: 0 = deterministic, 1 = ancestral.
            verbose: as published, also print the grid.
            spacing, timesteps_at: in place of ddim_discretize, see `Spacings.levels`.
        """
        if spacing is None and timesteps_at is None:
            grid = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps, ddim_discretize)
            self._levels = ddim_levels(self.model.alphas_cumprod, grid)
        else:
            refuse(ddim_discretize=None if ddim_discretize == "uniform" else ddim_discretize)
            self._levels = OF_DDIM.levels(self.model.alphas_cumprod, ddim_num_steps, spacing, timesteps_at)
        self.solver = OF_DDIM.name_of("ddim", spacing, timesteps_at)
        self.ddim_timesteps = tuple(level.t for level in reversed(self._levels[:-1]))
        self.ddim_eta = ddim_eta
        if verbose:
            print(f"DDIM timesteps: {self.ddim_timesteps}, eta {ddim_eta}")

    def _nodes(self, use_original_steps: bool) -> tuple[Node, ...]:
        """Nodes of the grid, or of every training timestep, which ends at abar = 1."""
        if use_original_steps:
            return ddim_nodes(self.model.alphas_cumprod, range(self.ddpm_num_timesteps), CLEAN)
        return nodes_between(self._grid())

    def _grid(self) -> Levels:
        if not self._levels:
            raise ValueError("there is no timestep grid yet: call make_schedule(ddim_num_steps) first")
        return self._levels

    def _plan(self, plan: AnyPlan | str | None, rule: DDIM, parallel: int, scale: float) -> AnyPlan:
        return self.loaded_plan(plan, rule, parallel, self.solver, eta=float(self.ddim_eta), scale=float(scale))

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
        ucg_schedule: Sequence[float] | None = None,
        *,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
        spacing: str | None = None,
        timesteps_at: Sequence[int] | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Sample a batch of latents.

        Args:
            S: DDIM steps; see `ddim_timesteps` for step counts that do not divide the training's.
            batch_size: images B.
            shape: of one latent, (C, H, W).
            conditioning, unconditional_conditioning: anything that `model.denoiser` takes, for B images.
            unconditional_guidance_scale: exactly 1 leaves the unconditional branch out.
            callback, img_callback, log_every_t: see `Sampler.run`.
            normals_sequence: noise of each step, noisiest first, each (B, C, H, W); drawn if None.
            eta: 0 = deterministic, 1 = ancestral.
            temperature: factor of the steps' noise.
            mask, x0: keep clean latents x0 where mask is 1, see `inpainting`.
            x_T: starting latents (B, C, H, W); drawn if None.
            verbose: show a progress bar.
            plan: a `Plan`, or a spec for `load_plan`; None = the encoder runs at every step.
            parallel: most decoder steps in one batch, for a plan given as a spec.
            edits: changes of the latents; inpainting comes before them.
            spacing, timesteps_at: see `Spacings.levels`; the published grid if both are None.

        Returns:
            samples (B, C, H, W) and {'x_inter': [...], 'pred_x0': [...]}.

        Raises:
            ValueError: a value out of range, or an argument that is not supported: quantize_x0,
                noise_dropout, score_corrector, corrector_kwargs, dynamic_threshold, ucg_schedule.
        """
        refuse(
            quantize_x0=quantize_x0,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            dynamic_threshold=dynamic_threshold,
            ucg_schedule=ucg_schedule,
        )
        self.make_schedule(S, ddim_eta=eta, verbose=False, spacing=spacing, timesteps_at=timesteps_at)
        return self.ddim_sampling(
            conditioning,
            (batch_size, *shape),
            x_T=x_T,
            callback=callback,
            normals_sequence=normals_sequence,
            mask=mask,
            x0=x0,
            img_callback=img_callback,
            log_every_t=log_every_t,
            temperature=temperature,
            unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            verbose=verbose,
            plan=plan,
            parallel=parallel,
            edits=edits,
        )

    def ddim_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        *,
        normals_sequence: Sequence[Tensor] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        verbose: bool = True,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
    ) -> tuple[Tensor, Intermediates]:
        """Sample after `make_schedule`, whole or from the middle.

        Args:
            shape: (B, C, H, W).
            ddim_use_original_steps: every training timestep instead of the grid.
            timesteps: run only the last timesteps - 1 of the grid, one less than it says, as published; with
                ddim_use_original_steps exactly that many.
            The rest: see `sample`.
        """
        nodes = self._nodes(ddim_use_original_steps)
        if timesteps is not None:
            # Written as published: the rounding of this expression decides which grid is kept.
            kept = timesteps if ddim_use_original_steps else int(min(timesteps / len(nodes), 1) * len(nodes)) - 1
            nodes = last(nodes, kept, "timesteps")
        seeds = self.draw_seeds(shape[0])
        if normals_sequence is not None and len(normals_sequence) != len(nodes):
            raise ValueError(f"normals_sequence must hold noise for {len(nodes)} steps; got {len(normals_sequence)}")
        noise = ImageNoise(seeds).node if normals_sequence is None else lambda i, x: normals_sequence[i].to(x)
        rule = DDIM(nodes, self.ddim_eta, noise, temperature)
        return self.run(
            self.model.denoiser(cond, unconditional_conditioning, unconditional_guidance_scale),
            rule,
            self.start(shape, x_T, seeds),
            plan=self._plan(plan, rule, parallel, unconditional_guidance_scale),
            edits=(*mask_edits(mask, x0, nodes, seeds), *edits),
            callback=callback,
            img_callback=img_callback,
            log_every_t=log_every_t,
            verbose=verbose,
        )

    def p_sample_ddim(
        self,
        x: Tensor,
        c: Any,
        t: Tensor | int,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: object | None = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step, after `make_schedule`; for loops of one's own, which run the encoder at every step.

        Args:
            x: (B, C, H, W).
            t: the timestep that the network gets, one for all images; one or (B,).
            index: of the step in the ascending grid, or with use_original_steps the training timestep.
            The rest: see `sample`.

        Returns:
            the next latents and the estimate of the clean ones, each (B, C, H, W).

        Raises:
            ValueError: index is outside the grid, several timesteps, or an argument that is not supported:
                repeat_noise and those of `sample`.
        """
        refuse(
            repeat_noise=repeat_noise,
            quantize_denoised=quantize_denoised,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            dynamic_threshold=dynamic_threshold,
        )
        given = torch.as_tensor(t).unique().tolist()
        if len(given) != 1:
            raise ValueError(f"t must be one timestep for all images; got {given}")
        nodes = self._nodes(use_original_steps)
        if not 0 <= index < len(nodes):
            raise ValueError(f"index must be 0..{len(nodes) - 1}; got {index}")
        node = nodes[-1 - index]
        denoiser = self.model.denoiser(c, unconditional_conditioning, unconditional_guidance_scale)
        noise = ImageNoise(self.draw_seeds(len(x))).node
        rule = DDIM((Node(given[0], node.abar, node.abar_next),), self.ddim_eta, noise, temperature)
        (state,) = self.states(denoiser, rule, x)
        return state.x, state.x0

    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Bring clean latents to the noise level of grid entry t, for `decode` with t_start = t.

        As published that level is one grid entry noisier than the one where `decode` starts, and t must be
        less than the number of steps.

        Args:
            x0: (B, C, H, W).
            t: index into the ascending grid, or with use_original_steps a training timestep; one or (B,).
            noise: like x0; drawn if None.

        Raises:
            ValueError: t is outside the grid.
        """
        abar = self.model.alphas_cumprod
        if not use_original_steps:
            abar = torch.tensor([level.abar for level in reversed(self._grid()[:-1])], device=abar.device)
        if noise is None:
            noise = self.start(x0.shape, None, self.draw_seeds(len(x0)))
        return diffuse(x0, noise.to(x0), per_image(abar, t, x0, "t"))

    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        *,
        plan: Plan | str | None = None,
        parallel: int = 1,
        edits: Sequence[Edit] = (),
    ) -> Tensor:
        """Sample from noisy latents through the last t_start steps of the schedule.

        A plan counts the nodes of this shorter run.

        Returns:
            latents (B, C, H, W).

        Raises:
            ValueError: t_start is not between 1 and the number of steps.
        """
        nodes = last(self._nodes(use_original_steps), t_start, "t_start")
        rule = DDIM(nodes, self.ddim_eta, ImageNoise(self.draw_seeds(len(x_latent))).node)
        return self.run(
            self.model.denoiser(cond, unconditional_conditioning, unconditional_guidance_scale),
            rule,
            x_latent,
            plan=self._plan(plan, rule, parallel, unconditional_guidance_scale),
            edits=edits,
            callback=callback,
        )[0]

    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        *,
        true_timesteps: bool = False,
        plan: Plan | str | None = None,
        parallel: int = 1,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Invert: take clean latents to the noise that deterministic sampling turns into them.

        Args:
            x0: (B, C, H, W).
            t_enc: steps of the inversion, 1..number of steps; `decode` with t_start = t_enc goes back.
            return_intermediates: how many latents on the way to return too, evenly spaced.
            true_timesteps: tell the network the timestep of the latent's noise level. The published code, and
                the default, tells it the number of the step (0, 1, 2, ...).

        Returns:
            noisy latents (B, C, H, W) and {'x_encoded': them, 'intermediate_steps': numbers of those kept},
            with return_intermediates also {'intermediates': their latents}.

        Raises:
            ValueError: t_enc or return_intermediates is out of range.
        """
        nodes = inversion_nodes(last(self._nodes(use_original_steps), t_enc, "t_enc"), true_timesteps)
        keep = kept_steps(t_enc, return_intermediates)
        denoiser = self.model.denoiser(c, unconditional_conditioning, unconditional_guidance_scale)
        state, kept = State(x0), []
        for i, state in enumerate(self.states(denoiser, DDIM(nodes), x0, plan, parallel)):
            if i in keep:
                kept.append(state.x)
            if callback is not None:
                callback(i)
        out: dict[str, Any] = {"x_encoded": state.x, "intermediate_steps": keep}
        return state.x, out if return_intermediates is None else {**out, "intermediates": kept}


def inversion_nodes(descent: Sequence[Node], true_timesteps: bool) -> tuple[Node, ...]:
    """The nodes that lead back up a descent, to its first level; see `DDIMSampler.encode`."""
    below = (0, *(node.t for node in reversed(descent[1:])))  # where each step of the inversion begins
    return tuple(
        Node(t if true_timesteps else i, node.abar_next, node.abar)
        for i, (t, node) in enumerate(zip(below, reversed(descent), strict=True))
    )


def kept_steps(total: int, wanted: int | None) -> list[int]:
    """About `wanted` evenly spaced of `total` steps, always with the last two, as published; none if None.

    Raises:
        ValueError: more are wanted than there are.
    """
    if wanted is None:
        return []
    if not 1 <= wanted <= total:
        raise ValueError(f"return_intermediates must be 1..{total}; got {wanted}")
    return [i for i in range(total) if i % (total // wanted) == 0 or i >= total - 2]


def last(nodes: tuple[Node, ...], count: int, name: str) -> tuple[Node, ...]:
    """The last `count` nodes of a run.

    Raises:
        ValueError: there are not that many, or none is asked for.
    """
    if not 1 <= count <= len(nodes):
        raise ValueError(f"{name} must leave 1..{len(nodes)} steps; it leaves {count}")
    return nodes[len(nodes) - count :]
