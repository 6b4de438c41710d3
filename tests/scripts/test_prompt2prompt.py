"""scripts/prompt2prompt.py with a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.helpers.scripts import Script, check_laws, check_resume
from tests.helpers.tiny_models import write_model

HEART = ["--prompt", "a red heart"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    config, weights = write_model(tmp_path_factory.mktemp("model"))
    return ["--config", str(config), "--ckpt", str(weights), "--steps", "4", "--scale", "3"]


@pytest.fixture
def script(files, tmp_path) -> Script:
    return Script("prompt2prompt", tmp_path, *files)


def test_a_source_is_the_image_of_its_prompt_alone_and_its_edits_are_near_it(script, files, tmp_path, capsys):
    arguments = [*HEART, "--edit", "a green heart", "--edit", "a red tree", "--plan", "0,2"]
    made = script(*arguments)
    assert [entry["prompt"] for entry in made] == ["a red heart", "a green heart", "a red tree"]
    assert {entry["source"] for entry in made} == {"a red heart"}
    assert made[0]["edits"] == {
        "refine": False,
        "cross_steps": {"": [0.0, 0.8]},
        "self_steps": [0.0, 0.4],
        "weights": {},
        "blend": [],
        "threshold": 0.3,
    }
    alone = Script("txt2img", tmp_path / "alone", *files)
    plain = alone(*HEART, "--plan", "0,2", "--n_samples", "1")
    for source, other in zip(made[::3], plain, strict=True):
        assert source["seed"] == other["seed"]
        assert np.abs(script.pixels(source) - alone.pixels(other)).max() <= 1
    taken = [np.abs(script.pixels(entry) - script.pixels(made[0])).mean() for entry in made[1:3]]
    assert min(taken) > 0
    free = script(*arguments, "--cross-steps", "0", "--self-steps", "0")
    assert np.mean(taken) < np.mean([np.abs(script.pixels(e) - script.pixels(free[0])).mean() for e in free[1:3]])
    check_resume(script, capsys, *arguments, "--blend", "red", "green")


def test_an_image_to_start_from(script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    arguments = ["--init-img", str(tmp_path / "x.png"), *HEART, "--reweight", "heart=-2", "--plan", "off"]
    source, edit = script(*arguments)
    assert (source["init_img"], source["inversion_steps"], source["negative_prompt"]) == ("x.png", 4, "a red heart")
    away, _ = script(*arguments, "--steps", "50", "--negative_prompt", "")
    assert all((script.pixels(one) != script.pixels(source)).any() for one in (edit, away))


def test_the_laws_from_noise_and_from_an_image(script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    edit = [*HEART, "--edit", "a big green heart", "--reweight", "green=2", "--blend", "heart", "--noise-weight", "0"]
    for start in ([], ["--init-img", str(tmp_path / "x.png")]):
        check_laws(script, *edit, *start, "--n_samples", "1")


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "--edit: needed: the changed prompt; or --reweight for the same prompt"),
        (
            ["--edit", "a big green heart", "--method", "replace"],
            "--edit: words can be replaced only by equally many: 3 in 'a red heart', 4 in 'a big green heart'; "
            "expected as many, or the method refine",
        ),
        (
            ["--edit", "a green heart", "--reweight", "snowy=2"],
            "--reweight: there is no word 'snowy' in an edited prompt; its words are a, green, heart",
        ),
        (
            ["--edit", "a green heart", "--cross-steps", "red=.2"],
            "--cross-steps: there is no word 'red' in an edited prompt; its words are a, green, heart",
        ),
        (
            ["--edit", "a green heart", "--blend", "green"],
            "--blend: none of its words is in the prompt 'a red heart'; expected one",
        ),
        (["--reweight", "2"], "--reweight: must be WORD=FACTOR such as snowy=2; got '2'"),
        (["--edit", "a tree", "--self-steps", "1.5"], "--self-steps: expected a number in 0..1; got '1.5'"),
        (
            ["--edit", "a tree", "--self-steps", ".5,.2"],
            "--self-steps: must be END or BEGIN,END with BEGIN <= END; got '.5,.2'",
        ),
        (
            ["--edit", "a green heart", "--plan", "online:0.5"],
            "--plan: what runs must not depend on the image, since the edits are made with their source",
        ),
        (["--edit", "a green heart", "--init-img", "nowhere.png"], "--init-img: nowhere.png: no such file"),
        (["--edit", "a green heart", "--n_samples", "500001"], "--n_samples: 2 x 500001 images are 1000002; one run"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_bad_arguments(script, capsys, arguments, why):
    assert script.refusal(capsys, *HEART, *arguments).startswith(why)


def test_a_blend_of_an_image_that_is_too_large_is_refused(script, capsys):
    size = ["--H", "80", "--W", "80"]  # 20 x 20 positions in the smallest attention
    assert script.main([*script.common, *HEART, "--edit", "a green heart", "--blend", "heart", *size]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "--blend: no attention of this network has at most 256 positions at this size" in line


def test_merged_tokens_are_refused(script, capsys):
    assert script.refusal(capsys, *HEART, "--edit", "a tree", "--tome", "0.5").startswith("--tome: ")
