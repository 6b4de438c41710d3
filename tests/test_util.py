from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from omegaconf import OmegaConf

from ldm.io.files import atomic_write, find_file
from ldm.util import ConfigError, check_config, get_obj_from_str, instantiate_from_config
from tests.helpers.paths import ROOT


def test_builds_what_a_config_names():
    config = OmegaConf.create(
        {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 3}, "base_learning_rate": 1e-4}
    )
    assert instantiate_from_config(config).weight.shape == (3, 2)
    for empty in ({}, {"params": None}):
        built = instantiate_from_config({"target": "torch.nn.Identity"} | empty)
        assert isinstance(built, torch.nn.Identity)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "ldmx.module.Thing",
        "torch.nnx.Thing",
        "Linear",
        "",
    ],
)
def test_other_packages_are_refused_by_name(target):
    with pytest.raises(ConfigError, match="outside the allowed packages"):
        get_obj_from_str(target)


@pytest.mark.parametrize("target", [None, 7, ["torch.nn.Linear"]])
def test_a_target_is_a_name(target):
    with pytest.raises(ConfigError, match="expected a dotted name"):
        get_obj_from_str(target)


@pytest.mark.parametrize(
    "target",
    [
        "ldm.util.os.system",
        "ldm.util.os",
        "ldm.util.import_module",
        "ldm.util.Path",
        "ldm.util.inspect",
        "torch.nn.modules.module.torch",
        "torch.nn.parallel.distributed.os.system",
        "ldm.util.ALLOWED_PACKAGES",
        "torch.nn.modules.module.partial",
    ],
)
def test_what_a_module_merely_imports_is_out_of_reach(target):
    with pytest.raises(ConfigError, match="target"):
        get_obj_from_str(target)


def test_a_config_can_only_build_classes():
    assert callable(get_obj_from_str("torch.nn.functional.relu"))
    with pytest.raises(ConfigError, match="is a function"):
        instantiate_from_config({"target": "ldm.util.check_config", "params": {"config": {}}})


def test_the_refusal_names_the_target_and_the_way_out():
    with pytest.raises(ConfigError, match=r"'fractions.Fraction'.*allow=") as refusal:
        instantiate_from_config({"target": "fractions.Fraction"})
    assert "\n" not in str(refusal.value)
    assert instantiate_from_config({"target": "fractions.Fraction"}, allow=("fractions",)) == 0


@pytest.mark.parametrize(
    "config, why",
    [
        ({"params": {}}, "'target' is missing"),
        ("__is_first_stage__", "expected a mapping"),
        (None, "mapping"),
        ({"target": "torch.nn.Nothing"}, "has no 'Nothing'"),
        ({"target": "ldm.nothing.Thing"}, "no module"),
        (
            {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1, "colour": 2}},
            "'torch.nn.Linear'.*colour.*accepted: in_features",
        ),
        ({"target": "torch.nn.Linear", "params": {"in_features": 1}}, "'torch.nn.Linear'.*out_features"),
    ],
)
def test_bad_configs_say_why(config, why):
    with pytest.raises(ConfigError, match=why):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    "change", [{"in_channels": -3}, {"model_channels": 10**12}, {"num_heads": 0, "attention_resolutions": [1]}]
)
def test_sizes_that_no_network_has_are_the_fault_of_the_config(change):
    params = {
        "image_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "channel_mult": [1],
        "num_heads": 1,
    }
    config = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params | change}
    with torch.device("meta"), pytest.raises(ValueError, match="num_heads|nothing can be built with these values"):
        instantiate_from_config(config)


def test_an_error_inside_a_constructor_is_not_disguised():
    params = {"in_channels": 2, "out_channels": 3, "kernel_size": 1, "groups": 5}
    with pytest.raises(ValueError, match="divisible by groups") as error:
        instantiate_from_config({"target": "torch.nn.Conv2d", "params": params})
    assert not isinstance(error.value, ConfigError)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"timesteps": True}, "timesteps should be a valid integer; got True"),
        ({"timesteps": 1000.5}, "timesteps should be a valid integer; got 1000.5"),
        ({"timesteps": "1000"}, "timesteps should be a valid integer; got '1000'"),
        ({"scale_factor": float("nan")}, "scale_factor should be a finite number; got nan"),
        ({"scale_by_std": "no"}, "scale_by_std should be a valid boolean; got 'no'"),
        ({"conditioning_key": ["crossattn"]}, "conditioning_key should be a valid string; got"),
        ({"parameterization": None}, "parameterization should be a valid string; got None"),
        ({"first_stage_config": True}, "first_stage_config should be a mapping; got True"),
        ({"given_betas": [0.1, "x"]}, "given_betas.1 should be a valid number; got 'x'"),
        (
            {
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {"channel_mult": True},
                }
            },
            "UNetModel.*(missing|channel_mult)",
        ),
    ],
)
def test_a_value_of_another_kind_is_named(change, why):
    stage = {"target": "torch.nn.Identity"}
    config = {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {"first_stage_config": stage, "cond_stage_config": stage, "unet_config": stage},
    }
    check_config(config)
    config["params"] |= change
    for check in (check_config, instantiate_from_config):
        if check is check_config or "unet_config" not in change:
            with pytest.raises(ConfigError, match=why):
                check(config)


@pytest.mark.parametrize(
    "value, hint, good",
    [
        (1, float, True),
        (True, float, False),
        (True, int, False),
        (1, bool, False),
        ("a", str, True),
        (None, str, False),
        ([1, 2], Sequence[int], True),
        ([1, "a"], Sequence[int], False),
        ("ab", Sequence[str], False),
        ([1, 2], tuple[int, int], True),
        ((1, 2), tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ({"a": 1}, Mapping[str, int], True),
        ([], Mapping[str, int], False),
        (None, int | None, True),
        ("x", int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (OmegaConf.create([1, 2]), Sequence[int], True),
        (OmegaConf.create({"a": 1}), Mapping[str, int], True),
        (object(), Any, True),
        (object(), int, False),
        (object(), torch.Tensor, True),  # not a type that a file could have: for the constructor to check
        (float("inf"), float, False),
        (1.0, int, False),
        (10**40, int, True),
    ],
)
def test_which_values_fit_an_annotation(value, hint, good, monkeypatch):
    class Thing:
        def __init__(self, value: hint, more: Path | None = None, unsaid=None):
            self.value = value

    Thing.__init__.__annotations__["value"] = hint
    Thing.__module__ = "thing"
    monkeypatch.setitem(sys.modules, "thing", SimpleNamespace(Thing=Thing))
    config = {"target": "thing.Thing", "params": {"value": value, "unsaid": object()}}
    if good:
        assert instantiate_from_config(config, allow=("thing",)).value is value
    else:
        with pytest.raises(ConfigError, match=r"thing.Thing': value.* should "):
            instantiate_from_config(config, allow=("thing",))


def test_a_missing_dependency_is_not_called_a_missing_target(tmp_path, monkeypatch):
    (tmp_path / "ldm_plugin.py").write_text("import a_package_nobody_has\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="No module named 'a_package_nobody_has'"):
        get_obj_from_str("ldm_plugin.Thing", allow=("ldm_plugin",))
    sys.modules.pop("ldm_plugin", None)


def test_files_are_found_here_first_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file("ldm/util.py").samefile(ROOT / "ldm" / "util.py")
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm" / "util.py").write_text("mine")
    assert find_file("ldm/util.py").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        find_file("nowhere.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("first")
        assert not target.exists() and temporary.suffix == ".txt"
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first" and [p.name for p in target.parent.iterdir()] == ["file.txt"]
