"""Low-resolution images as a camera and a codec would leave them: the degradations that super-resolution trains on.

Source: BSRGAN (arXiv 2103.14006), in the variant that latent diffusion uses, and its light version.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.linalg import orth

SCALE = 4
OPENCV = ("INTER_LINEAR", "INTER_CUBIC", "INTER_AREA")
CV_FILTERS = {
    "nearest": "INTER_NEAREST",
    "bilinear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC",
    "area": "INTER_AREA",
    "lanczos": "INTER_LANCZOS4",
}
PIL_FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Strength:
    """How strong the degradations are.

    blurs:           of the two blurs, how many are done.
    widths:          factor of a blur kernel's standard deviations.
    sizes:           factor of an anisotropic kernel's size; its smallest is 3 more.
    isotropic_sizes: the least and the greatest number that an isotropic kernel's size is computed from.
    resize:          share of downsampling by a random resize; the rest is blur and every n-th pixel.
    noise:           least and greatest level, of 255; the greatest is also that of correlated noise.
    quality:         least and greatest quality of JPEG.
    """

    blurs: int = 2
    widths: float = 1.0
    sizes: int = 2
    isotropic_sizes: tuple[int, int] = (2, 11)
    resize: float = 0.75
    noise: tuple[int, int] = (2, 25)
    quality: tuple[int, int] = (30, 95)


FULL = Strength()
LIGHT = Strength(1, 0.25, 1, (2, 4), 0.8, (1, 2), (80, 95))


@dataclass(frozen=True)
class Draws:
    """Random numbers, from the two generators that the published code draws from in turn."""

    python: random.Random
    numpy: np.random.RandomState

    @classmethod
    def seeded(cls, seed: int) -> Draws:
        return cls(random.Random(seed), np.random.RandomState(seed))

    @classmethod
    def from_torch(cls) -> Draws:
        """Seeded by PyTorch's generator."""
        return cls.seeded(int(torch.randint(2**31, ())))


# Kernels


def anisotropic_kernel(size: int, theta: float, l1: float, l2: float) -> np.ndarray:
    """A Gaussian whose axes have variances l1 and l2, the first at the angle theta: (size, size), its sum 1."""
    axes = np.array([[np.cos(theta), np.sin(theta)], [np.sin(theta), -np.cos(theta)]])
    precision = np.linalg.inv(axes @ np.diag([l1, l2]) @ np.linalg.inv(axes))
    offsets = np.arange(size) - size / 2 + 0.5
    at = np.stack(np.meshgrid(offsets, offsets), axis=-1)  # (size, size, 2): x, y
    density = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", at, precision, at))
    return density / density.sum()


def gaussian_kernel(size: int, sigma: float) -> np.ndarray:
    """MATLAB's fspecial('gaussian', size, sigma): (size, size), its sum 1."""
    offsets = np.arange(size) - (size - 1) / 2
    density = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * sigma**2))
    density[density < np.finfo(float).eps * density.max()] = 0
    return density / density.sum()


