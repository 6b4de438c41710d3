"""The denoising network and the ways in which it is conditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.conditioning import Conditioning
from ldm.modules.diffusionmodules.features import Features, PartWeights
from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """The denoising network, fed with its condition in the way that `conditioning_key` names.

    concat: channels beside x; crossattn: context tokens; adm: a vector or label beside the timestep;
    hybrid: concat and crossattn; hybrid-adm, crossattn-adm: with a vector as well; None: no condition.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key {conditioning_key!r} is not one of {CONDITIONING_KEYS}")
        self.config = diff_model_config
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def conditioning(
        self,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Conditioning:
        """The published lists of condition tensors as one `Conditioning`."""
        key = self.conditioning_key
        if key == "adm":
            return Conditioning(y=c_crossattn[0] if c_crossattn else c_adm)
        return Conditioning(
            context=torch.cat(list(c_crossattn), dim=1) if c_crossattn else None,  # along the tokens
            concat=torch.cat(list(c_concat), dim=1) if c_concat else None,  # along the channels
            y=c_adm,
        )

    def check(self, cond: Conditioning) -> None:
        key = self.conditioning_key or ""
        wanted = {
            "context": "crossattn" in key or key.startswith("hybrid"),
            "concat": key == "concat" or key.startswith("hybrid"),
            "y": "adm" in key,
        }
        for part, needed in wanted.items():
            if (getattr(cond, part) is not None) != needed:
                raise ValueError(
                    f"conditioning: conditioning_key {self.conditioning_key!r} "
                    f"{'needs' if needed else 'takes no'} {part}"
                )

    def project(self, cond: Conditioning) -> Conditioning:
        """The condition with the network's keys and values in the place of its context, for all steps of a run."""
        self.check(cond)
        return cond if cond.context is None else replace(cond, context=self.diffusion_model.project(cond.context))

    def embed_time(self, t: Tensor) -> Tensor:
        return self.diffusion_model.embed_time(t)

    def encode(self, x: Tensor, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Features:
        return self.diffusion_model.encode(self._input(x, cond), t, cond.context, cond.y, tome)

    def encode_outer(
        self, x: Tensor, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0
    ) -> tuple[Tensor, ...]:
        return self.diffusion_model.encode_outer(self._input(x, cond), t, cond.context, cond.y, blocks, tome)

    def part_weights(self) -> tuple[PartWeights, ...]:
        return self.diffusion_model.part_weights()

    def share(self, features: Features, weights: Sequence[PartWeights] | None = None) -> Features:
        return self.diffusion_model.share(features, weights)

    def advance(self, features: Features, t: Tensor, cond: Conditioning, blocks: int, tome: float = 0.0) -> Features:
        return self.diffusion_model.advance(features, t, cond.context, cond.y, blocks, tome)

    def decode(self, features: Features, t: Tensor, cond: Conditioning, tome: float = 0.0) -> Tensor:
        return self.diffusion_model.decode(features, t, cond.context, cond.y, tome)

    def _input(self, x: Tensor, cond: Conditioning) -> Tensor:
        self.check(cond)
        return x if cond.concat is None else torch.cat([x, cond.concat], dim=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,) -> raw prediction (B, C, H, W); condition as lists of tensors."""
        cond = self.conditioning(c_concat, c_crossattn, c_adm)
        return self.decode(self.encode(x, t, cond), t, cond)
