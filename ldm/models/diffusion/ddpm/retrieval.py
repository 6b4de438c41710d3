"""Retrieval-augmented diffusion (arXiv 2204.11824): the condition is an image's neighbours in a database."""

from __future__ import annotations

from typing import Any

from ldm.models.diffusion.ddpm.latent import LatentDiffusion


class MinimalRETRODiffusion(LatentDiffusion):
    """A diffusion conditioned on the embeddings of its image's nearest neighbours, and on nothing else.

    In a batch they are (B, k, D), or (B, patches, k, D), nearest first; the network attends to all of them.

    Args:
        nn_key: their name in a batch.
        k_nn: neighbours of each image; the data says how many there are.
        p_uncond: share of the images that see none; only 0, as published.
        query_key, nn_memory, retrieval_cfg, retrieval_encoder_cfg, ignore_keys: accepted for published configs, which
            say with them how neighbours are found.
        cond_stage_key, cond_stage_config, cond_stage_trainable, conditioning_key: accepted, and replaced by the
            neighbours.
        rest: see `LatentDiffusion`.

    Raises:
        ValueError: p_uncond is not 0.
    """

    def __init__(
        self,
        nn_key: str = "nn_embeddings",
        k_nn: int = 4,
        p_uncond: float = 0.0,
        query_key: str | None = None,
        nn_memory: str | None = None,
        retrieval_cfg: Any = None,
        retrieval_encoder_cfg: Any = None,
        ignore_keys: Any = None,
        cond_stage_key: str | None = None,
        cond_stage_config: Any = None,
        cond_stage_trainable: bool = False,
        conditioning_key: str | None = None,
        **rest: Any,
    ):
        if p_uncond != 0.0:
            raise ValueError(f"p_uncond: only 0 is supported; got {p_uncond}")
        as_tokens = {"target": "torch.nn.Flatten", "params": {"start_dim": 1, "end_dim": -2}}
        super().__init__(cond_stage_config=as_tokens, cond_stage_key=nn_key, conditioning_key="crossattn", **rest)
