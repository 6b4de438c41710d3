"""Safe loading and saving of weights."""

from ldm.checkpoint.file import PART_FILES, check_weights, fingerprint, read_checkpoint, save_weights
from ldm.checkpoint.fill import Report, average_of, load_state, load_weights
from ldm.checkpoint.model import Bounded, diffusion_params, load_config, load_model, unmade_model
from ldm.checkpoint.weight_file import CheckpointError

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
    "load_state",
    "load_weights",
    "read_checkpoint",
    "save_weights",
    "unmade_model",
]