def shifted_kernel(kernel: np.ndarray, scale: int) -> np.ndarray:
    """The kernel moved by (scale - 1) / 2 pixels, so that every scale-th pixel is the centre of those around it."""
    size = len(kernel)
    positions = np.clip(np.arange(size) + (scale - 1) / 2, 0, size - 1)
    low = np.minimum(positions.astype(int), size - 2)
    part = positions - low

    def along_rows(values: np.ndarray) -> np.ndarray:
        return values[low] * (1 - part)[:, None] + values[low + 1] * part[:, None]

    moved = along_rows(along_rows(kernel).T).T
    return moved / moved.sum()


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Each channel of (H, W, 3) convolved with the kernel; the image is mirrored at its borders."""
    return ndimage.convolve(image, kernel[..., None], mode="mirror")


# Sizes


def resize(image: np.ndarray, width: int, height: int, interpolation: str) -> np.ndarray:
    """By OpenCV, without antialiasing for INTER_LINEAR and INTER_CUBIC."""
    return cv2.resize(image, (int(width), int(height)), interpolation=getattr(cv2, interpolation))


def cubic(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def imresize(image: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's imresize, bicubic with antialiasing: (H, W, 3) -> (ceil(H * scale), ceil(W * scale), 3)."""

    def along_rows(values: np.ndarray) -> np.ndarray:
        size = len(values)
        count, width = int(np.ceil(size * scale)), 4 / min(scale, 1.0)
        centres = np.arange(1, count + 1) / scale + 0.5 * (1 - 1 / scale)
        taps = np.floor(centres - width / 2)[:, None] + np.arange(int(np.ceil(width)) + 2)  # from 1 on
        shrunk = min(scale, 1.0)
        weights = shrunk * cubic(shrunk * (centres[:, None] - taps))
        weights /= weights.sum(1, keepdims=True)
        mirror = np.concatenate([np.arange(size), np.arange(size)[::-1]])  # symmetric: the border pixel twice
        places = mirror[(taps.astype(int) - 1) % (2 * size)]
        return np.einsum("nt,nt...->n...", weights, values[places])

    return along_rows(along_rows(image.astype(np.float64)).swapaxes(0, 1)).swapaxes(0, 1).astype(image.dtype)


# Degradations; images are (H, W, 3) float32 in 0..1


def random_kernel(scale: int, draws: Draws, strength: Strength) -> np.ndarray:
    """A Gaussian, half of the time an anisotropic one."""
    python = draws.python
    if python.random() < 0.5:
        most = strength.widths * (4 + scale)
        l1, l2 = most * python.random(), most * python.random()
        size = strength.sizes * python.randint(2, 11) + 3
        return anisotropic_kernel(size, python.random() * np.pi, l1, l2)
    size = strength.sizes * python.randint(*strength.isotropic_sizes) + 3
    return gaussian_kernel(size, strength.widths * (2 + 0.2 * scale) * python.random())


def add_blur(image: np.ndarray, scale: int, draws: Draws, strength: Strength = FULL) -> np.ndarray:
    return convolve(image, random_kernel(scale, draws, strength))


def add_noise(image: np.ndarray, draws: Draws, strength: Strength = FULL) -> np.ndarray:
    """Gaussian noise: of each channel, the same in all, or correlated."""
    numpy, level = draws.numpy, draws.python.randint(*strength.noise) / 255.0
    kind = numpy.rand()
    if kind > 0.6:
        noise = numpy.normal(0, level, image.shape)
    elif kind < 0.4:
        noise = numpy.normal(0, level, (*image.shape[:2], 1))
    else:
        most = strength.noise[1] / 255.0
        variances, axes = np.diag(numpy.rand(3)), orth(numpy.rand(3, 3))
        covariance = np.abs(most**2 * axes.T @ variances @ axes)
        noise = numpy.multivariate_normal([0, 0, 0], covariance, image.shape[:2])
    return np.clip(image + noise.astype(np.float32), 0.0, 1.0)


