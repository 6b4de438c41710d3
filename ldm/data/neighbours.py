"""Images with the embeddings of their nearest neighbours in a database."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.io.arrays import load_array
from ldm.util import instantiate_from_config

MOST_NUMBERS = 1 << 33  # of all embeddings together, 32 GB


class QueryDataset(Dataset):
    """A dataset whose examples get `nn_embeddings`, (k, D) float32, nearest first.

    Args:
        dset_config: target and params of the dataset.
        nns: `.npz` file with the array nn_embeddings, (images, k or more, D), in the order of the dataset.
        k: neighbours of each image.
        n_patches_per_side: 1: neighbours are of the whole image.
        load_patches: accepted for published configs; the images of neighbours are not loaded.

    Raises:
        ValueError: the file is not there or has no such array, or it is of another dataset.
    """

    def __init__(
        self, dset_config: Mapping[str, Any], nns: str, k: int, n_patches_per_side: int = 1, load_patches: bool = False
    ):
        if n_patches_per_side != 1:
            raise ValueError(f"n_patches_per_side: only 1 is supported; got {n_patches_per_side}")
        self.dataset = instantiate_from_config(dset_config)
        if not Path(nns).is_file():
            raise ValueError(f"nns: no file {nns}; expected an .npz with the array nn_embeddings, (images, k, D)")
        try:
            self.neighbours = load_array(nns, "nn_embeddings", MOST_NUMBERS)
        except (ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"nns: {nns}: {error}") from error
        if self.neighbours.ndim != 3 or len(self.neighbours) != len(self.dataset) or self.neighbours.shape[1] < k:
            raise ValueError(
                f"nns: {nns} is {self.neighbours.shape}; expected ({len(self.dataset)} images, {k} or more, D)"
            )
        self.k = k

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[i] | {"nn_embeddings": self.neighbours[i, : self.k].astype(np.float32)}
