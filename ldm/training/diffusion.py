"""Training of a latent diffusion model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import IterableDataset, default_collate

from ldm.checkpoint import load_part, load_weights
from ldm.io.files import AboveZero, Count, Share
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import ConditionedNetwork
from ldm.models.diffusion.loop import denoise
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import ImageNoise
from ldm.models.diffusion.solvers.registry import solver
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.training.datasets import entry_of
from ldm.training.latents import ENCODED
from ldm.training.optim import ClippedTraining, adamw, scheduled

SAMPLE, PART = 1024, 16  # images for the normalization, and how many are encoded at a time
PLAIN_ATTENTION = 32 * 32  # most latent pixels: beyond, its weights would fill the memory


def attention_to_train(device: torch.device, side: int) -> AbstractContextManager[None]:
    """The kind of attention whose forward and backward pass together are fastest, for latents of side x side.

    On a CPU the backward pass of PyTorch's fused attention is slow: without it a step of emoji128 is a quarter faster.
    """
    plain = device.type == "cpu" and side**2 <= PLAIN_ATTENTION
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


class DiffusionTraining(ClippedTraining):
    """Trains `model`, and its conditioner if it is trainable, on batches of latents or images with their conditioning.

    A batch holds the raw conditioning (captions, classes, images, ...) under the model's cond_stage_key, and images
    under its first_stage_key, or what they were encoded to, or "latent" (B, C, h, w), encoded and scaled. If the model
    was built with scale_by_std and without starting weights, the first batch sets its scale factor to 1 / std of the
    latents; with normalize_latents, at most SAMPLE images of the training set give mean and std of each channel.

    Args:
        learning_rate, scheduler_config: see `ldm.training.optim.adamw`; the model's own scheduler_config is
            used where none is given.
        published_optimizer: AdamW with the defaults of PyTorch and weight decay on all weights, as published.
        condition_dropout: share of the conditioning replaced by `unconditional`, for classifier-free guidance.
        unconditional: stands for no conditioning: the empty prompt, the number of a class that no image has, or 0 for
            embeddings of zeros.
        ucg_training: {entry of a batch: {p: share, val: what it is replaced by; null = ""}}, Stability's way to say the
            same of any entry.
        min_snr_gamma: weight timesteps by min(SNR, gamma), arXiv 2303.09556; None = the published loss.
        loss_of: the quantity ("eps", "x0" or "v") whose squared error is the loss; None = what the network predicts.
            With "v" an error of eps counts (SNR + 1) / SNR times as much, so the noisiest timesteps, which decide what
            the image shows, are learned sooner.
        ema_decay: decay of the moving averages of network and conditioner.
        guidance_scale, sample_steps: for the sample grids.
        parts: weights to begin with, {part of the model: file of the part, or of a whole model}; see `load_part`.
        compile: the losses, network included, are compiled by torch.compile, which takes minutes at the first step.
    """

    strategy = "ddp_find_unused_parameters_true"  # BERTEmbedder has layers that conditioning leaves out

    def __init__(
        self,
        model: LatentDiffusion,
        learning_rate: AboveZero,
        scheduler_config: Mapping[str, Any] | None = None,
        published_optimizer: bool = False,
        condition_dropout: Share = 0.1,
        unconditional: str | int = "",
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        min_snr_gamma: AboveZero | None = None,
        loss_of: Literal["eps", "x0", "v"] | None = None,
        ema_decay: float = 0.9999,
        guidance_scale: float = 4.0,
        sample_steps: Count = 25,
        parts: Mapping[str, str] | None = None,
        compile: bool = False,
    ):
        super().__init__()
        if min_snr_gamma is not None and loss_of is not None:
            raise ValueError("min_snr_gamma and loss_of both weight the timesteps; give one of them")
        self.min_snr_gamma, self.loss_of = min_snr_gamma, loss_of
        if path := model.first_stage_model.ckpt_path:
            load_weights(model.first_stage_model, path)
        if model.ckpt_path:
            load_weights(model, model.ckpt_path)
        for part, path in (parts or {}).items():
            load_part(model, part, path)
        self.model = model
        model.model.to(memory_format=torch.channels_last)  # 10 % faster on CPUs
        self.network_ema = LitEma(model.model, ema_decay)
        self.conditioner_ema = LitEma(model.cond_stage_model, ema_decay) if model.cond_stage_trainable else None
        self.learning_rate = learning_rate
        self.scheduler_config = scheduler_config or model.scheduler_config
        self.published_optimizer = published_optimizer
        self.condition_dropout, self.unconditional = condition_dropout, unconditional
        self.ucg_training = ucg_training or {}
        self.guidance_scale, self.sample_steps = guidance_scale, sample_steps
        self.terms = torch.compile(self.loss_terms) if compile else self.loss_terms

    @property
    def weighted(self) -> bool:
        """Whether the loss is another than the squared error of what the network predicts."""
        return self.min_snr_gamma is not None or self.loss_of is not None

    @property
    def trained(self) -> nn.Module:
        """The network whose weights are learned and averaged."""
        return self.model.model

    def predicting(self, batch: dict[str, Any]) -> ConditionedNetwork:
        """What predicts for a batch."""
        return self.model.model

    def latents(self, batch: dict[str, Any]) -> Tensor:
        if "latent" in batch:
            return batch["latent"]
        return self.model.get_first_stage_encoding(self.encoded(batch))

    def encoded(self, batch: Mapping[str, Any]) -> DiagonalGaussianDistribution | Tensor:
        """What the first stage encodes the batch's images to; it may have done so before."""
        if ENCODED not in batch:
            return self.model.encode_first_stage(entry_of(batch, self.model.first_stage_key))
        gaussian = isinstance(self.model.first_stage_model, AutoencoderKL)
        return DiagonalGaussianDistribution(batch[ENCODED]) if gaussian else batch[ENCODED]

    def timestep_weights(self, t: Tensor) -> Tensor:
        """Weight of each image's loss, (B,): that of `loss_of`, or min(SNR, gamma) for the squared error of x_0."""
        snr = self.model.alphas_cumprod[t] / (1.0 - self.model.alphas_cumprod[t])
        of_x0 = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1.0}  # squared error, where that of x_0 is 1
        wanted = snr.clamp(max=self.min_snr_gamma) if self.loss_of is None else of_x0[self.loss_of]
        return wanted / of_x0[self.model.parameterization]

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx > 0 or self.model.ckpt_path:
            return
        first_stage = self.model.first_stage_model
        if "latent" not in batch and not first_stage.ckpt_path and any(True for _ in first_stage.parameters()):
            print(
                "model.params.first_stage_config.params.ckpt_path and model.params.ckpt_path are not given: the "
                "latents are those of a first stage that was never trained"
            )
        if self.model.normalize_latents:
            self.normalize()
        if self.model.scale_by_std:
            z = self.latents(batch)
            self.model.scale_factor.copy_(self.model.scale_factor / z.std())
            print(f"scale_by_std: the scale factor is {self.model.scale_factor.item():.5g}")

    @torch.no_grad()
    def normalize(self) -> None:
        """Set mean and standard deviation of each channel of the latents, by images from all over the training set.

        Raises:
            ValueError: the data gives latents that are scaled already, or no dataset with a length.
        """
        train = self.trainer.datamodule.train
        if isinstance(train, IterableDataset):
            raise ValueError("model.params.normalize_latents: needs a training set with a length, not a stream")
        spread = torch.linspace(0, len(train) - 1, min(len(train), SAMPLE)).long().tolist()
        found = []
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            for i in range(0, len(spread), PART):
                batch = default_collate([train[place] for place in spread[i : i + PART]])
                if "latent" in batch:
                    raise ValueError("model.params.normalize_latents: the data gives latents that are scaled already")
                found.append(self.latents(self.transfer_batch_to_device(batch, self.device, 0)))
        z = torch.cat(found)  # of mean 0 and deviation 1 as yet, that is: not changed
        self.model.latent_mean.copy_(z.mean((0, 2, 3))[:, None, None])
        self.model.latent_std.copy_(z.std((0, 2, 3))[:, None, None])
        print(f"normalize_latents: mean and deviation of each channel, of {len(spread)} training images")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        z = self.latents(batch)
        batch = self.with_some_dropped(batch)
        with attention_to_train(z.device, self.model.image_size):
            losses = self.losses(z, batch, *self.timesteps_and_noise(z))
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, batch_size=len(z))
        return losses["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Activation checkpoints compute the forward pass again, which must be the same.
        with attention_to_train(loss.device, self.model.image_size):
            super().backward(loss, *args, **kwargs)

    def timesteps_and_noise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.randint(0, self.model.num_timesteps, (len(z),), device=z.device)
        return t, torch.randn_like(z)

    def with_some_dropped(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with some of its conditioning replaced by what stands for none."""
        if self.model.cond_stage_model is not None:
            raw, key = batch[next(iter(batch))], self.model.cond_stage_key
            dropped = torch.rand(len(raw)) < self.condition_dropout
            batch = batch | {key: replaced(entry_of(batch, key), dropped, self.unconditional)}
        if self.ucg_training:
            batch = dropped_as_published(batch, self.ucg_training, int(torch.randint(2**31, ())))
        return batch

    def conditioning(self, batch: dict[str, Any]) -> Any:
        """What the network is conditioned on; None for an unconditional model."""
        model = self.model
        if model.cond_stage_model is None:
            return None
        cond = model.get_learned_conditioning(entry_of(batch, model.cond_stage_key))
        if model.cond_stage_model is model.first_stage_model and "mask" in batch:  # inpainting
            mask = F.interpolate(batch["mask"], size=cond.shape[-2:])
            return torch.cat([cond, 2 * mask - 1], dim=1)
        return cond

    def losses(self, z: Tensor, batch: dict[str, Any], t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return self.terms(z, self.conditioning(batch), t, noise, self.predicting(batch))

    def loss_terms(
        self, z: Tensor, cond: Any, t: Tensor, noise: Tensor, network: ConditionedNetwork
    ) -> dict[str, Tensor]:
        """The losses of latents z (B, C, h, w) under the output of the conditioner, by name."""
        weights = self.timestep_weights(t) if self.weighted else None
        return self.model.p_losses(z, cond, t, noise, network, weights)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Here, so that no state is saved between the step and its averages, as could happen in on_train_batch_end.
        super().optimizer_step(*args, **kwargs)
        self.network_ema(self.trained)
        if self.conditioner_ema is not None:
            self.conditioner_ema(self.model.cond_stage_model)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Held-out loss of the EMA weights, always at the same timesteps and with the same noise."""
        z = self.latents(batch)
        generator = torch.Generator().manual_seed(batch_idx)
        t = torch.linspace(0, self.model.num_timesteps - 1, len(z)).long().to(z.device)
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        with self.ema_weights():
            losses = self.losses(z, batch, t, noise)
        logged = {f"val/{k}": v for k, v in losses.items()}
        self.log_dict(logged, batch_size=len(z), prog_bar=True, sync_dist=True)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The model has its EMA weights inside the block."""
        with ExitStack() as stack:
            stack.enter_context(self.network_ema.applied_to(self.trained))
            if self.conditioner_ema is not None:
                stack.enter_context(self.conditioner_ema.applied_to(self.model.cond_stage_model))
            yield

    def configure_optimizers(self) -> dict[str, Any]:
        trained = list(self.trained.parameters())
        if self.model.cond_stage_trainable:
            trained += list(self.model.cond_stage_model.parameters())
        if self.model.learn_logvar:
            trained.append(self.model.logvar)
        if self.published_optimizer:
            return scheduled(torch.optim.AdamW(trained, self.learning_rate), self.scheduler_config)
        return adamw(trained, self.learning_rate, self.scheduler_config)

    @torch.no_grad()
    def images(self, batch: dict[str, Any]) -> Tensor:
        """Samples for the conditioning of the batch, always from the same noise, (B, 3, H, W) in [-1, 1]."""
        return self.samples(batch, start_noise(0, *self.latents(batch).shape))

    @torch.no_grad()
    def samples(self, batch: Mapping[str, Any], noise: Tensor) -> Tensor:
        """Samples of the averaged weights for the conditioning of the batch, (B, 3, H, W) in [-1, 1].

        They are guided if the training drops the conditioning.

        Args:
            noise: (B, C, h, w), from which sampling starts.
        """
        model, key = self.model, self.model.cond_stage_key
        count, start = len(noise), noise.to(self.device)
        rule = solver("ddim", model.alphas_cumprod, self.sample_steps)
        guided = model.cond_stage_model is not None and self.condition_dropout > 0
        with self.ema_weights():
            none = batch | {key: replaced(batch[key], torch.ones(count) > 0, self.unconditional)} if guided else None
            denoiser = model.denoiser(
                self.conditioning(batch),
                self.conditioning(none) if guided else None,
                self.guidance_scale if guided else 1.0,
                network=self.predicting(batch),
            )
            *_, last = denoise(denoiser, rule, load_plan("off", len(rule.nodes)), start)
        return model.decode_first_stage(last.x).clamp(-1, 1)


def start_noise(first: int, count: int, *shape: int) -> Tensor:
    """Noise that sampling starts from, (count, *shape): of sample `first` and those after it, always the same."""
    return ImageNoise([(i,) for i in range(first, first + count)]).start(shape)


def replaced(raw: Any, dropped: Tensor, by: Any) -> Any:
    """Raw conditioning, with `by` where an image's is dropped: texts, class numbers (B,), or embeddings (B, L, D).

    Raises:
        ValueError: it is neither, and is to be dropped.
    """
    if isinstance(raw, Tensor) and raw.ndim in (1, 3) and isinstance(by, int):
        return torch.where(dropped.to(raw.device).view(-1, *[1] * (raw.ndim - 1)), by, raw)
    if isinstance(raw, Sequence):
        return [by if drop else one for drop, one in zip(dropped, raw, strict=True)]
    if dropped.any():
        raise ValueError(
            f"condition_dropout: only texts, class numbers and embeddings can be replaced, by an unconditional that is "
            f"such a text or number, or 0 for embeddings of zeros; it is {by!r}"
        )
    return raw


def dropped_as_published(
    batch: Mapping[str, Any], ucg_training: Mapping[str, Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """A batch with entries replaced at random, by Stability's rule (`ucg_training`); one draw per entry and image."""
    random, after = np.random.RandomState(seed), dict(batch)
    for key, rule in ucg_training.items():
        share, value = rule["p"], "" if rule["val"] is None else rule["val"]
        hits = torch.tensor([bool(random.choice(2, p=[1 - share, share])) for _ in range(len(entry_of(batch, key)))])
        after[key] = replaced(batch[key], hits, value)
    return after
