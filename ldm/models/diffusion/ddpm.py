"""Denoising diffusion on pixels (DDPM) and on latents (LatentDiffusion), as plain networks.

Sources: DDPM (arXiv 2006.11239), latent diffusion (arXiv 2112.10752), v-prediction (arXiv 2202.00512).
Buffers and sub-modules carry the names of the published checkpoints. Sampling is in `ldm.models.diffusion.
ddim` and its neighbours, training in `ldm.training`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.denoiser import Conditional, Conditioning, Denoiser, Guidance, Guided
from ldm.modules.diffusionmodules.features import Features
from ldm.modules.diffusionmodules.process import ForwardProcess, at
from ldm.modules.diffusionmodules.util import make_beta_schedule
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

PARAMETERIZATIONS = ("eps", "x0", "v")
CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
ConditionLike = Conditioning | Tensor | Sequence[Tensor] | Mapping[str, Any] | None


class DiffusionWrapper(nn.Module):
    """The denoising network, fed with its condition in the way that `conditioning_key` names.

    concat: channels beside x; crossattn: context tokens; adm: a vector or label beside the timestep;
    hybrid: concat and crossattn; hybrid-adm, crossattn-adm: with a vector as well; None: no condition.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key {conditioning_key!r} is not one of {CONDITIONING_KEYS}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def conditioning(self, c_concat: Sequence[Tensor] | None = None, c_crossattn: Sequence[Tensor] | None = None,
                     c_adm: Tensor | None = None) -> Conditioning:
        """The published lists of condition tensors as one `Conditioning`."""
        key = self.conditioning_key
        if key == "adm":
            return Conditioning(y=c_crossattn[0] if c_crossattn else c_adm)
        return Conditioning(
            context=torch.cat(list(c_crossattn), dim=1) if c_crossattn else None,   # along the tokens
            concat=torch.cat(list(c_concat), dim=1) if c_concat else None,          # along the channels
            y=c_adm)

    def check(self, cond: Conditioning) -> None:
        key = self.conditioning_key or ""
        wanted = {"context": "crossattn" in key or key.startswith("hybrid"),
                  "concat": key == "concat" or key.startswith("hybrid"),
                  "y": "adm" in key}
        for part, needed in wanted.items():
            if (getattr(cond, part) is not None) != needed:
                raise ValueError(f"conditioning: conditioning_key {self.conditioning_key!r} "
                                 f"{'needs' if needed else 'takes no'} {part}")

    def embed_time(self, t: Tensor) -> Tensor:
        return self.diffusion_model.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return self.diffusion_model.encode(self._input(x, cond), t, cond.context, cond.y, tome)

    def encode_outer(self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int,
                     tome: float = 0.0) -> tuple[Tensor, ...]:
        return self.diffusion_model.encode_outer(self._input(x, cond), t, cond.context, cond.y, blocks, tome)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.diffusion_model.advance(features, t, cond.context, cond.y, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self.diffusion_model.decode(features, t, cond.context, cond.y, tome)

    def _input(self, x: Tensor, cond: Conditioning) -> Tensor:
        self.check(cond)
        return x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

    def forward(self, x: Tensor, t: Tensor, c_concat: Sequence[Tensor] | None = None,
                c_crossattn: Sequence[Tensor] | None = None, c_adm: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) -> raw prediction (B, C, H, W); condition as lists of tensors."""
        cond = self.conditioning(c_concat, c_crossattn, c_adm)
        return self.decode(self.encode(x, t, cond), t, cond)


class DDPM(ForwardProcess):
    """A diffusion process with its network.

    Args:
        unet_config: the network, `target` and `params`.
        timesteps, beta_schedule, linear_start, linear_end, cosine_s, given_betas: the noise schedule, see
            `make_beta_schedule`; given_betas replaces the rest.
        v_posterior: 0..1, weight of beta against the exact posterior variance.
        parameterization: what the network predicts: "eps", "x0" or "v".
        conditioning_key: see `DiffusionWrapper`.
        use_ema: keep a moving average of the network's weights.
        first_stage_key, image_size, channels: name and size of what is diffused.
        loss_type, original_elbo_weight, l_simple_weight, learn_logvar, logvar_init: training loss, see
            `p_losses`.
        scheduler_config, ckpt_path: learning-rate schedule and starting weights of a training.
        monitor, log_every_t: logging of the trainer.
    """

    def __init__(self, unet_config: Mapping[str, Any], timesteps: int = 1000, beta_schedule: str = "linear",
                 loss_type: str = "l2", monitor: str | None = None, use_ema: bool = True,
                 first_stage_key: str = "image", image_size: int = 256, channels: int = 3,
                 log_every_t: int = 100, linear_start: float = 1e-4, linear_end: float = 2e-2,
                 cosine_s: float = 8e-3, given_betas: Sequence[float] | None = None,
                 original_elbo_weight: float = 0.0, v_posterior: float = 0.0, l_simple_weight: float = 1.0,
                 conditioning_key: str | None = None, parameterization: str = "eps",
                 scheduler_config: Mapping[str, Any] | None = None, learn_logvar: bool = False,
                 logvar_init: float = 0.0, ckpt_path: str | None = None):
        betas = np.asarray(given_betas if given_betas is not None else make_beta_schedule(
            beta_schedule, timesteps, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s), np.float64)
        super().__init__(betas)
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization {parameterization!r} is not one of {PARAMETERIZATIONS}")
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type {loss_type!r} is not one of ('l1', 'l2')")
        self.parameterization, self.loss_type = parameterization, loss_type
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
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
            with np.errstate(divide="ignore"):      # the first variance is 0; its weight is replaced below
                weights = f_betas ** 2 / (2 * f_variance * f_alphas * (1 - f_abar))
        weights[0] = weights[1]
        for name, values in {
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),     # the first is 0
            "posterior_mean_coef1": betas * np.sqrt(abar_prev) / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - abar_prev) * np.sqrt(alphas) / (1.0 - abar),
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.register_buffer("lvlb_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    # The process

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
                - at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * noise)

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

    def p_losses(self, x_start: Tensor, cond: ConditionLike, t: Tensor,
                 noise: Tensor | None = None) -> dict[str, Tensor]:
        """The published training loss at timesteps t.

        loss = l_simple_weight * mean(L / exp(s_t) + s_t) + original_elbo_weight * mean(w_t L)

        with L the loss per image, s the log-variance `logvar` and w the weights of the variational bound.

        Returns:
            scalars "loss", "loss_simple", "loss_vlb" and, where logvar is learned, "loss_gamma", "logvar".
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        prediction = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        simple = self.loss_per_image(prediction, self.prediction_target(x_start, noise, t))
        logvar = self.logvar[t]
        gamma = simple / logvar.exp() + logvar
        vlb = (self.lvlb_weights[t] * simple).mean()
        losses = {"loss": self.l_simple_weight * gamma.mean() + self.original_elbo_weight * vlb,
                  "loss_simple": simple.mean(), "loss_vlb": vlb}
        if self.learn_logvar:
            losses |= {"loss_gamma": gamma.mean(), "logvar": self.logvar.mean()}
        return losses

    # The network

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

    def apply_model(self, x: Tensor, t: Tensor, cond: ConditionLike = None) -> Tensor:
        """Raw prediction for x, (B, C, H, W), at timesteps t, (B,)."""
        cond = self.conditioning(cond)
        return self.model.decode(self.model.encode(x, t, cond), t, cond)

    def denoiser(self, cond: ConditionLike = None, uncond: ConditionLike = None,
                 guidance: Guidance | float = 1.0, tome: float = 0.0) -> Denoiser:
        """The network under a condition, with classifier-free guidance (arXiv 2207.12598) unless its scale is 1.

        Args:
            cond, uncond: conditions of the same number of images, in any published form.
            guidance: eps = eps_uncond + scale * (eps_cond - eps_uncond); a `Guidance`, or its scale alone.
            tome: share of tokens that the network merges for self-attention; see `UNetModel.encode`.

        Raises:
            ValueError: guidance is asked for without uncond.
        """
        guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        cond = self.conditioning(cond)
        conditional = Conditional(self.model, cond, self.parameterization, tome)
        if guidance.scale == 1.0:
            return conditional
        if uncond is None:
            raise ValueError(f"uncond: guidance scale {guidance.scale} needs an unconditional conditioning; got None")
        both = Conditioning.cat(self.conditioning(uncond), cond)
        return Guided(Conditional(self.model, both, self.parameterization, tome), guidance, conditional)

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """The network holds its averaged weights inside the block (if there are any)."""
        if self.model_ema is None:
            yield
        else:
            with self.model_ema.applied_to(self.model):
                yield


class LatentDiffusion(DDPM):
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
        num_timesteps_cond: 1; shortened conditioning schedules are not supported.
        The rest: see `DDPM`.
    """

    def __init__(self, first_stage_config: Mapping[str, Any], cond_stage_config: Mapping[str, Any] | str,
                 unet_config: Mapping[str, Any], num_timesteps_cond: int = 1, cond_stage_key: str = "image",
                 cond_stage_trainable: bool = False, concat_mode: bool = True,
                 conditioning_key: str | None = None, scale_factor: float = 1.0, scale_by_std: bool = False,
                 timesteps: int = 1000, beta_schedule: str = "linear", loss_type: str = "l2",
                 monitor: str | None = None, use_ema: bool = True, first_stage_key: str = "image",
                 image_size: int = 256, channels: int = 3, log_every_t: int = 100, linear_start: float = 1e-4,
                 linear_end: float = 2e-2, cosine_s: float = 8e-3, given_betas: Sequence[float] | None = None,
                 original_elbo_weight: float = 0.0, v_posterior: float = 0.0, l_simple_weight: float = 1.0,
                 parameterization: str = "eps", scheduler_config: Mapping[str, Any] | None = None,
                 learn_logvar: bool = False, logvar_init: float = 0.0, ckpt_path: str | None = None):
        if num_timesteps_cond != 1:
            raise ValueError(f"num_timesteps_cond must be 1; got {num_timesteps_cond}")
        if conditioning_key is None and cond_stage_config != "__is_unconditional__":
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(
            unet_config, timesteps=timesteps, beta_schedule=beta_schedule, loss_type=loss_type, monitor=monitor,
            use_ema=use_ema, first_stage_key=first_stage_key, image_size=image_size, channels=channels,
            log_every_t=log_every_t, linear_start=linear_start, linear_end=linear_end, cosine_s=cosine_s,
            given_betas=given_betas, original_elbo_weight=original_elbo_weight, v_posterior=v_posterior,
            l_simple_weight=l_simple_weight, conditioning_key=conditioning_key,
            parameterization=parameterization, scheduler_config=scheduler_config, learn_logvar=learn_logvar,
            logvar_init=logvar_init, ckpt_path=ckpt_path)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        if cond_stage_config == "__is_unconditional__":
            self.cond_stage_model = None
        elif cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
            if not cond_stage_trainable:
                self.cond_stage_model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def get_learned_conditioning(self, c: Any) -> Any:
        """The conditioner's output for a raw condition (prompts, labels, pictures, …).

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
        """Pictures (B, 3, H, W) in [-1, 1] -> what the first stage encodes them to, not yet scaled."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoded: DiagonalGaussianDistribution | Tensor,
                                 noise: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w): a sample of the posterior (with `noise` if given), or the code, scaled."""
        z = encoded.sample(noise) if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return self.scale_factor * z

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, f*h, f*w), about [-1, 1], not clamped."""
        z = z / self.scale_factor
        return self.first_stage_model.decode(z, force_not_quantize=True) if force_not_quantize \
            else self.first_stage_model.decode(z)


# The models of Stable Diffusion 2 that see more than a text

class LatentInpaintDiffusion(LatentDiffusion):
    """Paints the masked part of a picture; the network sees the mask and what is around it.

    Args:
        finetune_keys: null; widening the first layer of another model's weights is not supported.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, finetune_keys: Sequence[str] | None = None, **rest: Any):
        if finetune_keys is not None:
            raise ValueError(f"finetune_keys must be null; got {finetune_keys}")
        super().__init__(**rest)

    @torch.no_grad()
    def condition(self, context: Tensor, image: Tensor, mask: Tensor, noise: Tensor | None = None) -> Conditioning:
        """The condition of B pictures.

        Args:
            context: of their text, (B, L, D).
            image: (B, 3, H, W) in [-1, 1].
            mask: (B, 1, H, W), above 0.5 where the picture is to be painted; what is there is not seen.
            noise: unit normal like the latents, for the first stage's posterior; None = PyTorch's generator.

        Raises:
            ValueError: image and mask differ in size.
        """
        if mask.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(f"mask must have the shape {(len(image), 1, *image.shape[2:])}; got {tuple(mask.shape)}")
        painted = (mask > 0.5).to(image)
        seen = self.get_first_stage_encoding(self.encode_first_stage(image * (1 - painted)), noise)
        return Conditioning(context, torch.cat([F.interpolate(painted, size=seen.shape[-2:]), seen], dim=1))


