"""scripts/class_conditional.py: the fork's trajectories by its defaults, and end to end at a tiny width."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ldm.cli.parser import settings_from
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import make_recipe
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import load_plan
from ldm.sampling.engine import Engine, Sizes, Task
from ldm.sampling.generate import make_items
from ldm.sampling.task import Classes
from tests.helpers.goldens import assert_golden, load_case, recipe_weights
from tests.helpers.paths import EMOJI64, ROOT
from tests.helpers.scripts import Script, check_resume, load_script
from tests.helpers.tiny_models import NARROW, tiny_model


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return tiny_model(tmp_path_factory.mktemp("cin"), "configs/latent-diffusion/cin256-v2.yaml", **NARROW)


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script("class_conditional", tmp_path, *files, "--steps", "5", "--n_samples", "1")


# The numbers of the fork


class FromGiven(Engine):
    """An engine that begins from given noise."""

    x_T: torch.Tensor

    def _noise(self, items):
        return self.x_T


@pytest.mark.parametrize(
    "case, final, flags",
    [
        ("fork_serial_k48_cfg6.0", "final_injected", ["--scale", "6", "--parallel", "50"]),
        ("fork_serial_k48_cfg6.0", "final", ["--scale", "6", "--noise-weight", "0", "--parallel", "7"]),
        (
            "fork_parallel_k19_alpha1_cfg1.5",
            "final",
            ["--plan", "ldm250-demo", "--noise-weight", "1", "--parallel", "50"],
        ),
    ],
    ids=["48 keys", "48 keys without noise", "19 keys"],
)
def test_the_defaults_give_the_trajectories_of_the_fork(case, final, flags):
    model_case, inputs = load_case("fork_model")
    golden, tensors = load_case(case)
    modules = "ldm.modules"
    model = LatentDiffusion(
        first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"},
        use_ema=False,
        cond_stage_config={
            "target": f"{modules}.encoders.modules.ClassEmbedder",
            "params": model_case["class_embedder_kwargs"],
        },
        unet_config={
            "target": f"{modules}.diffusionmodules.openaimodel.UNetModel",
            "params": model_case["unet_kwargs"],
        },
        conditioning_key="crossattn",
        channels=3,
        image_size=8,
        linear_start=0.0015,
        linear_end=0.0195,
    )
    for part in (model.model.diffusion_model, model.cond_stage_model):
        recipe_weights(part, **model_case["weight_recipe"])
    args = load_script("class_conditional").parser().parse_args(flags)
    recipe = make_recipe(settings_from(args, SamplingSettings), (8, 8))
    engine = FromGiven(
        model.eval(),
        Sizes(3, 1, 4, 8),
        recipe,
        load_plan(args.plan, 250, args.parallel or 1),
        Task(Classes(model_case["unconditional_class"])),
    )
    engine.x_T = inputs["x_T"]
    items = make_items([{"class": number} for number in model_case["classes"]], 1, seed=0)
    assert_golden(engine.latents(items), tensors[final], golden)


# End to end


def test_250_steps_with_48_keys_by_default(files, tmp_path):
    script = Script("class_conditional", tmp_path, *files, "--n_samples", "1", "--classes", "3")
    (made,) = script()
    assert (
        made.items()
        >= {
            "class": 3,
            "steps": 250,
            "eta": 0.0,
            "scale": 1.5,
            "uncond_class": 1000,
            "noise_weight": 0.003,
            "noise_below": 150.0,
            "noise_order": "update",
        }.items()
    )
    assert len(made["keys"]) == 48 and made["keys"][-3:] == [247, 248, 249]
    assert len(load_plan("ldm250-demo", 250).keys) == 19


def test_the_class_and_the_guidance_decide_what_is_made(script):
    entries = [
        script("--classes", "3", *flags)[0]
        for flags in ([], ["--scale", "4"], ["--scale", "1"], ["--uncond_class", "7"])
    ]
    entries += script("--classes", "4")
    shown = [script.pixels(entry) for entry in entries]
    assert all((a != b).any() for k, a in enumerate(shown) for b in shown[:k])
    assert [entry["uncond_class"] for entry in entries] == [1000, 1000, None, 7, 1000]


def test_several_images_of_each_class_in_batches_across_classes(script, capsys):
    entries = script("--classes", "3", "999", "3", "--n_samples", "2", "--batch_size", "4")
    assert [(e["class"], e["prompt_index"], e["sample"], e["batch"]) for e in entries] == [
        (3, 0, 0, 4),
        (3, 0, 1, 4),
        (999, 1, 0, 4),
        (999, 1, 1, 4),
        (3, 2, 0, 2),
        (3, 2, 1, 2),
    ]
    shown = [script.pixels(e) for e in entries]
    for path in (script.out / "samples").iterdir():
        path.unlink()
    script("--classes", "3", "999", "3", "--n_samples", "2", "--batch_size", "1")
    for entry, before in zip(entries, shown, strict=True):
        assert np.abs(script.pixels(entry) - before).max() <= 1
    check_resume(script, capsys, "--classes", "5", "6")


def test_classes_by_name(script, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("tench, Tinca tinca\ngoldfish\ncrane\n\ncrane, lifting machine\n", encoding="utf-8")
    by_name = script("--class-names", str(names), "--classes", "Tinca Tinca", "tench, tinca tinca", "goldfish", "4")
    assert [e["class"] for e in by_name] == [0, 0, 1, 4]
    assert script("--classes", "0", "0", "1", "4") == []  # the same images


def test_the_names_of_imagenet_ship(script):
    """One line for each class, in the order that its published uses have."""
    names = (ROOT / "models/ldm/cin256-v2/classes.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == 1000 and all(names)
    known = {
        0: "tench, Tinca tinca",
        134: "crane",
        187: "Yorkshire terrier",
        207: "golden retriever",
        360: "otter",
        517: "crane",
        639: "maillot, tank suit",
        999: "toilet tissue, toilet paper, bathroom tissue",
    }
    assert {index: names[index] for index in known} == known
    by_name = script("--classes", "golden retriever", "Tank  Suit", "toilet paper", "otter")
    assert [entry["class"] for entry in by_name] == [207, 639, 999, 360]


def test_a_model_of_other_classes_has_no_names(tmp_path, capsys):
    ten = {"cond_stage_config__params__n_classes": 10}
    model = tiny_model(tmp_path / "model", "configs/latent-diffusion/cin256-v2.yaml", **NARROW, **ten)
    line = Script("class_conditional", tmp_path, *model).refusal(capsys, "--classes", "otter", "--scale", "1")
    assert re.match("--classes: 'otter' is no number, and this model's classes have no names; give a file", line)


def test_compare(script, capsys):
    entries = script("--classes", "3", "--compare", "--plan", "0,3")
    assert [e["keys"] for e in entries] == [None, [0, 3]]
    assert re.search(r"\nplain / 0,3( +\d+\.\d\d){3} +1\.\d\d\n", capsys.readouterr().out)
    assert list(script.out.glob("compare-*.png"))


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--classes", "1001"], "--classes: expected 0..1000, the classes of this model; got 1001"),
        (["--classes", "3", "-1"], "--classes: expected 0..1000.*got -1"),
        (
            ["--classes", "golden retreiver"],
            "--classes: 'golden retreiver' is the name of no class; did you mean golden r",
        ),
        (["--classes", "crane"], "--classes: 'crane' names classes 134, 517; give the number"),
        (["--classes", "Maillot"], "--classes: 'Maillot' names classes 638, 639; give the number"),
        (["--classes", ""], "--classes: '' is the name of no class$"),
        (["--classes"], "--classes: expected at least one argument"),
        (["--classes", "crane", "--class-names", "NAMES"], "--classes: 'crane' names classes 0, 1; give the number"),
        (["--classes", "dog", "--class-names", "NAMES"], "--classes: 'dog' is the name of no class$"),
        (["--class-names", "EMPTY"], "--class-names: .*is empty"),
        (["--class-names", "nowhere"], "--class-names: "),
        (["--uncond_class", "1001"], "--uncond_class: expected 0..1000"),
        (["--uncond_class", "-1"], "--uncond_class: expected a whole number >= 0"),
        (
            ["--config", str(EMOJI64 / "config.yaml"), "--ckpt", str(EMOJI64 / "model.safetensors")],
            "--config: not a class-conditional model: its conditioner is BERTEmbedder",
        ),
        (
            ["--config", str(ROOT / "models/ldm/celeba256/config.yaml")],
            "--config: a model without a conditioner of its own: its cond_stage_config is __is_unconditional__",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments(script, tmp_path, capsys, arguments, why):
    (tmp_path / "NAMES").write_text("crane\ncrane, machine")
    (tmp_path / "EMPTY").write_text("")
    arguments = [str(tmp_path / a) if a in ("NAMES", "EMPTY") else a for a in arguments]
    assert re.match(why, script.refusal(capsys, *arguments))


def test_guidance_needs_a_class_that_stands_for_none(tmp_path, capsys):
    model = tiny_model(tmp_path / "model", "models/ldm/cin256/config.yaml", **NARROW)  # 1000 classes
    script = Script("class_conditional", tmp_path, *model, "--steps", "3", "--n_samples", "1", "--classes", "2")
    assert re.match("--uncond_class: needed for guidance, since this model has 1000 classes", script.refusal(capsys))
    assert script("--scale", "1")[0]["uncond_class"] is None
    assert script("--uncond_class", "999")[0]["uncond_class"] == 999


def test_the_published_checkpoint_is_asked_for_by_its_place(tmp_path, capsys):
    line = Script("class_conditional", tmp_path).refusal(capsys)
    assert re.match("--ckpt: .*models/ldm/cin256-v2/model.ckpt: no such file", line)
