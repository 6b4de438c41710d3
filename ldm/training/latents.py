"""Latents that are encoded once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.data.images import ImagePaths
from ldm.io.arrays import map_array
from ldm.io.files import atomic_write, json_sha256
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

BATCH = 16  # images that are encoded at a time
ENCODED = "encoded"  # an example's entry for what its image was encoded to


def parameters_of(encoded: DiagonalGaussianDistribution | Tensor) -> Tensor:
    """What a first stage encodes to, as one tensor: mean and log-variance of posteriors (B, 2C, h, w), or codes."""
    if isinstance(encoded, DiagonalGaussianDistribution):
        return torch.cat([encoded.mean, encoded.logvar], dim=1)
    return encoded


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of a module's weights and their names, hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of files' paths, sizes and times, hexadecimal; what is in them is not read."""
    found = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return json_sha256(found)


def kept(
    folder: Path, of: Mapping[str, Any], first_stage: nn.Module, images: Iterable[Tensor], count: int
) -> np.ndarray:
    """What a first stage encodes images to, (count, ...) float32, see `parameters_of`.

    It is in the folder's file for exactly these images and weights, or else is encoded and written there.

    Args:
        of: all that the images depend on, JSON values.
        images: (B, 3, H, W) in [-1, 1] at a time; not read where the file is there.

    Raises:
        ValueError: the file is damaged. OSError: it can't be written; nothing is left of it then.
    """
    key = json_sha256({**of, "first_stage": weights_sha256(first_stage)})
    path = folder / f"{key[:24]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_encoded(path, first_stage, images, count)
    try:
        array = map_array(path, "latents")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged; delete it, and it is made again: {error}") from error
    print(f"latents: {path} ({path.stat().st_size / 1e6:.0f} MB)")
    return array


@torch.no_grad()
def write_encoded(path: Path, first_stage: nn.Module, images: Iterable[Tensor], count: int) -> None:
    """Encode images and write the file, whole or not at all."""
    device = next((p.device for p in first_stage.parameters()), torch.device("cpu"))
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        # Not by a memory map: on a full disk that ends the process.
        for batch in tqdm(images, desc="latents", total=-(-count // BATCH), leave=False, disable=None):
            found = parameters_of(first_stage.encode(batch.to(device))).float().cpu().numpy()
            if file.tell() == 0:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *found.shape[1:])})
            file.write(found.tobytes())


class EncodedImages(Dataset):
    """The examples of a dataset of files, with what a first stage encodes each image to in place of the image.

    Of a dataset that mirrors a share of its images both are encoded, and one is drawn at each access.

    Args:
        dataset: its examples depend on the file only, but for mirroring.
        first_stage: in evaluation mode.
        folder: of the files, see `kept`.

    Raises:
        ValueError: a dataset that draws more than that, or has other images than those of files.
    """

    def __init__(self, dataset: Dataset, first_stage: nn.Module, folder: Path):
        if not isinstance(dataset, ImagePaths) or type(dataset).__getitem__ is not ImagePaths.__getitem__:
            raise ValueError(
                f"latents: those of {type(dataset).__name__} can't be kept; accepted: datasets of image files, with "
                f"classes or captions or without"
            )
        if dataset.random_crop:
            raise ValueError("latents: those of random crops can't be kept; set random_crop to false")
        self.dataset = dataset
        shares = (0.0, 1.0) if dataset.flip else (0.0,)
        self.encoded = [self.of_mirrored(share, first_stage, folder) for share in shares]

    def of_mirrored(self, share: float, first_stage: nn.Module, folder: Path) -> np.ndarray:
        """What all images, or all mirror images, are encoded to."""
        source = copy(self.dataset)
        source.flip = share
        of = {"files": files_sha256(source.paths), "size": source.size, "crop": source.crop_size, "mirrored": share}
        return kept(folder, of, first_stage, batches(source), len(source))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        mirrored = len(self.encoded) > 1 and torch.rand(()) < self.dataset.flip
        return {ENCODED: torch.from_numpy(self.encoded[mirrored][i].copy())} | self.dataset.described(i)


def batches(dataset: ImagePaths) -> Iterator[Tensor]:
    """The images of a dataset, (at most BATCH, 3, H, W) in [-1, 1] at a time."""
    for start in range(0, len(dataset), BATCH):
        images = [dataset[i]["image"] for i in range(start, min(start + BATCH, len(dataset)))]
        yield torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()