class LatentDepth2ImageDiffusion(LatentDiffusion):
    """Pictures of a given depth.

    Args:
        depth_stage_config: estimates the depth of a picture.
        finetune_keys: null; widening the first layer of another model's weights is not supported.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, depth_stage_config: Mapping[str, Any], finetune_keys: Sequence[str] | None = None, **rest: Any):
        if finetune_keys is not None:
            raise ValueError(f"finetune_keys must be null; got {finetune_keys}")
        super().__init__(**rest)
        self.depth_model = instantiate_from_config(depth_stage_config)

    def condition(self, context: Tensor, image: Tensor, size: tuple[int, int]) -> Conditioning:
        """The condition of B pictures.

        Args:
            context: of their text, (B, L, D).
            image: whose depth is taken, (B, 3, H, W) in [-1, 1].
            size: height and width of the latents.
        """
        depth = F.interpolate(self.depth_model(image), size=size, mode="bicubic")          # (B, 1, h, w)
        low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
        # Each picture's own range to [-1, 1]; the published 0.001 keeps a flat one finite.
        return Conditioning(context, 2 * (depth - low) / (high - low + 0.001) - 1)


class LatentUpscaleDiffusion(LatentDiffusion):
    """Enlarges a picture; the network sees it, with some noise, beside the latents.

    Args:
        low_scale_config: an `ImageConcatWithNoiseAugmentation`.
        low_scale_key: name of the low-resolution picture in a batch.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, low_scale_config: Mapping[str, Any], low_scale_key: str = "LR", **rest: Any):
        super().__init__(**rest)
        self.low_scale_key = low_scale_key
        self.low_scale_model = instantiate_from_config(low_scale_config).eval().requires_grad_(False)

    def condition(self, context: Tensor, low: Tensor, noise_level: Tensor, noise: Tensor | None = None) -> Conditioning:
        """The condition of B pictures.

        Args:
            context: of their text, (B, L, D).
            low: low resolution, (B, 3, h, w) in [-1, 1], as high and wide as the latents.
            noise_level: (B,) integers below the low-scale model's max_noise_level; 0 = almost none.
            noise: unit normal like low; None = PyTorch's generator.
        """
        noised, level = self.low_scale_model(low, noise_level, noise)
        return Conditioning(context, noised, level)


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Varies a picture; the network is told its CLIP embedding, with some noise, beside the text.

    Args:
        embedder_config: the image encoder.
        noise_aug_config: a `CLIPEmbeddingNoiseAugmentation`; None = the embedding as it is.
        embedding_key: name of the picture in a batch.
        embedding_dropout: share of the embeddings that are zero in training, for guidance.
        freeze_embedder: take no gradients of the encoder.
        rest: see `LatentDiffusion`.
    """

    def __init__(self, embedder_config: Mapping[str, Any], noise_aug_config: Mapping[str, Any] | None = None,
                 embedding_key: str = "jpg", embedding_dropout: float = 0.5, freeze_embedder: bool = True, **rest: Any):
        super().__init__(**rest)
        self.embedding_key, self.embedding_dropout = embedding_key, embedding_dropout
        self.embedder = instantiate_from_config(embedder_config)
        if freeze_embedder:
            self.embedder.eval().requires_grad_(False)
        self.noise_augmentor = None if noise_aug_config is None else instantiate_from_config(noise_aug_config)

    def condition(self, context: Tensor, image: Tensor, noise_level: Tensor | None = None,
                  noise: Tensor | None = None) -> Conditioning:
        """The condition of B pictures.

        Args:
            context: of their text, (B, L, D).
            image: (B, 3, H, W) in [-1, 1], of any size.
            noise_level: (B,) integers; 0 = almost no noise; None = random, as in training.
            noise: unit normal like the embeddings; None = PyTorch's generator.
        """
        y = self.embedder(image)                                                    # (B, D)
        if self.noise_augmentor is not None:
            y = torch.cat(self.noise_augmentor(y, noise_level, noise), dim=1)       # (B, 2 D)
        if self.training:
            y = y * (torch.rand(len(y), 1, device=y.device) >= self.embedding_dropout)
        return Conditioning(context, y=y)
