"""Images as a video in one file, with its settings inside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.io.files import FileError, atomic_write

try:
    import imageio_ffmpeg
except ModuleNotFoundError:  # only MP4 needs it
    imageio_ffmpeg = None

FORMATS = ("gif", "mp4")


def check_format(kind: str) -> None:
    """Raise FileError unless videos of this format can be written here."""
    if kind == "mp4" and imageio_ffmpeg is None:
        raise FileError('mp4 needs imageio-ffmpeg: pip install -e ".[video]"; expected gif')


def save_video(path: str | Path, images: Sequence[Image.Image], fps: float, settings: Mapping[str, Any]) -> None:
    """Write images of one size as a video, whole or not at all; the format is that of the path's suffix.

    Args:
        fps: frames per second; a GIF counts in hundredths of a second.
        settings: JSON values, which go into the file's comment.

    Raises:
        FileError: another format, or one that can't be written here. OSError: it can't be written.
    """
    path, comment = Path(path), json.dumps(settings)
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise FileError(f"{path}: expected a name that ends in .{' or .'.join(FORMATS)}")
    check_format(kind)
    with atomic_write(path) as temporary:
        (_save_gif if kind == "gif" else _save_mp4)(temporary, images, fps, comment)


def _save_gif(path: Path, images: Sequence[Image.Image], fps: float, comment: str) -> None:
    first, *rest = images
    first.save(
        path, format="GIF", save_all=True, append_images=rest, duration=1000 / fps, loop=0, comment=comment.encode()
    )


def _save_mp4(path: Path, images: Sequence[Image.Image], fps: float, comment: str) -> None:
    # H.264 in the colours that every player knows, for which both sides must be even.
    options = ["-metadata", f"comment={comment}", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"]
    writer = imageio_ffmpeg.write_frames(
        str(path),
        images[0].size,
        fps=fps,
        macro_block_size=2,
        quality=8,
        ffmpeg_log_level="error",
        output_params=options,
    )
    writer.send(None)
    try:
        for image in images:
            writer.send(np.ascontiguousarray(image.convert("RGB")))
    finally:
        writer.close()
