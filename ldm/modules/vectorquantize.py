"""The codebook of the VQ first stages (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Quantized(NamedTuple):
    """z: nearest codes, (B, D, h, w), gradients pass straight through; loss: scalar; indices: (B*h*w,)."""

    z: Tensor
    loss: Tensor
    indices: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-neighbour quantisation of every latent position.

    Args:
        n_e: codes in the book.
        e_dim: width of a code.
        beta: weight of one commitment term. legacy True puts it on the term that moves the codes, as the
            published checkpoints were trained; False on the term that moves the encoder.
    """

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> Quantized:
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B*h*w, D), in b, h, w order
        indices = nearest(flat, self.embedding.weight)
        z_q = self.codes(indices, (z.shape[0], *z.shape[2:]))
        to_encoder = (z_q.detach() - z).square().mean()
        to_codes = (z_q - z.detach()).square().mean()
        if self.legacy:
            loss = to_encoder + self.beta * to_codes
        else:
            loss = self.beta * to_encoder + to_codes
        return Quantized(z + (z_q - z).detach(), loss, indices)

    def codes(self, indices: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Codes of (B*h*w,) indices as (B, D, h, w); `shape` is (B, h, w)."""
        return self.embedding(indices).view(*shape, -1).permute(0, 3, 1, 2).contiguous()


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """The index of the nearest of the codes (n_e, D) for each of the vectors (N, D): (N,).

    In float32 also under autocast: in half precision codes that lie close together can't be told apart.
    """
    exact = nullcontext() if vectors.is_meta else torch.autocast(vectors.device.type, enabled=False)
    with exact:
        vectors, codes = vectors.float(), codes.float()
        distances = codes.square().sum(1) - 2.0 * vectors @ codes.t()  # up to a constant per row
        return distances.argmin(dim=1)


def perplexity(indices: Tensor, n_e: int) -> Tensor:
    """exp(entropy) of the code usage: 1 (one code for all) .. n_e (all equally used)."""
    usage = torch.bincount(indices.flatten(), minlength=n_e) / indices.numel()
    return torch.exp(-torch.special.xlogy(usage, usage).sum())
