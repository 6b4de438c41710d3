"""DeepFloyd-IF: its three stages one after the other, each with its images in a folder of their own."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import CheckpointError, check_weights, read_checkpoint, save_weights
from ldm.checkpoint.conversion import ConversionError
from ldm.checkpoint.deepfloyd import Stage, find_stage, load_stage
from ldm.checkpoint.model import check_free
from ldm.cli import pipeline, tasks
from ldm.cli.arguments import ROOT
from ldm.cli.parser import check_outdir
from ldm.cli.settings import ModelSettings, OutputSettings, SamplingSettings
from ldm.cli.setup import (
    Setup,
    count_nodes,
    find_device,
    image_size,
    make_recipe,
    make_setup,
    uses_autocast,
    without_weights,
)
from ldm.io.errors import SettingError, fault_of
from ldm.io.images import from_pil, open_image
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.propagation.load import load_plan
from ldm.models.diffusion.schedule import leading
from ldm.modules.encoders.t5 import LENGTH, T5States, find_parts
from ldm.profiling.cost import free_bytes
from ldm.sampling.deepfloyd import TextStates, TextStatesAndImage
from ldm.sampling.engine import Sizes, Task
from ldm.sampling.generate import Item, read_manifest

UPSCALER = (
    ROOT / "configs/stable-diffusion/x4-upscaling.yaml",
    ROOT / "models/ldm/stable-diffusion-v2/x4-upscaler-ema.safetensors",
)
LEADING = ("ddpm-learned", "ddpm")  # solvers whose published timesteps here are every (1000 // steps)-th one
LINSPACE = "dpm-solver++-published"  # and from the last one on
PER_STAGE = {
    "plan": "plans",
    "steps": "steps",
    "timesteps_at": "steps",
    "scale": "scales",
    "noise_level": "noise_levels",
}
SMALLER = {2: 64, 3: 256}  # pixels a side that a stage makes larger, as published
OF_FILES = ("config", "ckpt")
END = 2**20  # bytes of a file's beginning and of its end


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Which stages sample, and how.

    stages: which are run, in order.
    stage1, stage2: folders; stage3: weights of the x4 upscaler; None = the published place of the last.
    t5: folder of the text encoder; None = that of stage 1.
    steps, scales, plans, noise_levels: of the stages; the first has no noise level.
    parallel: most decoder steps in one batch; None = as many as are fast and fit into memory.
    """

    stages: tuple[int, ...]
    stage1: str | None
    stage2: str | None
    stage3: str | None
    t5: str | None
    steps: Sequence[int]
    scales: Sequence[float]
    plans: Sequence[str]
    noise_levels: Sequence[int]
    sampler: str
    device: str
    precision: str | None
    seed: int
    negative_prompt: str = ""
    parallel: int | None = None

    def sampling(self, number: int) -> SamplingSettings:
        """The sampling settings of a stage, with its published timesteps."""
        steps, sampler = self.steps[number - 1], "ddim" if number == 3 else self.sampler
        with fault_of("steps"):
            at = published_timesteps(sampler, steps, number)
        return SamplingSettings(
            sampler,
            steps,
            scale=self.scales[number - 1],
            plan=self.plans[number - 1],
            noise_weight=0.0,
            timesteps_at=at,
            default_steps=steps,
            parallel=self.parallel,
        )


@dataclass(frozen=True, kw_only=True)
class CascadeSettings(StageSettings):
    """What to make, and by which stages; see scripts/if2img.py."""

    prompt: str
    from_file: str | None
    n_samples: int
    batch_size: int
    outdir: str
    again: bool
    list_plans: bool = False

    def folder(self, number: int) -> Path:
        """The folder of a stage's images."""
        return Path(self.outdir) / f"stage{number}"

    def output(self, number: int) -> OutputSettings:
        return OutputSettings(self.folder(number), again=self.again)


def published_timesteps(sampler: str, steps: int, number: int) -> tuple[int, ...] | None:
    """Where the steps of a stage begin with the solvers of the release; None = where the solver has them.

    Raises:
        ValueError: `steps` is not in 1..1000.
    """
    if number == 3 or sampler in LEADING:
        return leading(steps, 1 if number == 3 else 0)
    if sampler != LINSPACE:
        return None
    return tuple(int(t) for t in np.linspace(0, 999, steps + 1).round()[:0:-1])


@dataclass(frozen=True)
class StageSetup(Setup):
    """A stage, whose config is made of its folder's files."""

    stage: Stage | None = None

    def load(self) -> LatentDiffusion:
        with fault_of("ckpt", (CheckpointError, ConversionError, ValueError, OSError)):
            return load_stage(self.stage, self.device, free_bytes(self.device))


