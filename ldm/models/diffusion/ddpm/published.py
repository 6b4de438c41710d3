"""The published methods of `LatentDiffusion` that sample, look at a batch, and draw what a training logs.

Scripts and notebooks call them; here they run on the project's one denoising loop. Noise comes from PyTorch's
generator, as published. docs/compatibility.md says what is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.compatibility import isimage, log_txt_as_img
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.loop import Edit, State, denoise
from ldm.models.diffusion.propagation.plan import Plan
from ldm.models.diffusion.sampler import refuse
from ldm.models.diffusion.schedule import Node
from ldm.modules.diffusionmodules.util import at

Clean = Callable[[Tensor], Tensor]  # a change of the predicted clean latents, (B, C, H, W)


@dataclass(frozen=True)
class Posterior:
    """A draw from the posterior of the model's own table at every training timestep, as published (DDPM).

    clean: what is done to the predicted clean latents.
    """

    model: PublishedMethods
    nodes: tuple[Node, ...]
    clean: Clean
    temperature: float = 1.0

    def step(self, state: State, i: int, eps: Tensor) -> State:
        t = torch.full((len(state.x),), int(self.nodes[i].t), device=state.x.device)
        x0 = self.clean(self.model.predict_start_from_noise(state.x, t, eps))
        mean, _, log_variance = self.model.q_posterior(x0, state.x, t)
        noise = self.temperature * torch.randn_like(state.x) * (self.nodes[i].t > 0)
        return State(mean + (log_variance / 2).exp() * noise, x0=x0)


class PublishedMethods:
    """A part of `LatentDiffusion`."""

    # Without the network

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, C, H, W), variance and log-variance (B, 1, 1, 1) of q(x_t | x_0); t is (B,)."""
        mean = at(self.sqrt_alphas_cumprod, t, x_start) * x_start
        variance = at(1 - self.alphas_cumprod, t, x_start)
        return mean, variance, at(self.log_one_minus_alphas_cumprod, t, x_start)

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` with gradients: latents (B, C, h, w) -> images (B, 3, f*h, f*w)."""
        refuse(predict_cids=predict_cids)
        return self._decoded(z, force_not_quantize)

    # One step

    @torch.no_grad()
    def p_mean_variance(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: object = None,
        corrector_kwargs: object = None,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t), and x0 if asked for; t is (B,)."""
        refuse(
            return_codebook_ids=return_codebook_ids, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs
        )
        out = self.apply_model(x, t, c)
        if self.parameterization == "eps":
            out = self.predict_start_from_noise(x, t, out)
        elif self.parameterization == "v":
            out = self.predict_start_from_z_and_v(x, t, out)
        x0 = self._clean(clip_denoised, quantize_denoised)(out)
        posterior = self.q_posterior(x0, x, t)
        return (*posterior, x0) if return_x0 else posterior

    @torch.no_grad()
    def p_sample(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: object = None,
        corrector_kwargs: object = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x_{t-1}, and x0 if asked for; t is (B,)."""
        refuse(noise_dropout=noise_dropout)
        mean, _, log_variance, x0 = self.p_mean_variance(
            x, c, t, clip_denoised, return_codebook_ids, quantize_denoised, True, score_corrector, corrector_kwargs
        )
        noise = torch.randn_like(x[:1]).expand_as(x) if repeat_noise else torch.randn_like(x)
        drawn = (t > 0).view(-1, *[1] * (x.ndim - 1))  # none in the last step
        x = mean + drawn * (log_variance / 2).exp() * temperature * noise
        return (x, x0) if return_x0 else x

    def _clean(self, clip: bool, quantize: bool) -> Clean:
        def clean(x0: Tensor) -> Tensor:
            x0 = x0.clamp(-1, 1) if clip else x0
            return self.first_stage_model.quantize(x0).z if quantize else x0

        return clean

    # Whole runs

    def _ancestral(
        self,
        cond: Any,
        x: Tensor,
        steps: int,
        mask: Tensor | None,
        x0: Tensor | None,
        quantize_denoised: bool,
        temperature: float,
        verbose: bool,
    ) -> Iterator[tuple[int, State]]:
        """The timestep and the state after each of the last `steps` training timesteps."""
        abar = [1.0, *self.alphas_cumprod.tolist()]  # before each timestep
        nodes = tuple(Node(t, abar[t + 1], abar[t]) for t in reversed(range(steps)))
        rule = Posterior(self, nodes, self._clean(False, quantize_denoised), temperature)
        edits = () if mask is None else (self._kept(mask, x0),)
        states = denoise(self.denoiser(cond), rule, Plan(steps, tuple(range(steps))), x, edits)
        return zip(reversed(range(steps)), tqdm(states, total=steps, disable=not verbose, leave=False), strict=True)

    def _kept(self, mask: Tensor, x0: Tensor | None) -> Edit:
        """The masked part is x0 at the timestep just stepped, as published for these runs: also after the last."""
        if x0 is None or x0.shape[-2:] != mask.shape[-2:]:
            raise ValueError("mask needs x0, of the same height and width")

        def keep(x: Tensor, node: Node) -> Tensor:
            t = torch.full((len(x),), int(node.t), device=x.device)
            return mask * self.q_sample(x0, t) + (1 - mask) * x

        return Edit(keep, "update")

    def _steps(self, timesteps: int | None, start_T: int | None) -> int:
        """How many of the training timesteps are run, the last ones."""
        steps = min(self.num_timesteps if given is None else given for given in (timesteps, start_T))
        if not 1 <= steps <= self.num_timesteps:
            raise ValueError(f"timesteps and start_T must be 1..{self.num_timesteps}; got {timesteps}, {start_T}")
        return steps

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Any,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> Any:
        """Latents of the given shape (B, C, H, W) by the last `timesteps` of the training's timesteps (default: all).

        Returns:
            the latents, with return_intermediates also the list of them at every log_every_t-th timestep.
        """
        x, steps = self._begin(shape, x_T), self._steps(timesteps, start_T)
        every, kept = log_every_t or self.log_every_t, [x]
        for t, state in self._ancestral(cond, x, steps, mask, x0, quantize_denoised, 1.0, verbose):
            x = state.x
            if t % every == 0 or t == steps - 1:
                kept.append(x)
            self._call(callback, img_callback, x, t)
        return (x, kept) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Any,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: object = None,
        corrector_kwargs: object = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The same; returns the latents, and what was predicted of the clean ones at every log_every_t-th timestep.

        Args:
            shape: (B, C, H, W), or with batch_size (C, H, W).
            temperature: factor of the noise.
        """
        refuse(noise_dropout=noise_dropout, score_corrector=score_corrector, corrector_kwargs=corrector_kwargs)
        x = self._begin(shape if batch_size is None else (batch_size, *shape), x_T)
        steps, every, kept = self._steps(None, start_T), log_every_t or self.log_every_t, []
        for t, state in self._ancestral(cond, x, steps, mask, x0, quantize_denoised, temperature, verbose):
            x = state.x
            if t % every == 0 or t == steps - 1:
                kept.append(state.x0)
            self._call(callback, img_callback, x, t)
        return x, kept

    def _begin(self, shape: Sequence[int], x_T: Tensor | None) -> Tensor:
        return torch.randn(*shape, device=self.device) if x_T is None else x_T

    @staticmethod
    def _call(callback: Callable | None, img_callback: Callable | None, x: Tensor, t: int) -> None:
        if callback is not None:
            callback(t)
        if img_callback is not None:
            img_callback(x, t)

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.channels, self.image_size, self.image_size

    @torch.no_grad()
    def sample(
        self,
        cond: Any,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`p_sample_loop`, of the model's own shape unless another is given; of cond the first batch_size."""
        shape = self._shape(batch_size) if shape is None else shape
        return self.p_sample_loop(
            first(cond, batch_size),
            shape,
            return_intermediates,
            x_T,
            verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
            **kwargs,
        )

    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Latents and intermediates by DDIM, or by all timesteps of the training; kwargs are theirs."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **kwargs)
        sampler = DDIMSampler(self, seed=int(torch.randint(2**31, ())))
        return sampler.sample(ddim_steps, batch_size, self._shape(batch_size)[1:], cond, verbose=False, **kwargs)

    # Conditions and batches

    @torch.no_grad()
    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """What guidance leads away from, for so many images.

        Args:
            null_label: what the conditioner is given for none: a text such as "", a class or its tensor; None = the
                last class, of a model of classes.

        Raises:
            ValueError: null_label is needed.
        """
        if null_label is None:
            classes = getattr(self.cond_stage_model, "n_classes", None)
            if classes is None:
                raise ValueError('null_label: needed by this model; for one that reads text it is ""')
            null_label = classes - 1
        if isinstance(null_label, int):
            null_label = torch.tensor([null_label])
        raw = [null_label] if isinstance(null_label, str) else null_label
        c = self.get_learned_conditioning(raw.to(self.device) if isinstance(raw, Tensor) else raw)
        return c.expand(batch_size, *c.shape[1:]) if len(c) == 1 else c

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
    ) -> list[Any]:
        """Latents and condition of a batch of a data set.

        Args:
            batch: images (B, H, W, 3) in [-1, 1] under k, and the condition under cond_key or cond_stage_key.
            return_first_stage_outputs: also the images, (B, 3, H, W), and what the first stage makes of them.
            return_original_cond: also the condition before it was encoded.
            bs: only the first so many.
        """
        x = images(batch[k])[:bs].to(self.device)
        z = self.get_first_stage_encoding(self.encode_first_stage(x))
        key, raw, c = cond_key or self.cond_stage_key, None, None
        if self.model.conditioning_key is not None:
            raw = first(batch[key], bs)
            raw = images(raw).to(self.device) if isinstance(raw, Tensor) and raw.ndim == 4 else raw
            c = self.get_learned_conditioning(raw) if force_c_encode or not self.cond_stage_trainable else raw
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        return [*out, raw] if return_original_cond else out

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Sequence[str] | None = None,
        quantize_denoised: bool = False,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
    ) -> dict[str, Tensor]:
        """What a training shows of a batch, each (B, 3, H, W) or a sheet (1, 3, H', W'), about [-1, 1].

        inputs, reconstruction, conditioning; samples and with them, as asked for: diffusion_row (images made noisy),
        denoise_row, progressive_row (what was predicted on the way), samples_inpainting and samples_outpainting with
        their mask, samples_cfg_scale_X.

        Args:
            N: most images. n_row: most in a diffusion row.
            ddim_steps, ddim_eta: None = all timesteps of the training.
            return_keys: only these.
        """
        refuse(quantize_denoised=quantize_denoised)
        z, c, x, reconstruction, raw = self.get_input(
            batch, self.first_stage_key, True, True, return_original_cond=True, bs=N
        )
        log = {"inputs": x, "reconstruction": reconstruction}
        if (shown := conditioning_image(raw, tuple(x.shape[2:]))) is not None:
            log["conditioning"] = shown
        if plot_diffusion_rows:
            ts = [t for t in range(self.num_timesteps) if t % self.log_every_t == 0 or t == self.num_timesteps - 1]
            noise = torch.randn_like(z[:n_row])
            log["diffusion_row"] = sheet(
                [
                    self.decode_first_stage(
                        self.q_sample(z[:n_row], torch.full((len(noise),), t, device=z.device), noise)
                    )
                    for t in ts
                ]
            )
        with self.ema_scope("Plotting") if use_ema_scope else nullcontext():
            log |= self._samples(
                z,
                c,
                sample,
                steps=ddim_steps,
                eta=ddim_eta,
                denoise_rows=plot_denoise_rows,
                progressive_rows=plot_progressive_rows,
                inpaint=inpaint,
                scale=unconditional_guidance_scale,
                label=unconditional_guidance_label,
            )
        return log if not return_keys else {key: log[key] for key in return_keys if key in log}

    def _samples(
        self,
        z: Tensor,
        c: Any,
        sample: bool,
        steps: int | None,
        eta: float,
        denoise_rows: bool,
        progressive_rows: bool,
        inpaint: bool,
        scale: float,
        label: Any,
    ) -> dict[str, Tensor]:
        log = {}

        def drawn(**more: Any) -> tuple[Tensor, Any]:
            how = {} if steps is None else {"eta": eta}
            return self.sample_log(c, len(z), steps is not None, steps, **how, **more)

        if sample:
            latents, between = drawn()
            log["samples"] = self.decode_first_stage(latents)
            if denoise_rows:
                rows = between["x_inter"] if isinstance(between, dict) else between
                log["denoise_row"] = sheet([self.decode_first_stage(row) for row in rows])
        if sample and scale > 1:
            uncond = self.get_unconditional_conditioning(len(z), label)
            latents, _ = self.sample_log(
                c,
                len(z),
                True,
                steps or self.num_timesteps,
                eta=eta,
                unconditional_guidance_scale=scale,
                unconditional_conditioning=uncond,
            )
            log[f"samples_cfg_scale_{scale:.2f}"] = self.decode_first_stage(latents)
        if sample and inpaint:
            height, width = z.shape[2:]
            mask = torch.ones(len(z), 1, height, width, device=z.device)  # 1 is kept
            mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 0
            log["mask"] = mask
            for name, kept in (("inpainting", mask), ("outpainting", 1 - mask)):
                log[f"samples_{name}"] = self.decode_first_stage(drawn(mask=kept, x0=z)[0])
        if progressive_rows:
            _, rows = self.progressive_denoising(c, self._shape(len(z)), verbose=False)
            log["progressive_row"] = sheet([self.decode_first_stage(row) for row in rows])
        return log


def first(cond: Any, count: int | None) -> Any:
    """The first images of a condition in any published form."""
    if cond is None or count is None:
        return cond
    if isinstance(cond, Mapping):
        return {
            key: [part[:count] for part in value] if isinstance(value, list) else value[:count]
            for key, value in cond.items()
        }
    if isinstance(cond, list) and all(isinstance(part, Tensor) for part in cond):
        return [part[:count] for part in cond]
    return cond[:count]


def images(batch: Any) -> Tensor:
    """Images of a data set, (B, H, W, C) or (B, H, W), as (B, C, H, W)."""
    batch = torch.as_tensor(batch).float()
    return (batch[..., None] if batch.ndim == 3 else batch).movedim(-1, 1).contiguous()


def sheet(rows: Sequence[Tensor]) -> Tensor:
    """Images side by side, a line for each image of the batch: (B, 3, H, W) per column -> (1, 3, B H, n W)."""
    lines = torch.cat(list(rows), dim=3)  # (B, 3, H, n W)
    return torch.cat(list(lines), dim=1)[None]


def conditioning_image(raw: Any, size: tuple[int, int]) -> Tensor | None:
    """A condition as images (B, 3, H, W), if it can be shown: images, texts, classes."""
    if isinstance(raw, Tensor) and isimage(raw):
        return raw
    if isinstance(raw, Tensor) and raw.ndim == 1:
        raw = [str(number) for number in raw.tolist()]
    if isinstance(raw, list) and all(isinstance(text, str) for text in raw):
        return log_txt_as_img(size[::-1], raw, size=max(8, size[0] // 25))
    return None
