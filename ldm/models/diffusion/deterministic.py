"""The published `.sample(...)` signature for samplers that draw no noise of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.models.diffusion.edits import Edit
from ldm.models.diffusion.loop import Rule
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.sampler import Intermediates, Sampler, mask_edits, refuse


class DeterministicSampler(Sampler, ABC):
    """A published sampler class that needs no more than its rule.

    Beyond the published arguments: `plan` (encoder propagation), `parallel` (decoder steps per batch),
    `edits`; noise comes from `seed`, see `Sampler`.
    """

    @abstractmethod
    def rule(self, steps: int) -> Rule:
        """The update rule of a run.

        Raises:
            ValueError: the number of steps is out of range.
        """

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
        rule, seeds = self.rule(S), self.draw_seeds(batch_size)
        return self.run(
            self.model.denoiser(conditioning, unconditional_conditioning, unconditional_guidance_scale),
            rule,
            self.start((batch_size, *shape), x_T, seeds),
            plan,
            parallel,
            (*mask_edits(mask, x0, rule.nodes, seeds), *edits),
            callback,
            img_callback,
            log_every_t,
            verbose,
        )
