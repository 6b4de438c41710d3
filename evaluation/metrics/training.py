"""Measures while a model is trained: callbacks that a configuration of main.py names under lightning.callbacks.

They log beside the validation's own numbers, as val/NAME, and `model.params.monitor` may name them. All images are
those of the validation or of fixed noise, rounded to 8 bits as saved ones are. A Fréchet distance depends on the
network and on the number of images, which are printed at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from evaluation.metrics.extractors import Extractor, load_extractor
from evaluation.metrics.frechet import Gaussian, distance, gaussian_of, load_reference, to_numpy
from evaluation.metrics.retrieval import choose_queries, load_real_images
from ldm.data.emoji import EmojiDataset
from ldm.io.files import Count
from ldm.io.images import from_pil, to_pil
from ldm.models.autoencoder import VQModel
from ldm.modules.losses.lpips import lpips
from ldm.modules.vectorquantize import perplexity
from ldm.training.autoencoder import FirstStageTraining, reconstructed
from ldm.training.diffusion import DiffusionTraining, start_noise

OFFLINE = "efficientnet-lite0"  # its weights come with a package


def features_of(images: Tensor, extractor: Extractor, device: torch.device) -> Tensor:
    """Features (B, D) of images (B, 3, H, W) in [-1, 1], which are rounded to 8 bits first."""
    return extractor.to(device)(torch.stack([from_pil(image) for image in to_pil(images)]).to(device))


def of_all_processes(module: pl.LightningModule, rows: Tensor, count: int | None = None) -> Tensor:
    """The rows (N, D) that the processes have, (processes x N, D), the first of each first; the first `count`."""
    gathered = module.all_gather(rows)
    return (rows if gathered.ndim == rows.ndim else gathered.transpose(0, 1).flatten(0, 1))[:count]


def frechet(features: Tensor, real: Gaussian) -> float:
    return distance(gaussian_of(to_numpy(features)), real)


def check_module(callback: pl.Callback, module: pl.LightningModule, kind: type, what: str) -> None:
    """Raise ValueError unless the module is of the kind that the callback measures."""
    if not isinstance(module, kind):
        raise ValueError(f"{type(callback).__name__} is for trainings of {what}; got {type(module).__name__}")


class FirstStageMeasures(pl.Callback):
    """Measures a first stage by its copies of the validation images: val/rfid, their Fréchet distance from them;
    val/lpips; and with a codebook val/codebook_used, the share of codes that occur, and val/codebook_perplexity.

    Args:
        extractor, weights: the network of the Fréchet distance, see `evaluation.metrics.extractors.load_extractor`.
        perceptual_weights: see `ldm.modules.losses.lpips.lpips`; without its weights LPIPS is left out, and a
            line says so.

    Raises ValueError: the network can't be had.
    """

    def __init__(self, extractor: str = OFFLINE, weights: str | None = None, perceptual_weights: str | None = None):
        self.extractor = load_extractor(extractor, weights, device="cpu")
        try:
            self.lpips, missing = lpips(perceptual_weights), ""
        except ValueError as error:
            self.lpips, missing = None, f"; val/lpips is not measured: {str(error).partition(', which')[0]}"
        self.said = f"val/rfid: {self.extractor.recipe}{missing}"

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        check_module(self, module, FirstStageTraining, "first stages")
        if trainer.is_global_zero:
            print(self.said)

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: FirstStageTraining) -> None:
        self.real, self.made, self.distances, self.codes = [], [], [], []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: FirstStageTraining, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = module.images_of(batch)
        reconstruction, latent = reconstructed(module.model, images, sample=False)
        reconstruction = reconstruction.clamp(-1, 1)
        self.real.append(features_of(images, self.extractor, module.device))
        self.made.append(features_of(reconstruction, self.extractor, module.device))
        if self.lpips is not None:
            self.distances.append(self.lpips.to(module.device)(images, reconstruction).flatten(1))
        if isinstance(module.model, VQModel):
            self.codes.append(latent.indices[:, None])

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: FirstStageTraining) -> None:
        if trainer.sanity_checking:
            return
        real, made = (of_all_processes(module, torch.cat(rows)) for rows in (self.real, self.made))
        module.log("val/rfid", frechet(made, gaussian_of(to_numpy(real))), sync_dist=True)
        if self.distances:
            module.log("val/lpips", torch.cat(self.distances).mean(), sync_dist=True)
        if self.codes:
            codes = of_all_processes(module, torch.cat(self.codes))
            there = module.model.quantize.embedding.num_embeddings
            module.log("val/codebook_used", len(codes.unique()) / there, sync_dist=True)
            module.log("val/codebook_perplexity", perplexity(codes.flatten(), there), sync_dist=True)


class SampleMeasures(pl.Callback):
    """val/fid, the Fréchet distance of samples of the averaged weights from real images, once in a number of steps.

    The samples are for the conditioning of the validation's first images, always from the same noise, made as those of
    the sample grids are (`training.params.sample_steps`, `guidance_scale`).

    Args:
        every: steps; it is measured at the first validation after each.
        count: of samples.
        batch_size: samples per batch; changes speed and memory only.
        reference: a folder, npz or npy file of images, or of their statistics; None = the validation's images.
        extractor, weights: the network, see `evaluation.metrics.extractors.load_extractor`.

    Raises ValueError: the network or the reference can't be had.
    """

    def __init__(
        self,
        every: Count,
        count: Count = 256,
        batch_size: Count = 16,
        reference: str | None = None,
        extractor: str = OFFLINE,
        weights: str | None = None,
    ):
        self.every, self.count, self.batch_size, self.measured = every, count, batch_size, 0
        self.extractor = load_extractor(extractor, weights, device="cpu")
        self.real = load_reference(reference, self.extractor).gaussian if reference else None

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured = state["measured"]

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        check_module(self, module, DiffusionTraining, "diffusion models")
        if trainer.is_global_zero:
            print(f"val/fid: {self.count} samples, every {self.every} steps; {self.extractor.recipe}")
            print("val/fid can be compared with values of the same number of samples only")

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: DiffusionTraining) -> None:
        fit = trainer.state.fn == "fit"
        if trainer.sanity_checking or (fit and trainer.global_step // self.every <= self.measured // self.every):
            return
        if self.real is None:
            self.real = gaussian_of(to_numpy(self.real_features(trainer, module)))
        samples = (module.samples(*given) for given in self.given(trainer, module))
        made = torch.cat([features_of(images, self.extractor, module.device) for images in samples])
        module.log_dict(self.values(of_all_processes(module, made, self.count)), sync_dist=True)
        self.measured = trainer.global_step

    def values(self, features: Tensor) -> dict[str, float]:
        """The measures of the samples' features (count, D), by name."""
        return {"val/fid": frechet(features, self.real)}

    def own(self, trainer: pl.Trainer) -> int:
        """How many samples each process makes."""
        return -(-self.count // trainer.world_size)

    def batches(self, trainer: pl.Trainer, module: DiffusionTraining) -> Iterator[dict[str, Any]]:
        """The first images of the validation, in batches. Raises ValueError: it has fewer."""
        left = self.own(trainer)
        for batch in trainer.val_dataloaders:
            some = {key: value[: min(left, self.batch_size)] for key, value in batch.items()}
            left -= len(next(iter(some.values())))
            yield module.transfer_batch_to_device(some, module.device, 0)
            if left == 0:
                return
        raise ValueError(f"{type(self).__name__}: count: {self.count} is more than the validation has images")

    def real_features(self, trainer: pl.Trainer, module: DiffusionTraining) -> Tensor:
        key = module.model.first_stage_key
        parts = []
        for batch in self.batches(trainer, module):
            if key not in batch:
                raise ValueError(f"{type(self).__name__}: the data has latents only: name a reference")
            parts.append(features_of(batch[key], self.extractor, module.device))
        return of_all_processes(module, torch.cat(parts), self.count)

    def given(self, trainer: pl.Trainer, module: DiffusionTraining) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The conditioning and the noise of this process's samples, in batches."""
        made = trainer.global_rank * self.own(trainer)
        for batch in self.batches(trainer, module):
            shape = tuple(module.latents(batch).shape)
            yield batch, start_noise(made, *shape)
            made += shape[0]


class CaptionMeasures(SampleMeasures):
    """Measures a model of captioned emoji (`scripts/prepare_emoji.py`): val/R@1 and val/R@5, the share of samples
    whose nearest real images show what the caption names, and val/fid, the Fréchet distance from those real images.

    Args:
        data: folder of the dataset.
        split: whose captions are drawn. tier: of the captions and the real images.
        seed: of the captions.
        rest: see `SampleMeasures`.

    Raises ValueError: there is no such dataset.
    """

    def __init__(self, data: str, split: str = "train", tier: int = 2, seed: int = 0, **rest: Any):
        super().__init__(**rest)
        self.images = load_real_images(data, tier=tier, extractor=self.extractor)
        self.queries = choose_queries(EmojiDataset(data, split, tier), self.count, seed)
        self.count = len(self.queries.captions)
        self.real = gaussian_of(to_numpy(self.images.features))

    def given(self, trainer: pl.Trainer, module: DiffusionTraining) -> Iterator[tuple[dict[str, Any], Tensor]]:
        model, captions = module.model, self.queries.captions
        # As many for each process: the last one's go on from the start, and are left out when they are gathered.
        mine = [(trainer.global_rank + i * trainer.world_size) % self.count for i in range(self.own(trainer))]
        for i in range(0, len(mine), self.batch_size):
            some = mine[i : i + self.batch_size]
            shape = model.channels, model.image_size, model.image_size
            noise = torch.cat([start_noise(place, 1, *shape) for place in some])
            yield {model.cond_stage_key: [captions[place] for place in some]}, noise

    def values(self, features: Tensor) -> dict[str, float]:
        hits = self.images.nearest_to(features.cpu(), self.queries.entries).hits
        return super().values(features) | {f"val/R@{rank}": float(np.mean(each)) for rank, each in hits.items()}