# The stages


@dataclass(frozen=True)
class StageImages:
    """Images that a stage has made, or found, in this run.

    settings: what all of them depend on.
    seeds: of each, see `Item`.
    """

    settings: Mapping[str, Any]
    seeds: frozenset[tuple[int, ...]]

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Whether an entry of the stage's manifest is of one of them."""
        same = all(entry.get(name) == value for name, value in self.settings.items())
        return same and tuple(entry["seed"]) in self.seeds


def make_cascade(settings: CascadeSettings) -> None:
    """Run the stages, each on the images of the one before; between them nothing of a network is kept.

    Raises:
        SettingError: a setting can't be used; it is named as scripts/if2img.py names it.
    """
    check_outdir(Path(settings.outdir))
    prompts = [settings.prompt] if settings.from_file is None else tasks.prompts_in(settings.from_file)
    device = find_device(settings.device)
    setups = stage_setups(settings, device)
    if settings.list_plans:
        list_plans(settings, setups)
        return
    if 1 not in setups:
        images_of(settings, min(setups) - 1, prompts)  # found out before anything is loaded
    texts = Texts(settings, prompts, device) if {1, 2} & setups.keys() else None
    made: StageImages | None = None
    for number, setup in setups.items():
        print(f"stage {number}", flush=True)
        with of_stage(number):
            make = {1: first_stage, 2: second_stage, 3: third_stage}[number]
            made = make(settings, setup, prompts, texts, made)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def stage_setups(settings: StageSettings, device: torch.device) -> dict[int, Setup]:
    """What the files of the stages say; all that can be checked of them is.

    Raises:
        SettingError: a stage, or how it is to sample, can't be used.
    """
    setups = {number: stage_setup(settings, number, device) for number in settings.stages}
    for number, setup in setups.items():
        with of_stage(number):
            check_sampling(settings.sampling(number), setup)
            check_noise_level(settings, number, setup)
    return setups


def list_plans(settings: StageSettings, setups: Mapping[int, Setup]) -> None:
    """Print what plans would cost each stage, whose network is built without its weights."""
    for number, setup in setups.items():
        below = setups[number - 1].sizes.default if number - 1 in setups else SMALLER.get(number, 0)
        with of_stage(number):
            task, size = shapes(settings, number, setup, below)
            recipe = make_recipe(settings.sampling(number), size, setup.config)
            height, width = size
            print(f"stage {number}, images of {width} x {height} pixels")
            pipeline.list_plans(setup, recipe, task, count_nodes(recipe, setup))


@dataclass(frozen=True)
class EncodedTexts:
    """States of T5: of prompts, (N, L, D), and of what guidance leads away from, (L, D); what images store of them."""

    states: Tensor
    negative: Tensor
    about: Mapping[str, Any]

    def chosen(self, places: Sequence[int]) -> EncodedTexts:
        return replace(self, states=self.states[[*places]])


def stage_task(
    settings: StageSettings, number: int, setup: Setup, texts: EncodedTexts | None, images: Tensor | None
) -> tuple[Task, tuple[int, int]]:
    """A stage's task, and height and width of its images.

    Args:
        texts: for the items of stages 1 and 2.
        images: those of the stage before, (N, 3, H, W) in [-1, 1]; the first stage has none.
    """
    if number == 3:
        return tasks.upscaling_task(setup, images, upscaling(settings, setup))
    encoded = texts.states, texts.negative, dict(texts.about)
    condition = TextStates(*encoded) if number == 1 else TextStatesAndImage(images, settings.noise_levels[0], *encoded)
    return Task(condition), image_size(setup.sizes, None, None)


def shapes(
    settings: StageSettings, number: int, setup: Setup, below: int, about: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Task, tuple[int, int]]:
    """A stage's task on texts and images without content, of which the next smaller have `below` pixels a side."""
    states = torch.zeros(1, LENGTH, setup.config.model.params.unet_config.params.get("encoder_dim", 1))
    return stage_task(settings, number, setup, EncodedTexts(states, states[0], about), torch.zeros(1, 3, below, below))


def check_sampling(sampling: SamplingSettings, setup: Setup) -> None:
    """Raise SettingError for a plan or a solver that can't be used, before any stage is run."""
    recipe = make_recipe(sampling, (1, 1))
    nodes = count_nodes(recipe, setup)
    with fault_of("plan"):
        if "auto:" in sampling.plan:
            raise ValueError("auto plans need a calibration, which no stage has; expected a plan that names its steps")
        plan = load_plan(sampling.plan, nodes)
    pipeline.check_network(without_weights(setup.config.model), recipe, plan)


