"""What the networks share: beta schedules, the forward process, layers, what an encoder leaves for its decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.compatibility import (  # noqa: F401  (published names of this module)
    SiLU,
    avg_pool_nd,
    betas_for_alpha_bar,
    conv_nd,
    extract_into_tensor,
    linear,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    mean_flat,
    noise_like,
    scale_module,
)
from ldm.util import instantiate_from_config

# Tensors without data

FILLS = {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.constant_}


class Unfilled(TorchFunctionMode):
    """Tensors without data are not filled with a layer's first weights, which takes PyTorch many steps in Python."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FILLS and kwargs["tensor"].is_meta:  # these hand themselves on with all arguments by name
            return kwargs["tensor"]
        return func(*args, **kwargs)


# Beta schedules, and the forward process: how a clean tensor becomes noise


def _cosine_betas(n_timestep: int, cosine_s: float) -> np.ndarray:
    t = (np.arange(n_timestep + 1, dtype=np.float64) / n_timestep + cosine_s) / (1 + cosine_s)
    alphas_cumprod = np.cos(t * np.pi / 2) ** 2
    # Bounded because the last beta is 1, from where no sampler could step back.
    return np.clip(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0, 0.999)


def make_beta_schedule(
    schedule: str, n_timestep: int, linear_start: float = 1e-4, linear_end: float = 2e-2, cosine_s: float = 8e-3
) -> np.ndarray:
    """Variances of the forward noising steps, under the names of the published configs.

    Args:
        schedule: 'linear' is linear in sqrt(beta); 'sqrt_linear' is linear in beta; 'sqrt' is the square
            root of that; 'cosine' has a squared-cosine alpha-bar ('squaredcos_cap_v2' is another name of it).
        n_timestep: number of training timesteps T.
        linear_start: first beta (of 'sqrt': its square).
        linear_end: last beta (of 'sqrt': its square).
        cosine_s: offset that keeps the first betas of 'cosine' from vanishing.

    Returns:
        betas (T,), float64, each in 0..1.

    Raises:
        ValueError: unknown schedule, n_timestep not positive.

    Source: Ho et al., DDPM (arXiv 2006.11239); cosine: Nichol and Dhariwal (arXiv 2102.09672), eq. 17.
    """
    if n_timestep < 1:
        raise ValueError(f"n_timestep must be at least 1; got {n_timestep}")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep, dtype=np.float64) ** 2
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep, dtype=np.float64) ** 0.5
    if schedule in ("cosine", "squaredcos_cap_v2"):
        return _cosine_betas(n_timestep, cosine_s)
    raise ValueError(f"schedule must be one of linear, cosine, squaredcos_cap_v2, sqrt_linear, sqrt; got {schedule!r}")


NO_SIGNAL = 2.0**-24  # alpha-bar of the last timestep; not 0, so that x_0 can be computed from a prediction


def with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Variances (T,) changed so that nothing of the image is left at the last timestep; the first one stays.

    sqrt(alpha-bar) is shifted and scaled. Source: Lin et al. (arXiv 2305.08891), algorithm 1.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    root[-1] = NO_SIGNAL**0.5
    abar = root**2
    return 1.0 - abar / np.append(1.0, abar[:-1])


