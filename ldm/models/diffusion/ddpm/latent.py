"""Diffusion models as plain modules: `DDPM` with its network, and `LatentDiffusion` on the latents of a first stage.

Sources: DDPM (arXiv 2006.11239), v-prediction (arXiv 2202.00512), latent diffusion (arXiv 2112.10752),
retrieval-augmented diffusion (arXiv 2204.11824). Buffers and sub-modules carry the names of the published checkpoints.
Sampling is in `ldm.models.diffusion.ddim` and its neighbours, training in `ldm.training`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddpm.published import PublishedMethods
from ldm.models.diffusion.denoiser import (
    Conditional,
    ConditionedNetwork,
    Conditioning,
    Denoiser,
    Guidance,
    Guided,
    Thresholded,
)
from ldm.modules.attention_control import AttentionControl
from ldm.modules.diffusionmodules.util import (
    Features,
    ForwardProcess,
    PartWeights,
    at,
    make_beta_schedule,
    with_zero_terminal_snr,
)
from ldm.modules.distributions.distributions import (
    DiagonalGaussianDistribution,
    discretized_log_likelihood,
    gaussian_divergence,
)
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

PARAMETERIZATIONS = ("eps", "x0", "v")
ConditionLike = Conditioning | Tensor | Sequence[Tensor] | Mapping[str, Any] | None


class DDPM(ForwardProcess):
    """A diffusion process with its network.

    Args:
        unet_config: the network, `target` and `params`.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: the noise schedule, see
            `make_beta_schedule`; given_betas replaces the rest.
        zero_terminal_snr: see `with_zero_terminal_snr`; not with eps, which has nothing to learn from pure noise.
        v_posterior: 0..1, weight of beta against the exact posterior variance.
        parameterization: what the network predicts: "eps", "x0" or "v".
        conditioning_key: see `DiffusionWrapper`.
        use_ema: keep a moving average of the network's weights.
        guided_channels: how many channels of the prediction classifier-free guidance acts on, the first ones; None =
            those of the noise.
        dynamic_threshold: the largest value that dynamic thresholding scales down, see `thresholded`; None = no
            thresholding.
        first_stage_key, image_size, channels: name and size of what is diffused.
        loss_type, original_elbo_weight, l_simple_weight, learn_logvar, logvar_init: training loss, see
            `p_losses`.
        scheduler_config, ckpt_path: learning-rate schedule and starting weights of a training.
        monitor, log_every_t: logging of the trainer.

    weights_file: the file (or diffusers folder) that `load_model` filled it from, beside which its calibrations lie.
    """

    weights_file: Path | None = None

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        monitor: str | None = None,
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        ckpt_path: str | None = None,
        zero_terminal_snr: bool = False,
        guided_channels: int | None = None,
        dynamic_threshold: float | None = None,
    ):
        betas = np.asarray(
            given_betas
            if given_betas is not None
            else make_beta_schedule(
                beta_schedule, timesteps, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s
            ),
            np.float64,
        )
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization {parameterization!r} is not one of {PARAMETERIZATIONS}")
        if zero_terminal_snr:
            if parameterization == "eps":
                raise ValueError("zero_terminal_snr: not with parameterization eps; accepted: v, x0")
            betas = with_zero_terminal_snr(betas)
        super().__init__(betas)
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type {loss_type!r} is not one of ('l1', 'l2')")
        self.parameterization, self.loss_type = parameterization, loss_type
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.guided_channels, self.dynamic_threshold = guided_channels, dynamic_threshold
        self.monitor, self.log_every_t = monitor, log_every_t
        self.scheduler_config, self.ckpt_path = scheduler_config, ckpt_path
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.model_ema = LitEma(self.model) if use_ema else None
        self.register_posterior(betas, v_posterior)
        logvar = torch.full((self.num_timesteps,), logvar_init)
        self.learn_logvar = learn_logvar
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)

    def register_posterior(self, betas: np.ndarray, v_posterior: float) -> None:
        """Register the buffers of q(x_{t-1} | x_t, x_0) and of the variational bound; computed in float64."""
        alphas = 1.0 - betas
        abar = np.cumprod(alphas)
        abar_prev = np.append(1.0, abar[:-1])
        variance = (1 - v_posterior) * betas * (1.0 - abar_prev) / (1.0 - abar) + v_posterior * betas
        # The bound's weights in float32 throughout, as published: they differ in the last digits otherwise.
        f_betas, f_variance, f_alphas, f_abar = (v.astype(np.float32) for v in (betas, variance, alphas, abar))
        if self.parameterization == "x0":
            weights = 0.5 * np.sqrt(f_abar) / (2 - f_abar)
        elif self.parameterization == "v":
            weights = np.ones_like(f_betas)
        else:
            with np.errstate(divide="ignore"):  # the first variance is 0; its weight is replaced below
                weights = f_betas**2 / (2 * f_variance * f_alphas * (1 - f_abar))
        weights[0] = weights[1]
        for name, values in {
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # the first is 0
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.register_buffer("lvlb_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    # The process

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return at(self.sqrt_alphas_cumprod, t, x_t) * x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return at(self.sqrt_alphas_cumprod, t, x_t) * v + at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(abar) noise - sqrt(1 - abar) x (arXiv 2202.00512, appendix D)."""
        return at(self.sqrt_alphas_cumprod, t, x) * noise - at(self.sqrt_one_minus_alphas_cumprod, t, x) * x

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, at(self.posterior_variance, t, x_t), at(self.posterior_log_variance_clipped, t, x_t)

    # The training loss

    def prediction_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for x_t = q_sample(x_start, t, noise)."""
        if self.parameterization == "v":
            return self.get_v(x_start, noise, t)
        return noise if self.parameterization == "eps" else x_start

    def loss_per_image(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean l1 or l2 error of each image, (B,)."""
        error = prediction - target
        return (error.abs() if self.loss_type == "l1" else error.square()).flatten(1).mean(1)

    def p_losses(
        self,
        x_start: Tensor,
        cond: ConditionLike,
        t: Tensor,
        noise: Tensor | None = None,
        network: ConditionedNetwork | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The published training loss at timesteps t.

        loss = l_simple_weight * mean(L / exp(s_t) + s_t) + original_elbo_weight * mean(w_t L)

        with L the loss per image, s the log-variance `logvar` and w the weights of the variational bound. A variance
        that the network predicts adds `variance_bound`, which trains nothing else.

        Args:
            weights: (B,), of each image: the loss is mean(weights * L) in the place of these two means.

        Returns:
            scalars "loss", "loss_simple", "loss_vlb"; where logvar is learned, "loss_gamma", "logvar"; and, where a
            variance is predicted, "loss_variance".
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        prediction, v = self.split_variance(self.apply_model(x_t, t, cond, network))
        simple = self.loss_per_image(prediction, self.prediction_target(x_start, noise, t))
        logvar = self.logvar[t]
        gamma = simple / logvar.exp() + logvar
        vlb = (self.lvlb_weights[t] * simple).mean()
        published = self.l_simple_weight * gamma.mean() + self.original_elbo_weight * vlb
        losses = {
            "loss": published if weights is None else (weights * simple).mean(),
            "loss_simple": simple.mean(),
            "loss_vlb": vlb,
        }
        if self.learn_logvar:
            losses |= {"loss_gamma": gamma.mean(), "logvar": self.logvar.mean()}
        if v is not None:
            bound = self.variance_bound(x_start, x_t, t, prediction.detach(), v).mean()
            losses |= {"loss": losses["loss"] + bound, "loss_variance": bound}
        return losses

    def split_variance(self, prediction: Tensor) -> tuple[Tensor, Tensor | None]:
        """A raw prediction without what it says of the variance, and that, each (B, C, H, W); None = nothing."""
        return prediction.chunk(2, dim=1) if self.predicts_variance else (prediction, None)

    def variance_bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor, v: Tensor) -> Tensor:
        """The variational bound of each image at timesteps t in bits per dimension, (B,), by which v is trained.

        Source: Nichol and Dhariwal (arXiv 2102.09672), eq. 15 and 16.
        """
        to_x0 = {"eps": self.predict_start_from_noise, "v": self.predict_start_from_z_and_v}.get(self.parameterization)
        x0 = prediction if to_x0 is None else to_x0(x_t, t, prediction)
        mean, _, log_posterior = self.q_posterior(x_start, x_t, t)
        # The posterior of the first timestep has no variance; as published it takes that of the second there.
        lower = at(torch.cat([self.posterior_log_variance_clipped[1:2], self.posterior_log_variance_clipped[1:]]), t, v)
        log_var = lower + (v + 1) / 2 * (at(self.betas, t, v).log() - lower)
        own_mean = self.q_posterior(x0, x_t, t)[0]
        divergence = gaussian_divergence(mean, log_posterior, own_mean, log_var)
        likelihood = discretized_log_likelihood(x_start, own_mean, log_var / 2)
        first = (t == 0).view(-1, *[1] * (v.ndim - 1))
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)

    # The network

    @property
    def predicts_variance(self) -> bool:
        """Whether the network predicts a variance for each channel, in channels behind the noise."""
        return self.model.diffusion_model.out_channels == 2 * self.channels

    def conditioning(self, cond: ConditionLike) -> Conditioning:
        """A `Conditioning` from any of the published forms: tensor, list of tensors, dict of lists, None."""
        if isinstance(cond, Conditioning):
            return cond
        if cond is None:
            return Conditioning()
        if isinstance(cond, Mapping):
            unknown = set(cond) - {"c_concat", "c_crossattn", "c_adm"}
            if unknown:
                raise ValueError(f"conditioning: keys {sorted(unknown)} are not c_concat, c_crossattn or c_adm")
            return self.model.conditioning(**cond)
        parts = [cond] if isinstance(cond, Tensor) else list(cond)
        name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
        return self.model.conditioning(**{name: parts})

    def apply_model(
        self, x: Tensor, t: Tensor, cond: ConditionLike = None, network: ConditionedNetwork | None = None
    ) -> Tensor:
        """Raw prediction for x, (B, C, H, W), at timesteps t, (B,); by the model's network or another."""
        cond, network = self.conditioning(cond), self.model if network is None else network
        return network.decode(network.encode(x, t, cond), t, cond)

    def denoiser(
        self,
        cond: ConditionLike = None,
        uncond: ConditionLike = None,
        guidance: Guidance | float = 1.0,
        tome: float = 0.0,
        network: ConditionedNetwork | None = None,
        variance: bool = False,
        control: AttentionControl | None = None,
    ) -> Denoiser:
        """The network under a condition, with classifier-free guidance (arXiv 2207.12598) unless its scale is 1.

        Args:
            cond, uncond: conditions of the same number of images, in any published form.
            guidance: eps = eps_uncond + scale * (eps_cond - eps_uncond); a `Guidance`, or its scale alone.
            tome: share of tokens that the network merges for self-attention; see `UNetModel.encode`.
            network: predicts in the place of the model's own, and may use that.
            variance: for a solver that takes the predicted variance, see `Conditional`.
            control: what some of the images take of another's attention.

        Raises:
            ValueError: guidance is asked for without uncond, or a variance of a network that predicts none.
        """
        if variance and not self.predicts_variance:
            raise ValueError("the network predicts no variance, which the solver needs")
        network = self.model if network is None else network
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        if guidance.channels is None and (self.guided_channels or self.predicts_variance):
            guidance = replace(guidance, channels=self.guided_channels or self.channels)
        cond = self.conditioning(cond)
        if guidance.scale == 1.0:
            projected = network.project(cond).controlled(control)
            return self._limited(Conditional(network, projected, self.parameterization, tome, variance))
        if uncond is None:
            raise ValueError(f"uncond: guidance scale {guidance.scale} needs an unconditional conditioning; got None")
        both = network.project(Conditioning.cat(self.conditioning(uncond), cond)).controlled(control)
        conditional = both.images(slice(both.batch // 2, None))
        guided = Guided(
            Conditional(network, both, self.parameterization, tome, variance),
            guidance,
            Conditional(network, conditional, self.parameterization, tome, variance),
        )
        return self._limited(guided)

    def _limited(self, denoiser: Denoiser) -> Denoiser:
        """With the model's thresholding of clean images."""
        return denoiser if self.dynamic_threshold is None else Thresholded(denoiser, self.dynamic_threshold)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """The network holds its averaged weights inside the block (if there are any).

        context: what the published method prints; not printed.
        """
        if self.model_ema is None:
            yield
        else:
            with self.model_ema.applied_to(self.model):
                yield


# The denoising network and the ways in which it is conditioned

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """The denoising network, fed with its condition in the way that `conditioning_key` names.

    concat: channels beside x; crossattn: context tokens; adm: a vector or label beside the timestep;
    hybrid: concat and crossattn; hybrid-adm, crossattn-adm: with a vector as well; None: no condition.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key {conditioning_key!r} is not one of {CONDITIONING_KEYS}")
        self.config = diff_model_config
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def conditioning(
        self,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Conditioning:
        """The published lists of condition tensors as one `Conditioning`."""
        key = self.conditioning_key
        if key == "adm":
            return Conditioning(y=c_crossattn[0] if c_crossattn else c_adm)
        return Conditioning(
            context=torch.cat(list(c_crossattn), dim=1) if c_crossattn else None,  # along the tokens
            concat=torch.cat(list(c_concat), dim=1) if c_concat else None,  # along the channels
            y=c_adm,
        )

    def check(self, cond: Conditioning) -> None:
        key = self.conditioning_key or ""
        wanted = {
            "context": "crossattn" in key or key.startswith("hybrid"),
            "concat": key == "concat" or key.startswith("hybrid"),
            "y": "adm" in key,
        }
        for part, needed in wanted.items():
            if (getattr(cond, part) is not None) != needed:
                raise ValueError(
                    f"conditioning: conditioning_key {self.conditioning_key!r} "
                    f"{'needs' if needed else 'takes no'} {part}"
                )

    def project(self, cond: Conditioning) -> Conditioning:
        """The condition with the network's keys and values in the place of its context, for all steps of a run."""
        self.check(cond)
        return cond if cond.context is None else replace(cond, context=self.diffusion_model.project(cond.context))

    def embed_time(self, t: Tensor) -> Tensor:
        return self.diffusion_model.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return self.diffusion_model.encode(self._input(x, cond), t, cond.context, cond.y, tome)

    def encode_outer(
        self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> tuple[Tensor, ...]:
        return self.diffusion_model.encode_outer(self._input(x, cond), t, cond.context, cond.y, blocks, tome)

    def refresh(
        self, features: Features, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> Features:
        return features.with_outer(self.encode_outer(x, t, cond, blocks, tome))

    def part_weights(self) -> tuple[PartWeights, ...]:
        return self.diffusion_model.part_weights()

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        return self.diffusion_model.share(features, weights)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.diffusion_model.advance(features, t, cond.context, cond.y, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self.diffusion_model.decode(features, t, cond.context, cond.y, tome)

    def _input(self, x: Tensor, cond: Conditioning) -> Tensor:
        self.check(cond)
        return x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,) -> raw prediction (B, C, H, W); condition as lists of tensors."""
        cond = self.conditioning(c_concat, c_crossattn, c_adm)
        return self.decode(self.encode(x, t, cond), t, cond)


# On the latents of a first stage


class LatentDiffusion(DDPM, PublishedMethods):
    """A diffusion on the latents of a first stage, under a condition from a conditioning stage.

    Args:
        first_stage_config: the autoencoder; always frozen.
        cond_stage_config: the conditioner; "__is_first_stage__" encodes the condition with the first stage,
            "__is_unconditional__" means there is none.
        cond_stage_key: name of the condition in a batch.
        cond_stage_trainable: the conditioner is trained together with the network.
        concat_mode: meaning of conditioning_key None with a conditioner: "concat", else "crossattn".
        scale_factor: latents are the first stage's times this.
        scale_by_std: the scale factor is a buffer, measured by the training on its first batch.
        normalize_latents: latents have mean 0 and standard deviation 1 in every channel, by the buffers latent_mean and
            latent_std, which the training measures; instead of a scale factor.
        num_timesteps_cond: 1; shortened conditioning schedules are not supported.
        rest: see `DDPM`.
    """

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        unet_config: Mapping[str, Any],
        num_timesteps_cond: int = 1,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        normalize_latents: bool = False,
        **rest: Any,
    ) -> None:
        if num_timesteps_cond != 1:
            raise ValueError(f"num_timesteps_cond must be 1; got {num_timesteps_cond}")
        if conditioning_key is None and cond_stage_config != "__is_unconditional__":
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(unet_config, conditioning_key=conditioning_key, **rest)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        if normalize_latents and (scale_by_std or scale_factor != 1.0):
            raise ValueError("normalize_latents: takes the place of scale_by_std and scale_factor; give one of them")
        self.scale_by_std, self.normalize_latents = scale_by_std, normalize_latents
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        if normalize_latents:
            channels = self.channels  # (C, 1, 1) each
            self.register_buffer("latent_mean", torch.zeros(channels, 1, 1))
            self.register_buffer("latent_std", torch.ones(channels, 1, 1))
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        if cond_stage_config == "__is_unconditional__":
            conditioner = None
        elif cond_stage_config == "__is_first_stage__":
            conditioner = self.first_stage_model
        else:
            conditioner = instantiate_from_config(cond_stage_config)
            if not cond_stage_trainable:
                conditioner.eval().requires_grad_(False)
        self._add_conditioner(conditioner)

    def _add_conditioner(self, conditioner: nn.Module | None) -> None:
        """Under the name that it has in published files."""
        self.cond_stage_model = conditioner

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def get_learned_conditioning(self, c: Any) -> Any:
        """The conditioner's output for a raw condition (prompts, labels, images, …).

        Raises:
            ValueError: the model has no conditioner.
        """
        if self.cond_stage_model is None:
            raise ValueError("c: this model is unconditional, it takes no condition")
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        c = encode(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what the first stage encodes them to, not yet scaled."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoded: DiagonalGaussianDistribution | Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Latents (B, C, h, w): a sample of the posterior (with `noise` if given) or the code, scaled or normalized."""
        z = encoded.sample(noise) if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        if self.normalize_latents:
            return (z - self.latent_mean) / self.latent_std
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False, tile: int | None = None) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, f*h, f*w), about [-1, 1], not clamped.

        tile: height and width of tiles in pixels, see `decode_tiled`; None = the whole image at once.
        """
        return self._decoded(z, force_not_quantize, tile)

    def _decoded(self, z: Tensor, force_not_quantize: bool, tile: int | None = None) -> Tensor:
        quantized = {"force_not_quantize": True} if force_not_quantize else {}  # which a KL first stage does not take
        z = z * self.latent_std + self.latent_mean if self.normalize_latents else z / self.scale_factor
        return self.first_stage_model.decode(z, tile=tile, **quantized)


class Layout2ImgDiffusion(LatentDiffusion):
    """`LatentDiffusion` under the name that configs of models of bounding boxes may give.

    Raises:
        ValueError: the condition in a batch is not boxes.
    """

    def __init__(self, cond_stage_key: str = "coordinates_bbox", **rest: Any):
        if cond_stage_key != "coordinates_bbox":
            raise ValueError(f"cond_stage_key must be coordinates_bbox; got {cond_stage_key!r}")
        super().__init__(cond_stage_key=cond_stage_key, **rest)


class MinimalRETRODiffusion(LatentDiffusion):
    """A diffusion conditioned on the embeddings of its image's nearest neighbours, and on nothing else.

    In a batch they are (B, k, D), or (B, patches, k, D), nearest first; the network attends to all of them.

    Args:
        nn_key: their name in a batch.
        k_nn: neighbours of each image; the data says how many there are.
        p_uncond: share of the images that see none; only 0, as published.
        query_key, nn_memory, retrieval_cfg, retrieval_encoder_cfg, ignore_keys: accepted for published configs, which
            say with them how neighbours are found.
        cond_stage_key, cond_stage_config, cond_stage_trainable, conditioning_key: accepted, and replaced by the
            neighbours.
        rest: see `LatentDiffusion`.

    Raises:
        ValueError: p_uncond is not 0.
    """

    def __init__(
        self,
        nn_key: str = "nn_embeddings",
        k_nn: int = 4,
        p_uncond: float = 0.0,
        query_key: str | None = None,
        nn_memory: str | None = None,
        retrieval_cfg: Any = None,
        retrieval_encoder_cfg: Any = None,
        ignore_keys: Any = None,
        cond_stage_key: str | None = None,
        cond_stage_config: Any = None,
        cond_stage_trainable: bool = False,
        conditioning_key: str | None = None,
        **rest: Any,
    ):
        if p_uncond != 0.0:
            raise ValueError(f"p_uncond: only 0 is supported; got {p_uncond}")
        as_tokens = {"target": "torch.nn.Flatten", "params": {"start_dim": 1, "end_dim": -2}}
        super().__init__(cond_stage_config=as_tokens, cond_stage_key=nn_key, conditioning_key="crossattn", **rest)