def check_noise_level(settings: StageSettings, number: int, setup: Setup) -> None:
    """Raise SettingError for more noise on the smaller image than the stage knows, before any stage is run."""
    if number == 1:
        return
    if number == 3:
        upscaling(settings, setup)  # whether it is such an upscaler
    known = setup.config.model.params.timesteps if number == 2 else tasks.noise_levels(setup)
    if (level := settings.noise_levels[number - 2]) >= known:
        raise SettingError("noise_level", f"expected 0..{known - 1}; got {level}")


@contextmanager
def of_stage(number: int) -> Iterator[None]:
    """Errors inside are of a stage, and name its argument."""
    try:
        yield
    except SettingError as error:
        name = f"stage{number}" if error.setting in OF_FILES else PER_STAGE.get(error.setting, error.setting)
        raise error.moved(name, f"stage {number}: ") from error


def stage_setup(settings: StageSettings, number: int, device: torch.device) -> Setup:
    """What a stage's files say."""
    autocast = uses_autocast(settings.precision, device)
    if number == 3:
        precision = "autocast" if autocast else "full"
        model = ModelSettings(ckpt=settings.stage3, device=settings.device, precision=precision)
        with of_stage(3):
            return make_setup(model, UPSCALER)
    name = f"stage{number}"
    folder = getattr(settings, name)
    if folder is None:
        raise SettingError(name, f"needed for stage {number}: its folder; or leave it out of {{stages}}", "stages")
    with fault_of(name):
        stage = find_stage(Path(folder))
        check_weights(stage.weights)
        wanted, has = number == 2, stage.model["params"]["unet_config"]["params"]["noise_level"]
        if wanted != has:
            raise ValueError(f"{folder}: that is a stage {2 if has else 1} of DeepFloyd-IF; expected a stage {number}")
        config = OmegaConf.create({"model": stage.model})
        sizes = Sizes.of(config.model)
    return StageSetup(stage.described, stage.weights, config, sizes, device, autocast=autocast, stage=stage)


def first_stage(
    settings: CascadeSettings, setup: Setup, prompts: Sequence[str], texts: Texts, before: StageImages | None
) -> StageImages:
    """Small images of the prompts."""
    items = tasks.image_items([{"prompt": prompt} for prompt in prompts], settings.n_samples, settings.seed)
    return run(settings, 1, setup, items, *stage_task(settings, 1, setup, texts.states(), None))


def second_stage(
    settings: CascadeSettings, setup: Setup, prompts: Sequence[str], texts: Texts, before: StageImages | None
) -> StageImages:
    """The images of the first stage made larger."""
    items, images = images_of(settings, 1, prompts, before)
    chosen = texts.states().chosen([prompts.index(item.inputs["prompt"]) for item in items])
    return run(settings, 2, setup, items, *stage_task(settings, 2, setup, chosen, images))


def third_stage(
    settings: CascadeSettings, setup: Setup, prompts: Sequence[str], texts: Texts | None, before: StageImages | None
) -> StageImages:
    """The images of the second stage made larger still, by the x4 upscaler of Stable Diffusion."""
    items, images = images_of(settings, 2, prompts, before)
    return run(settings, 3, setup, items, *stage_task(settings, 3, setup, None, images))


def upscaling(settings: StageSettings, setup: Setup) -> tasks.UpscalingSettings:
    """The upscaler's settings, for the third stage."""
    prompts = tasks.PromptSettings(settings.negative_prompt)
    return tasks.upscaling_settings(setup, settings.sampling(3), "", prompts, settings.noise_levels[1])


def run(
    settings: CascadeSettings, number: int, setup: Setup, items: Sequence[Item], task: Task, size: tuple[int, int]
) -> StageImages:
    """Make a stage's images."""
    (made,) = pipeline.make_images(
        setup, items, task, size, settings.sampling(number), settings.output(number), settings.batch_size
    )
    return StageImages(made.settings, frozenset(item.seed for item in items))


