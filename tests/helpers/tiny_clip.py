"""CLIP at a tiny width: hyper-parameters as transformers names them, and as OpenCLIP does."""

TINY_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 8,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
TINY_VISION = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 8,
}
TINY_OPEN = {
    "embed_dim": 8,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    "vision_cfg": {"image_size": 28, "patch_size": 14, "width": 32, "head_width": 8, "layers": 2},
}
