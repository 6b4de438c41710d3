"""Images: tensors to and from PIL, grids and comparisons, settings inside a PNG."""

from __future__ import annotations

import hashlib
import io
import json
import math
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ldm.io.files import FileError, atomic_write, check_regular, parse_json

# The formats that are read, with the endings of their files. Others may start programs: PostScript runs GhostScript.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm"),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MOST_PIXELS = 1 << 26  # 8192 x 8192
BACKGROUND = (255, 255, 255)
INK = (32, 32, 32)
GAP = 2
CELL = 192  # pixels to which a comparison enlarges small images
TEXT = 13  # pixels; below 12 the spaces of Pillow's own font can't be seen


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] as 8-bit RGB: clamped, then rounded to the nearest level.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (B, 3, H, W); got {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("images: expected finite values in [-1, 1]; got NaN or infinity")
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels]  # each (H, W, 3)


def files_below(root: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted by path; of the folder of a run of ours its samples alone,
    without the grids beside them, which show them again.

    Raises:
        ValueError: there is no such folder, or it has no images.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one with images")
    ours = (root / "manifest.jsonl").is_file() and (root / "samples").is_dir()
    files = (root / "samples" if ours else root).rglob("*")
    found = sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{root}: no images in this folder; looked for {', '.join(sorted(SUFFIXES))}")
    return found


@contextmanager
def opened(path: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """Open an image file and read its header. Any error inside the block becomes a FileError, since reading a damaged
    file can raise anything.

    Raises:
        OSError: no such file, or not a regular one.
        FileError: not one of `FORMATS`, damaged, or larger than `MOST_PIXELS`.
    """
    if isinstance(path, str | Path):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file; expected an image")
        check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is the bound
            image = Image.open(path, formats=[*FORMATS])
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            yield image
    except UnidentifiedImageError:
        raise FileError(f"{path}: not an image that can be read; expected {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise FileError(f"{path}: an image of more than {MOST_PIXELS} pixels: {error}") from None
    except Exception as error:
        raise FileError(f"{path}: a damaged image: {' '.join(str(error).split())}") from error


def open_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, as a viewer shows it.

    It is rotated as its EXIF data say. Transparent parts become white. 16-bit grey is rounded to 8 bits. An animation
    gives its first frame.

    Raises:
        OSError: no such file.
        ValueError: not an image, damaged, with more than 16 bits per level, or a 16-bit file of 8-bit levels, which
            would be black.
    """
    image = _eight_bits(path)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
    return image.convert("RGB")


def open_mask(path: str | Path) -> Tensor:
    """A mask file as (1, H, W): 1 where it is brighter than middle grey, else 0.

    Raises:
        OSError, ValueError: see `open_image`; or the mask has transparent parts, which may mean either region; or
            nothing in it is bright, as in a file of labels.
    """
    image = _eight_bits(path)
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
        raise ValueError(f"{path}: a mask with transparent parts; expected white where to paint, black elsewhere")
    levels = torch.from_numpy(np.array(image.convert("L")))  # (H, W)
    if (brightest := int(levels.max())) < 128:
        raise ValueError(
            f"{path}: a mask that paints nothing: its brightest level is {brightest} of 255; expected "
            f"white where to paint"
        )
    return (levels >= 128).float()[None]


def open_labels(path: str | Path) -> Tensor:
    """The class label of each pixel, (H, W) int64, from an image whose levels or palette indices they are.

    Raises:
        OSError: no such file.
        ValueError: not an image, damaged, or with colours.
    """
    image = _upright(path)
    if image.mode not in ("L", "P", "1") and not image.mode.startswith("I"):
        raise ValueError(f"{path}: an image of mode {image.mode}; expected one number per pixel (L, P or 16-bit grey)")
    return torch.from_numpy(np.array(image).astype(np.int64))


def _eight_bits(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, or RGBA if it has transparency."""
    image = _upright(path)
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"{path}: levels {levels.min()}..{levels.max()}; expected 8 or 16 bits per level")
        if 0 < levels.max() <= 255:
            raise ValueError(
                f"{path}: levels {levels.min()}..{levels.max()} in more than 8 bits, which is black; save "
                f"it with 8 bits per level"
            )
        image = Image.fromarray((levels / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(f"{path}: levels that are not whole numbers; expected 8 or 16 bits per level")
    elif image.mode == "LAB":  # of the white D50, as files have it; Pillow converts it by colour profiles only
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _upright(path: str | Path) -> Image.Image:
    with opened(path) as image:
        image.load()
        return ImageOps.exif_transpose(image)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image resized (Lanczos) to cover height x width, and cropped at the centre."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def pad(images: Tensor, height: int, width: int) -> Tensor:
    """Images (..., C, H, W) padded on the right and at the bottom by repeating their edges."""
    extra = (0, width - images.shape[-1], 0, height - images.shape[-2])
    return torch.nn.functional.pad(images, extra, mode="replicate")


def from_pil(image: Image.Image) -> Tensor:
    """An image as a tensor (3, H, W) in [-1, 1]; the inverse of `to_pil`."""
    levels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3)
    return levels.permute(2, 0, 1).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, (B,); infinite for equal images.

    Args:
        a, b: (B, C, H, W).
        peak: the greatest possible difference: 2 for values in [-1, 1].
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error)


# Many images in one


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str] = (), cell: int = 128) -> Image.Image:
    """The images, all of one size, in rows of `columns`, left to right and top to bottom.

    Args:
        captions: one per image, or none; neighbours with the same caption share it, a long one is cut.
        cell: with captions small images are enlarged by a whole factor to about this width in pixels.
    """
    if not images or columns < 1 or len(captions) not in (0, len(images)):
        raise ValueError(
            f"a grid needs images, columns >= 1 and a caption for each image or for none; got "
            f"{len(images)} images, {columns} columns, {len(captions)} captions"
        )
    factor = max(1, cell // images[0].width) if captions else 1
    width, height = (factor * side for side in images[0].size)
    columns, font = min(columns, len(images)), ImageFont.load_default(TEXT)
    line = _line_height(font) if captions else 0
    across, down = width + GAP, height + line + GAP
    sheet = Image.new("RGB", (GAP + columns * across, GAP + -(-len(images) // columns) * down), BACKGROUND)
    for k, image in enumerate(images):
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (GAP + k % columns * across, GAP + k // columns * down))
    draw = ImageDraw.Draw(sheet)
    # A caption begins where it differs from the one before, and in each row.
    begins = [k for k in range(len(captions)) if k % columns == 0 or captions[k] != captions[k - 1]]
    for k, end in pairwise([*begins, len(captions)]):
        room = (end - k) * across - GAP
        draw.text(
            (GAP + k % columns * across, GAP + k // columns * down + height + GAP),
            _fitted(captions[k], font, room),
            INK,
            font,
        )
    return sheet


def side_by_side(columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """A comparison: one column per method under its label, one row per image, captions below the rows.

    Many rows are broken into panels beside each other, so that the sheet is about as wide as high. Small images are
    enlarged by a whole factor to about CELL pixels in width.

    Args:
        columns: label -> images; all columns of the same length, all images of the same size.
        captions: one per row, or none; a long one is cut to the width of its panel.
    """
    rows = list(zip(*columns.values(), strict=True))
    if not rows or len(captions) not in (0, len(rows)):
        raise ValueError(
            f"a comparison needs images and a caption for each row or for none; "
            f"got {len(rows)} rows, {len(captions)} captions"
        )
    factor = max(1, CELL // rows[0][0].width)
    width, height = (factor * side for side in rows[0][0].size)
    panels = math.ceil(math.sqrt(len(rows) * height / (len(columns) * width)))
    per_panel = math.ceil(len(rows) / panels)
    parts = [
        _panel(list(columns), rows[i : i + per_panel], captions[i : i + per_panel], (width, height))
        for i in range(0, len(rows), per_panel)
    ]
    sheet = Image.new("RGB", (sum(part.width for part in parts), parts[0].height), BACKGROUND)
    for i, part in enumerate(parts):
        sheet.paste(part, (i * parts[0].width, 0))
    return sheet


def _panel(
    labels: Sequence[str], rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], cell: tuple[int, int]
) -> Image.Image:
    """Rows of images, each enlarged to `cell`, below the labels of their columns."""
    width, height = cell
    font = ImageFont.load_default(TEXT)
    line = _line_height(font)
    row_height = GAP + height + (line if captions else 0)
    sheet = Image.new("RGB", (GAP + len(labels) * (width + GAP), line + len(rows) * row_height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for c, label in enumerate(labels):
        draw.text((GAP + c * (width + GAP), GAP), _fitted(label, font, width), INK, font)
    for r, row in enumerate(rows):
        top = line + r * row_height + GAP
        for c, image in enumerate(row):
            sheet.paste(image.resize(cell, Image.Resampling.NEAREST), (GAP + c * (width + GAP), top))
        if captions:
            draw.text((GAP, top + height + GAP), _fitted(captions[r], font, sheet.width - 2 * GAP), INK, font)
    return sheet


def _line_height(font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    return font.getbbox("Ág")[3] + 2 * GAP


def _fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, with an ellipsis if it is wider than `width` pixels."""
    # The built-in font may know Latin letters only. What follows so many letters fits into no width.
    text = text[: 8 * width].encode("latin-1", "replace").decode("latin-1")
    if font.getlength(text) <= width:
        return text
    longer = bisect_right(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "..."))
    return text[: max(0, longer - 1)] + "..."


# Settings inside the file


def png_bytes(
    image: Image.Image, settings: Mapping[str, Any], run: Mapping[str, Any] | None = None, parameters: str | None = None
) -> bytes:
    """The content of a PNG file that holds its settings.

    Args:
        settings: everything the image depends on, as JSON values; goes to the text `settings`.
        run: other facts of the run (device, seconds, ...); goes to the text `run`.
        parameters: the text `parameters`, for people and other programs; by default a line with both.
    """
    run = dict(run or {})
    text = PngImagePlugin.PngInfo()
    if parameters is None:
        parameters = ", ".join(f"{key}: {value}" for key, value in {**settings, **run}.items())
    text.add_itxt("parameters", parameters)
    text.add_itxt("settings", json.dumps(settings))
    text.add_itxt("run", json.dumps(run))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=text)
    return content.getvalue()


def save_png(
    path: str | Path,
    image: Image.Image,
    settings: Mapping[str, Any],
    run: Mapping[str, Any] | None = None,
    parameters: str | None = None,
) -> dict[str, Any]:
    """Write an image with its settings (see `png_bytes`); the file appears whole or not at all.

    Returns:
        `run` as it stands in the file: with a hash by which `find_png` detects changes.
    """
    run = dict(run or {})
    run["proof"] = _proof(image, settings, run)
    content = png_bytes(image, settings, run, parameters)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return run


def _proof(image: Image.Image, settings: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """A hash of the image's pixels, settings and run."""
    digest = hashlib.sha256(json.dumps([image.size, settings, run], sort_keys=True).encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def find_png(path: str | Path, settings: Mapping[str, Any]) -> tuple[Image.Image, dict[str, Any]] | None:
    """An image and its run; None unless `save_png` wrote it with these settings and it is unchanged."""
    found = read_png(path)
    if found is None or found[1] != settings:
        return None
    image, _, run = found
    made = {key: value for key, value in run.items() if key != "proof"}
    return (image, run) if run.get("proof") == _proof(image, settings, made) else None


def read_png(path: str | Path) -> tuple[Image.Image, dict[str, Any], dict[str, Any]] | None:
    """An image with the settings and run that `png_bytes` wrote; None if it has none."""
    try:
        with opened(path) as image:
            image.load()
            settings, run = (parse_json(image.text[name]) for name in ("settings", "run"))
            pixels = image.convert("RGB")
    except (OSError, FileError):
        return None
    return (pixels, settings, run) if isinstance(settings, dict) and isinstance(run, dict) else None


# The PNG text `parameters`, in the format of AUTOMATIC1111's web UI, which many programs read. They draw other
# noise, so the same settings do not give the same image there.

# Our sampler names -> the names that readers know; other names stay.
SAMPLERS = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "dpm-solver++": "DPM++ 2M",
    "dpm-solver++-published": "DPM++ 2M",
    "euler": "Euler",
    "euler-trailing": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
}
SCHEDULES = {"karras": "Karras", "logsnr": "Exponential"}  # our spacings -> the names that readers know
# The fields of the last line: name -> our setting, and how its value is written.
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "Steps": ("steps", str),
    "Sampler": ("sampler", lambda name: SAMPLERS.get(name, name)),
    "Schedule type": ("spacing", lambda name: SCHEDULES.get(name, name)),
    "Timesteps": ("timesteps_at", lambda timesteps: ",".join(map(str, timesteps))),
    "CFG scale": ("scale", str),
    "Seed": ("seed", itemgetter(0)),
    "Size": ("size", str),
    "Model hash": ("weights", lambda digest: digest[:10]),
    "Model": ("ckpt", lambda file: PurePosixPath(file).stem),
    "Eta": ("eta", str),
    "Denoising strength": ("strength", str),
    "Key steps": ("keys", lambda keys: ",".join(map(str, keys))),
    "Propagate": ("propagate", str),
    "Prior noise": ("noise_weight", str),
    "Sample": ("sample", str),
}


def parameters(settings: Mapping[str, Any]) -> str:
    """The text for an image with these settings, those of its item, its model files and its sampler:

    a red heart, noto style
    Negative prompt: grey
    Steps: 50, Sampler: DDIM, CFG scale: 2.0, Seed: 42, Size: 64x64, Model hash: 0123456789, Model: model, ...
    """
    if "width" in settings:
        settings = {**settings, "size": f"{settings['width']}x{settings['height']}"}
    given = {key: value for key, value in settings.items() if value is not None}  # without keys, a plain run
    last = [f"{name}: {_quoted(str(of(given[key])))}" for name, (key, of) in FIELDS.items() if key in given]
    negative = settings.get("negative_prompt")
    return "\n".join(
        [
            settings.get("prompt", ""),
            *([f"Negative prompt: {negative}"] if negative else []),
            ", ".join([*last, "Version: Faster Diffusion"]),
        ]
    )


def _quoted(text: str) -> str:
    """A value with characters that would end its field stands in quotes, as readers expect."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text
