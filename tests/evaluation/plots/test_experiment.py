"""What figures sample with a model of classes, which may have one that stands for none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from evaluation.plots.experiment import Experiment
from ldm.cli.setup import read_setup
from tests.helpers.tiny_models import tiny_transformer


@pytest.fixture
def experiment_with(tmp_path):
    """Two images of a model of three classes, by what its config says of sampling."""
    classes = {"unet_config__params__num_classes": 2, "cond_stage_config__params__n_classes": 3}
    _, file, _, ckpt = tiny_transformer(tmp_path, "configs/dit/dit-xl-2-256.yaml", **classes)
    config = OmegaConf.load(file)

    def make(given: float | None = None, **sampling: float) -> Experiment:
        config.sampling = sampling
        OmegaConf.save(config, file)
        return Experiment(read_setup(Path(file), Path(ckpt), torch.device("cpu")), [], 2, 42, given)

    return make


def test_guidance_leads_away_from_the_class_that_the_config_names(experiment_with):
    shown = []
    for absent in (1, 2):
        experiment = experiment_with(uncond_class=absent, scale=3.0)
        assert experiment.guidance == 3.0 and experiment.task.condition.settings() == {"uncond_class": absent}
        shown.append(experiment.latents(experiment.engine("ddim", 2)))
    assert not torch.allclose(*shown, atol=1e-2)


def test_without_a_class_that_stands_for_none_there_is_no_guidance(experiment_with):
    """Whatever scale the config names."""
    plain, guided = experiment_with(1.0), experiment_with(scale=3.0)
    assert guided.guidance == 1.0
    assert torch.equal(*(one.latents(one.engine("ddim", 2)) for one in (plain, guided)))
