"""Images in tar files (WebDataset), for sets that outgrow a disk's number of files, or the disk."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import webdataset
from torch.utils.data import IterableDataset
from webdataset.shardlists import expand_urls, split_by_node
from webdataset.utils import pytorch_worker_info

from ldm.data.images import ImagePaths, in_range
from ldm.io.files import Count
from ldm.io.images import SUFFIXES, open_image

SCHEMES = ("http", "https", "s3", "gs", "hf")  # of addresses; webdataset knows others, of which pipe: runs commands


class Shards(IterableDataset):
    """The images of tar files, one after another, through the `webdataset` package.

    Files of a tar that differ in their ending only are one example: an image, and a caption in `.txt` or a class in
    `.cls`.

    Args:
        urls: paths, or addresses of one of `SCHEMES`, in the notation of `webdataset`: data/{00000..01234}.tar.
        size: side of the squares.
        random_crop, flip: see `ImagePaths`.
        shuffle: examples in memory from which the next is drawn; 0 = in their order.
        seed: of that draw, and of the order of the files.
        epoch: examples of an epoch, of all processes that train together; where there are several it must be given, so
            that all make as many steps. Each process, and each of its workers, then reads files of its own again and
            again. None = an epoch is all that the files have.

    Raises:
        ValueError: an address of another scheme; a local file is not there; (when read) fewer files than processes
            with their workers, or no epoch where it must be given.
    """

    def __init__(
        self,
        urls: str,
        size: int,
        random_crop: bool = False,
        flip: float = 0.0,
        shuffle: int = 1000,
        seed: int = 23,
        epoch: Count | None = None,
    ):
        files = expand_urls(urls)
        check_addresses(files)
        self.files, self.epoch = len(files), epoch
        self.preparation = ImagePaths([], size, None, random_crop, flip)
        order = {"shardshuffle": len(files) if shuffle else False, "detshuffle": True, "seed": seed}
        shards = webdataset.WebDataset(files, empty_check=False, nodesplitter=split_by_node, **order)
        shards = shards.shuffle(shuffle, seed=seed) if shuffle else shards
        self.examples = shards.repeat() if epoch else shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _, processes, _, workers = pytorch_worker_info()
        if self.epoch is None:
            if processes > 1:
                raise ValueError(
                    f"epoch: {processes} processes train together, so the images of an epoch must be given"
                )
            return map(self.example, self.examples)
        if self.files < processes * workers:
            raise ValueError(
                f"urls: {self.files} files are fewer than the {processes} processes x {workers} workers that read them"
            )
        return map(self.example, islice(self.examples, self.epoch // (processes * workers)))

    def example(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """An example, from the files of a tar by their endings.

        Raises:
            ValueError: there is no image among them, or it can't be read.
        """
        ending = next((name for name in files if f".{name.lower()}" in SUFFIXES), None)
        if ending is None:
            raise ValueError(f"{files.get('__url__')}: {files.get('__key__')} has no image; it has {', '.join(files)}")
        pixels = np.asarray(open_image(io.BytesIO(files[ending])))
        example: dict[str, Any] = {"image": in_range(self.preparation.prepared(pixels))}
        if "txt" in files:
            example["caption"] = files["txt"].decode().strip()
        if "cls" in files:
            example["class_label"] = int(files["cls"])
        return example


def check_addresses(files: Sequence[str]) -> None:
    """Raise ValueError unless each is a file that is there, or an address of one of `SCHEMES`.

    A configuration names them, so none may be a command.
    """
    local = []
    for file in files:
        scheme = urlparse(file).scheme
        if scheme and scheme not in SCHEMES:
            raise ValueError(f"urls: {file!r}; accepted: paths, and addresses of {', '.join(SCHEMES)}")
        local += [] if scheme else [file]
    missing = [file for file in local if not Path(file).is_file()]
    if missing:
        raise ValueError(f"{missing[0]}: no such file ({len(missing)} of {len(files)} are missing)")
