"""CelebA-HQ and FFHQ, by their lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from ldm.data.images import ImagePaths, listed


class Faces(ImagePaths):
    """The images that a list names, squares from their centre.

    Args:
        size: side of the images.
        data_root, list_file: folder and list; None = the published ones, below data/.
    """

    folder: str
    list: str

    def __init__(self, size: int, data_root: str | None = None, list_file: str | None = None):
        super().__init__(listed(Path(list_file or self.list), Path(data_root or self.folder)), size)


class CelebAHQTrain(Faces):
    folder, list = "data/celebahq", "data/celebahqtrain.txt"


class CelebAHQValidation(Faces):
    folder, list = "data/celebahq", "data/celebahqvalidation.txt"


class FFHQTrain(Faces):
    folder, list = "data/ffhq", "data/ffhqtrain.txt"


class FFHQValidation(Faces):
    folder, list = "data/ffhq", "data/ffhqvalidation.txt"


class FacesHQ(Dataset):
    """CelebA-HQ (class 0), then FFHQ (class 1)."""

    kinds: tuple[type[Faces], type[Faces]]

    def __init__(self, size: int):
        self.both = ConcatDataset([kind(size) for kind in self.kinds])

    def __len__(self) -> int:
        return len(self.both)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.both[i] | {"class": int(i >= self.both.cumulative_sizes[0])}


class FacesHQTrain(FacesHQ):
    kinds = (CelebAHQTrain, FFHQTrain)


class FacesHQValidation(FacesHQ):
    kinds = (CelebAHQValidation, FFHQValidation)
