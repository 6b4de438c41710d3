"""Published configurations build models with exactly the published state-dict names, shapes and types."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
MODELS = json.loads(gzip.decompress((ROOT / "tests" / "goldens" / "state_dicts.json.gz").read_bytes()))
NOT_OURS = re.compile(r"(first_stage_model\.)?loss\..+")      # the training losses of first stages


@pytest.mark.parametrize("name", sorted(MODELS))
def test_names_shapes_and_types(name):
    config = OmegaConf.load(ROOT / MODELS[name]["config"])
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    ours = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
    published = {k: v for k, v in MODELS[name]["keys"].items() if not NOT_OURS.fullmatch(k)}
    assert ours == published
