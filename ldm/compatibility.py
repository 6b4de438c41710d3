"""Helpers that published scripts and notebooks import from `ldm.util`, `ldm.modules` and `ldm.models`.

This project does not use them itself. They keep their published names, arguments and results; docs/compatibility.md
lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import isfunction
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ldm.models.diffusion.schedule import ddim_timesteps

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


# Of ldm.util


def exists(x: Any) -> bool:
    return x is not None


def default(val: Any, d: Any) -> Any:
    """val; if it is None, d or, if d is a function, its result."""
    if val is not None:
        return val
    return d() if isfunction(d) else d


def ismap(x: Any) -> bool:
    """Whether x is a batch of maps with more than three channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Whether x is a batch of images, grey or RGB."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all but the batch, (B, ...) -> (B,)."""
    return tensor.flatten(1).mean(1) if tensor.ndim > 1 else tensor


def count_params(model: nn.Module, verbose: bool = False) -> int:
    total = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        print(f"{type(model).__name__} has {total * 1e-6:.2f} M params.")
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str], size: int = 10) -> Tensor:
    """Each text as an image, black on white, (B, 3, height, width) in [-1, 1]; wh is (width, height)."""
    width, height = wh
    font = ImageFont.load_default(size)
    sheets = []
    for text in xc:
        sheet = Image.new("RGB", (width, height), "white")
        shown = text.encode("latin-1", "replace").decode("latin-1")  # what the built-in font has
        lines = wrap(shown, max(1, int(width / font.getlength("n"))))
        ImageDraw.Draw(sheet).text((0, 0), "\n".join(lines), fill="black", font=font)
        sheets.append(torch.from_numpy(np.array(sheet)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(sheets)


# Of ldm.modules.diffusionmodules.util


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas (T,) of a schedule that is given as alpha-bar of the time in 0..1."""
    edges = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - later / earlier, max_beta) for earlier, later in zip(edges, edges[1:], strict=False)])


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = True
) -> np.ndarray:
    """See `ddim_timesteps`; with verbose it prints the timesteps."""
    steps = np.asarray(ddim_timesteps(num_ddim_timesteps, num_ddpm_timesteps, ddim_discr_method))
    if verbose:
        print(f"Selected timesteps for ddim sampler: {steps}")
    return steps


def make_ddim_sampling_parameters(
    alphacums: np.ndarray | Tensor, ddim_timesteps: Sequence[int], eta: float, verbose: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sigmas, alpha-bars and previous alpha-bars of ascending timesteps, each (S,)."""
    table, steps = np.asarray(alphacums), np.asarray(ddim_timesteps)
    alphas = table[steps]
    alphas_prev = np.append(table[0], alphas[:-1])
    sigmas = eta * np.sqrt((1 - alphas_prev) / (1 - alphas) * (1 - alphas / alphas_prev))
    if verbose:
        print(f"DDIM with eta {eta}: sigma_t {sigmas}")
    return sigmas, alphas, alphas_prev


def extract_into_tensor(a: Tensor, t: Tensor, x_shape: Sequence[int]) -> Tensor:
    """a[t], (B,), shaped to multiply a tensor of x_shape."""
    return a.gather(-1, t).view(-1, *[1] * (len(x_shape) - 1))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Unit normal noise of PyTorch's generator; with repeat the same for the whole batch."""
    if not repeat:
        return torch.randn(*shape, device=device)
    return torch.randn(1, *shape[1:], device=device).expand(*shape).clone()


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution of 1, 2 or 3 dimensions."""
    return CONVOLUTIONS[checked(dims)](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Average pooling of 1, 2 or 3 dimensions."""
    return AVERAGE_POOLS[checked(dims)](*args, **kwargs)


def checked(dims: int) -> int:
    if dims not in CONVOLUTIONS:
        raise ValueError(f"dims must be 1, 2 or 3; got {dims}")
    return dims


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    return nn.Linear(*args, **kwargs)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


SiLU = nn.SiLU


# Of ldm.modules.diffusionmodules.model, ldm.modules.attention and ldm.modules.encoders.modules


def Normalize(in_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """The group norm of the first stage and of the UNet's transformers."""
    return nn.GroupNorm(num_groups, in_channels, eps=1e-6)


def nonlinearity(x: Tensor) -> Tensor:
    """x * sigmoid(x), of any shape."""
    return nn.functional.silu(x)


class AbstractEncoder(nn.Module):
    """Base of conditioners: `encode` turns a raw condition into what the network takes."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no encode")


# Of ldm.models.diffusion.ddpm


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Takes the place of a frozen module's `train`, so that it stays in evaluation mode."""
    return self