def add_jpeg(image: np.ndarray, draws: Draws, strength: Strength = FULL) -> np.ndarray:
    """Written as JPEG, and read again."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, draws.python.randint(*strength.quality)]
    _, data = cv2.imencode(".jpg", to_levels(image)[..., ::-1], quality)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255.0


def to_levels(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def random_resize(image: np.ndarray, width: float, height: float, draws: Draws) -> np.ndarray:
    return resize(image, int(width), int(height), OPENCV[draws.python.choice([1, 2, 3]) - 1])


def halve(image: np.ndarray, draws: Draws) -> np.ndarray:
    height, width = image.shape[:2]
    small = random_resize(image, width / 2, height / 2, draws) if draws.numpy.rand() < 0.5 else imresize(image, 0.5)
    return np.clip(small, 0.0, 1.0)


def downsample(image: np.ndarray, scale: int, draws: Draws, strength: Strength) -> np.ndarray:
    """Smaller by a random factor, or blurred and every scale-th pixel taken."""
    python, (height, width) = draws.python, image.shape[:2]
    if python.random() < strength.resize:
        factor = python.uniform(1, 2 * scale)
        small = random_resize(image, 1 / factor * width, 1 / factor * height, draws)
    else:
        kernel = shifted_kernel(gaussian_kernel(25, python.uniform(0.1, 0.6 * scale)), scale)
        small = convolve(image, kernel)[::scale, ::scale]
    return np.clip(small, 0.0, 1.0)


BLUR, SECOND_BLUR, DOWNSAMPLE, FINAL_SIZE, NOISE, JPEG, CAMERA = range(7)


def bsrgan(pixels: np.ndarray, draws: Draws, strength: Strength = FULL) -> np.ndarray:
    """An image (H, W, 3) uint8 -> its low-resolution version, (H // 4, W // 4, 3) uint8.

    Blur, downsampling, noise and JPEG in a random order, and JPEG again. The order has a place for the errors of a
    camera's own processing, which this variant leaves out.

    Args:
        draws: random numbers; they are used up in the published order.
        strength: `FULL`, or `LIGHT` for bsrgan_light.
    """
    height, width = (side - side % SCALE for side in pixels.shape[:2])
    image, scale = pixels[:height, :width].astype(np.float32) / 255.0, SCALE
    if draws.python.random() < 0.25:
        image, scale = halve(image, draws), 2
    order = draws.python.sample(range(7), 7)
    first, second = order.index(DOWNSAMPLE), order.index(FINAL_SIZE)
    if first > second:
        order[first], order[second] = order[second], order[first]
    sizes = image.shape[:2]
    for step in order:
        if step == DOWNSAMPLE:
            sizes = image.shape[:2]
        image = degraded(image, step, scale, sizes, draws, strength)
    return to_levels(add_jpeg(image, draws, strength))


def degraded(
    image: np.ndarray, step: int, scale: int, sizes: tuple[int, ...], draws: Draws, strength: Strength
) -> np.ndarray:
    """One step of `bsrgan`; sizes are height and width before the downsampling."""
    if step == BLUR or (step == SECOND_BLUR and strength.blurs == 2):
        return add_blur(image, scale, draws, strength)
    if step == DOWNSAMPLE:
        return downsample(image, scale, draws, strength)
    if step == FINAL_SIZE:
        return np.clip(random_resize(image, sizes[1] / scale, sizes[0] / scale, draws), 0.0, 1.0)
    if step == NOISE:
        return add_noise(image, draws, strength)
    if step == JPEG and draws.python.random() < 0.9:
        return add_jpeg(image, draws, strength)
    return image


def degradation(name: str, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function (H, W, 3) uint8 -> (size, size, 3) uint8 of this name.

    Args:
        name: bsrgan, bsrgan_light, cv_FILTER or pil_FILTER; the first two make a quarter of the size.

    Raises:
        ValueError: there is no such degradation.
    """
    kind, _, filter_ = name.partition("_")
    if name in ("bsrgan", "bsrgan_light"):
        strength = FULL if name == "bsrgan" else LIGHT
        return lambda pixels: bsrgan(pixels, Draws.from_torch(), strength)
    if kind == "cv" and filter_ in CV_FILTERS:
        return lambda pixels: resize(pixels, size, size, CV_FILTERS[filter_])
    if kind == "pil" and filter_ in PIL_FILTERS:
        by = Image.Resampling[filter_.upper()]
        return lambda pixels: np.asarray(Image.fromarray(pixels).resize((size, size), by))
    known = ["bsrgan", "bsrgan_light", *(f"cv_{f}" for f in CV_FILTERS), *(f"pil_{f}" for f in PIL_FILTERS)]
    raise ValueError(f"degradation: {name!r} is not one of {', '.join(known)}")
