"""First stages: images in [-1, 1] to latents and back (latent diffusion, arXiv 2112.10752, section 3.1).

These are networks only; their training lives in `ldm.training`. `lossconfig`, `monitor`, `image_key` and
`ckpt_path` (weights a training starts from) belong to that training and are kept for it as given: a
sampling model takes all of its weights from its own checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.tiled import decode_tiled
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.vectorquantize import Quantized, VectorQuantizer


def decoded(decoder: Decoder, z: Tensor, tile: int | None) -> Tensor:
    """The image of z, whole or in tiles, see `decode_tiled`."""
    return decoder(z) if tile is None else decode_tiled(decoder, z, tile)


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian posterior.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`; double_z must be true.
        embed_dim: latent channels.
        lossconfig, monitor, image_key, ckpt_path: for training only.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        lossconfig: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        image_key: str = "image",
        ckpt_path: str | None = None,
    ):
        super().__init__()
        if not ddconfig.get("double_z", True):
            raise ValueError("ddconfig.double_z must be true for AutoencoderKL (mean and log-variance)")
        self.lossconfig, self.monitor, self.image_key, self.ckpt_path = lossconfig, monitor, image_key, ckpt_path
        self.embed_dim = embed_dim
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (B, 3, H, W) in [-1, 1] -> posterior over latents (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor, tile: int | None = None) -> Tensor:
        """Latents (B, embed_dim, h, w) -> images (B, 3, f*h, f*w), about [-1, 1], not clamped.

        tile: see `decode_tiled`; None = the whole image at once.
        """
        return decoded(self.decoder, self.post_quant_conv(z), tile)

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        posterior = self.encode(x)
        return self.decode(posterior.sample() if sample_posterior else posterior.mode()), posterior


class VQModel(nn.Module):
    """Autoencoder with a codebook.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        embed_dim, n_embed: width of a code and number of codes.
        lossconfig, monitor, image_key, ckpt_path: for training only.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        embed_dim: int,
        n_embed: int,
        lossconfig: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        image_key: str = "image",
        ckpt_path: str | None = None,
    ):
        super().__init__()
        self.lossconfig, self.monitor, self.image_key, self.ckpt_path = lossconfig, monitor, image_key, ckpt_path
        self.embed_dim = embed_dim
        z_channels = ddconfig["z_channels"]
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images -> latents before quantisation, (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Quantized:
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor, tile: int | None = None) -> Tensor:
        return decoded(self.decoder, self.post_quant_conv(quant), tile)

    def decode_code(self, indices: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Images from (B*h*w,) code indices; `shape` is (B, h, w)."""
        return self.decode(self.quantize.codes(indices, shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        quantized = self.encode(x)
        return self.decode(quantized.z), quantized


class VQModelInterface(VQModel):
    """A VQModel as the first stage of a diffusion model: the diffusion sees unquantised latents."""

    def encode(self, x: Tensor) -> Tensor:
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False, tile: int | None = None) -> Tensor:
        return super().decode(h if force_not_quantize else self.quantize(h).z, tile)


class IdentityFirstStage(nn.Module):
    """The first stage of a diffusion model that works on pixels."""

    ckpt_path: str | None = None  # it has no weights

    def __init__(self, vq_interface: bool = False):
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor, tile: int | None = None) -> Tensor:
        return x  # in no time and memory, so it needs no tiles

    def quantize(self, x: Tensor) -> Quantized | Tensor:
        return Quantized(x, x.new_zeros(()), x.new_zeros(0).long()) if self.vq_interface else x

    def forward(self, x: Tensor) -> Tensor:
        return x
