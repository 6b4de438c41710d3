"""Images with captions under the name that the published text-to-image config gives them; the set was never released.

On disk: data/previews/{train,validation}, each as `ldm.data.folder.CaptionedFolder` reads it.
"""

from __future__ import annotations

from typing import Any

from ldm.data.folder import CaptionedFolder


class Previews(CaptionedFolder):
    part: str

    def __init__(self, size: int, root: str = "data/previews", **rest: Any):
        super().__init__(f"{root}/{self.part}", size, **rest)


class PreviewsTrain(Previews):
    part = "train"


class PreviewsValidation(Previews):
    part = "validation"