def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t], (B,), shaped to multiply x, (B, ...)."""
    return values[t].view(-1, *[1] * (x.ndim - 1))


class ForwardProcess(nn.Module):
    """Gaussian noising in steps of variance beta, its levels as float32 buffers under their published names.

    Args:
        betas: (T,), float64, each in 0..1.

    Source: DDPM (arXiv 2006.11239), section 2.
    """

    def __init__(self, betas: np.ndarray):
        super().__init__()
        self.num_timesteps = len(betas)
        abar = np.cumprod(1.0 - betas)
        for name, values in {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": np.append(1.0, abar[:-1]),
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1),
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    @property
    def device(self) -> torch.device:
        return self.betas.device

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; t: (B,) integers, x_start: (B, ...)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            at(self.sqrt_alphas_cumprod, t, x_start) * x_start
            + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        )


# Layers


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding [cos | sin] of timesteps.

    Args:
        timesteps: (B,), integer or fractional.
        dim: width D; an odd one gets a last column of zeros.
        max_period: longest period over 2 pi, in timesteps.
        repeat_only: repeat the timestep itself D times instead.

    Returns:
        (B, D), float32.

    Source: Vaswani et al. (arXiv 1706.03762), section 3.5, with cosines first.
    """
    t = timesteps.float()[:, None]  # (B, 1)
    if repeat_only:
        return t.repeat(1, dim)
    half = dim // 2
    # This order of operations rounds as the published one; at t = 1000 the difference would show.
    index = torch.arange(half, dtype=torch.float32, device=timesteps.device)  # (D // 2,)
    angles = t * torch.exp(-math.log(max_period) * index / half)  # (B, D // 2)
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that is computed in float32, whatever the input's precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.dtype == torch.float32 == self.weight.dtype else self.part(x, 0)

    def part(self, x: Tensor, start: int) -> Tensor:
        """Normalise channels of whole groups alone: x is the input's channels from `start` on, (B, C_x, ...)."""
        weight, bias = (p[start : start + x.shape[1]].float() for p in (self.weight, self.bias))
        groups = x.shape[1] * self.num_groups // self.num_channels
        return F.group_norm(x.float(), groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    """The UNet's normalisation layer: 32 groups.

    Raises:
        ValueError: channels is not a multiple of 32.
    """
    if channels % 32:
        raise ValueError(f"channels must be a multiple of 32, the number of groups; got {channels}")
    return GroupNorm32(32, channels, eps=eps)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def checkpoint(function: Callable[..., Tensor], *inputs: Any, enabled: bool) -> Tensor:
    """function(*inputs); if enabled, its activations are dropped and computed again in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


class HybridConditioner(nn.Module):
    """Two conditioners of a hybrid model, whose outputs become `c_concat` and `c_crossattn`.

    Args:
        c_concat_config, c_crossattn_config: `target` and `params` of each.
    """

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Any]]:
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }


# Convolutions of some of the input channels


CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
SMALL_WEIGHT = 4 * 2**20  # bytes; of larger ones no copies are kept, to save memory


class PartedConvolution(nn.Module, ABC):
    """A convolution of another kind than PyTorch's that also computes what comes of some input channels alone."""

    @abstractmethod
    def part(self, x: Tensor, start: int) -> Tensor:
        """See `convolve_part`."""


def has_parts(conv: nn.Module) -> bool:
    """Whether it is a convolution for `convolve_part`; what else takes its place may compute anything."""
    return type(conv) in CONVOLUTIONS or isinstance(conv, PartedConvolution)


def weight_part(layer: nn.Module, stop: int) -> Tensor | None:
    """A copy of a convolution's weight for its first `stop` input channels; None if large, or for other layers."""
    weight = layer.weight[:, :stop] if type(layer) in CONVOLUTIONS else None
    return None if weight is None or weight.nbytes > SMALL_WEIGHT else weight.contiguous()


def convolve_part(conv: nn.Module, x: Tensor, start: int, weight: Tensor | None = None) -> Tensor:
    """What a convolution makes of some of its input channels; summed over all channels, its output.

    Args:
        conv: of 1, 2 or 3 dimensions with zero padding, or a `PartedConvolution`.
        x: the input's channels from `start` on, (B, C_x, ...); the bias goes with the first ones.
        weight: what `weight_part` made of it for these channels; None = a slice of its own.
    """
    if isinstance(conv, PartedConvolution):
        return conv.part(x, start)
    weight = conv.weight[:, start : start + x.shape[1]] if weight is None else weight
    function = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return function(x, weight, None if start else conv.bias, conv.stride, conv.padding)


# What an encoder leaves for its decoder


PartWeights = tuple[Tensor | None, Tensor | None]  # of a block's first convolution and its residual; None = its own


@dataclass(frozen=True, eq=False)
class SharedPart:
    """The part of an output block that depends on the key timestep's features alone, for the decoders of several nodes.

    rest:     channels of the skip that are normalised in one group with channels of the node, (B, C_r, H, W).
    conv:     the first convolution of the other channels, (B, C_out, H', W').
    residual: the residual connection of them, (B, C_out, H', W').
    weights:  of the two layers for the channels before those, see `UNetModel.part_weights`.
    """

    rest: Tensor
    conv: Tensor
    residual: Tensor
    weights: PartWeights = (None, None)

    def __len__(self) -> int:
        """The batch size of the features."""
        return len(self.conv)

    def images(self, chosen: slice) -> SharedPart:
        """The shared part of some of the batch; a view."""
        return SharedPart(self.rest[chosen], self.conv[chosen], self.residual[chosen], self.weights)


@dataclass(frozen=True, eq=False)
class Features:
    """Where a decoder stands: what it has computed, and the skips that its remaining blocks will take.

    Fresh from the encoder, `hidden` is the output of the middle block and there is a skip for every output block.
    With fewer skips, `hidden` is what goes into the block that takes the last of them.

    hidden: (B, C, h, w).
    skips:  outputs of the outermost input blocks, first to last, each (B, C_i, H_i, W_i).
    shared: what the network has computed of them for several nodes, see `UNetModel.share`: for each skip that of the
        block that takes it. () = nothing.
    alone:  what the encoder left before something was added to it that is computed anew at every node; None = nothing.
    """

    hidden: Tensor
    skips: tuple[Tensor, ...]
    shared: tuple[SharedPart, ...] = ()
    alone: Features | None = None

    def __len__(self) -> int:
        """The batch size."""
        return len(self.hidden)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The features themselves, without what is computed of them."""
        return self.hidden, *self.skips

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Features:
        """The inverse of `tensors`, with nothing shared."""
        hidden, *skips = tensors
        return Features(hidden, tuple(skips))

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        """Join batches in the order given; one alone is not copied. Keeps the memory format.

        Raises:
            ValueError: there is nothing to join, or the parts have different numbers of skips.
        """
        if not parts:
            raise ValueError("parts must be at least one; got none")
        if len(parts) == 1:
            return parts[0]
        return Features.of([torch.cat(same) for same in zip(*(part.tensors for part in parts), strict=True)])

    @staticmethod
    def for_nodes(parts: Sequence[Features]) -> Features:
        """What `decode` takes for a batch of nodes: shared features once, if all nodes have the same; else `cat`."""
        first = parts[0]
        return first if first.shared and all(part is first for part in parts) else Features.cat(parts)

    def images(self, chosen: slice) -> Features:
        """Some of the batch; a view."""
        hidden, *skips = (tensor[chosen] for tensor in self.tensors)
        return Features(hidden, tuple(skips), tuple(part.images(chosen) for part in self.shared))

    def chunk(self, n: int) -> list[Features]:
        """Views of n equal batches, the inverse of `cat`."""
        return [Features.of(same) for same in zip(*(tensor.chunk(n) for tensor in self.tensors), strict=True)]

    def without_skips(self) -> Features:
        return Features(self.hidden, ())

    def with_outer(self, skips: Sequence[Tensor]) -> Features:
        """With the outermost skips replaced by these."""
        return Features(self.hidden, (*skips, *self.skips[len(skips) :]))

    def plus(self, residuals: Sequence[Tensor]) -> Features:
        """With these added to the skips, first to last, and the last of them to the hidden features."""
        *outer, inner = residuals
        skips = tuple(skip + more for skip, more in zip(self.skips, outer, strict=True))
        return Features(self.hidden + inner, skips)

    @staticmethod
    def combine(parts: Sequence[Features], weights: Sequence[float]) -> Features:
        """The weighted sum of features of the same shapes."""
        return Features.of(
            [weighted_sum(same, weights) for same in zip(*(part.tensors for part in parts), strict=True)]
        )


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted sum of tensors of the same shape; none is changed."""
    out = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        out.add_(tensor, alpha=weight)
    return out


class Unshared(nn.Module):
    """A split network that computes nothing once for the decoders of several nodes; see `UNetModel.share`."""

    keeps_attention = False  # whether outputs of its cross-attention can be kept, see `ProjectedContext.record`
    small_map = 0  # the widest map whose convolutions are not packed, see `ldm.modules.packed`

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        """The features as they are."""
        return features

    def part_weights(self) -> tuple[PartWeights, ...]:
        return ()

    def shared_from(self) -> dict[str, int]:
        return {}