def images_of(
    settings: CascadeSettings, number: int, prompts: Sequence[str], made: StageImages | None = None
) -> tuple[list[Item], Tensor]:
    """The images of a stage, (N, 3, H, W) in [-1, 1], and what the next stage is to make of each.

    An item's noise depends on the seed, and on that of the smaller image; not on what else is in the folder.

    Args:
        made: which of them, if the stage was run now; else of each prompt and seed the last one is taken.

    Raises:
        SettingError: there are none for some prompt.
    """
    folder, found = settings.folder(number), {}
    for entry in read_manifest(folder / "manifest.jsonl"):
        named = {"prompt", "sample", "seed"} <= entry.keys() and entry["prompt"] in prompts
        if named and (made is None or made.has(entry)) and (folder / entry["file"]).is_file():
            found[entry["prompt"], entry["sample"], tuple(entry["seed"])] = entry
    missing = [prompt for prompt in prompts if not any(key[0] == prompt for key in found)]
    if missing:
        raise SettingError(
            "stages",
            f"{folder} has no image of {missing[0]!r}, with which stage {number + 1} begins; run stage {number}",
        )
    with fault_of("outdir"):
        paths = [(entry["prompt"], folder / entry["file"]) for entry in found.values()]
        opened = [(prompt, path, open_image(path)) for prompt, path in paths]
        images = tasks.stacked((str(path), from_pil(image)) for _, path, image in opened)
    # By the pixels: the file says how long it took, too.
    digests = [hashlib.sha256(image.tobytes()).hexdigest()[:16] for _, _, image in opened]
    items = []
    for place, ((prompt, path, _), digest, (_, sample, seed)) in enumerate(zip(opened, digests, found, strict=True)):
        subject = {"prompt": prompt, "image": path.name, "image_sha256": digest}
        items.append(made_larger(settings, place, sample, subject, seed))
    return items, images


def made_larger(
    settings: StageSettings, place: int, sample: int, subject: Mapping[str, Any], seed: Sequence[int]
) -> Item:
    """What a stage is to make of the image at a place, whose noise came from `seed`."""
    own = (settings.seed, *seed)
    return Item(place, sample, subject, own, own)


# The texts


class Texts:
    """The states of the prompts and of the negative prompt, which T5 makes once; they are kept beside the images.

    Args:
        settings, prompts: of the run.
        device: where T5 computes.

    Raises:
        SettingError: the folder of T5 is not given, or is not T5's.
    """

    def __init__(self, settings: CascadeSettings, prompts: Sequence[str], device: torch.device) -> None:
        self._folder, self.settings = find_encoder(settings)
        which = self.settings["text_encoder"]
        self._texts, self._device = [*prompts, settings.negative_prompt], device
        name = hashlib.sha256(json.dumps([which, self._texts]).encode()).hexdigest()[:16]
        self._file = Path(settings.outdir) / "texts" / f"{name}.safetensors"

    def states(self) -> EncodedTexts:
        """The prompts and the negative prompt."""
        if not self._file.is_file():
            self._encode()
        with fault_of("outdir", (CheckpointError, OSError)):
            states = read_checkpoint(self._file)["states"].float()
        return EncodedTexts(states[:-1], states[-1], self.settings)

    @torch.inference_mode()
    def _encode(self) -> None:
        encoder = load_encoder(self._folder, self._device)
        if cut := encoder.cut(self._texts):
            print(f"{cut} of {len(self._texts)} texts are longer than {encoder.length} tokens; the rest is left out")
        states = torch.cat([encoder([text]).cpu() for text in self._texts])
        with fault_of("outdir", (OSError,)):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            save_weights(self._file, {"states": states})


def find_encoder(settings: StageSettings) -> tuple[Path, dict[str, Any]]:
    """The folder of T5, and what images store of the texts that it encodes.

    Raises:
        SettingError: it is not given, or is not T5's.
    """
    given = settings.t5 or settings.stage1
    if given is None:
        raise SettingError("t5", "needed without {stage1}: the folder of the text encoder T5", "stage1")
    with fault_of("t5"):
        encoder, tokenizer = find_parts(Path(given))
        for weights in encoder.glob("*.safetensors"):
            check_weights(weights)
        about = {"text_encoder": digest_of_files([*encoder.iterdir(), *tokenizer.iterdir()])}
    return Path(given), about | ({"negative_prompt": settings.negative_prompt} if settings.negative_prompt else {})


def load_encoder(folder: Path, device: torch.device) -> T5States:
    """T5. Raises SettingError: its weights can't be read, or do not fit into the memory."""
    with fault_of("t5"):
        weights = find_parts(folder)[0].glob("*.safetensors")
        check_free(folder, sum(file.stat().st_size for file in weights), free_bytes(device))
        return T5States(folder, device=device)


def digest_of_files(paths: Sequence[Path]) -> str:
    """Names, sizes and both ends of files; weights of 19 GB are not read whole to be told apart."""
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as stream:
            digest.update(stream.read(END))
            stream.seek(max(0, size - END))
            digest.update(stream.read(END))
    return digest.hexdigest()[:16]
