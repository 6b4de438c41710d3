"""Safe loading and saving of weights."""

from ldm.checkpoint.file import PART_FILES, CheckpointError, check_weights, fingerprint, read_checkpoint, save_weights
from ldm.checkpoint.model import (
    Bounded,
    Report,
    average_of,
    diffusion_params,
    load_config,
    load_model,
    load_part,
    load_state,
    load_weights,
    unmade_model,
)

__all__ = [
    "PART_FILES",
    "Bounded",
    "CheckpointError",
    "Report",
    "average_of",
    "check_weights",
    "diffusion_params",
    "fingerprint",
    "load_config",
    "load_model",
    "load_part",
    "load_state",
    "load_weights",
    "read_checkpoint",
    "save_weights",
    "unmade_model",
]
