"""Parts of published configurations."""

from __future__ import annotations

SD_V1 = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=768,
        legacy=False,
    ),
}
