"""Images from Python, as the sampling scripts make them: the same settings give the same images.

`ldm.cli.kinds` says what each kind of model takes: the arguments of its script, under the same names, with the same
defaults (docs/scripts.md).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldm.checkpoint.published import load_manifest
from ldm.cli.arguments import EMOJI64, Files
from ldm.cli.kinds import BATCH, KINDS, Given, ImageLike, Job, as_files, kind_of, parsed, with_files
from ldm.cli.parser import settings_from, weighted_file
from ldm.cli.pipeline import check_amount, check_guidance, choose_methods, load_engines
from ldm.cli.settings import ModelSettings, SamplingSettings
from ldm.cli.setup import ALONE, Setup, check_memory, count_nodes, make_recipe, make_setup, run_facts, with_batches
from ldm.cli.tasks import check_texts, image_items, truncated_prompts
from ldm.io.errors import BadInput, fault_of, shown
from ldm.io.files import INSTALLED_FILES, PROJECT_ROOT, find_file
from ldm.io.images import to_pil
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.sampling.engine import Engine
from ldm.sampling.generate import Item

FileLike = str | Path
WEIGHTS = ("model.safetensors", "model.ckpt", "last.ckpt")


class Model:
    """A model with its settings; `ldm.load` makes it.

    Attributes:
        network: the `LatentDiffusion`. On a CPU its UNet's layers are packed for the size of the images that are made,
            see `ldm.modules.packed`.
        config: the YAML as an OmegaConf mapping.
        sizes: what images it makes.
        kind: "text", "classes", ... the key of `KINDS`.
    """

    def __init__(self, setup: Setup) -> None:
        self.kind = kind_of(setup.config.model)
        self.setup, self.config, self.sizes = setup, setup.config, setup.sizes
        self.network = setup.load()
        self._refiner: tuple[Setup, LatentDiffusion] | None = None  # the last one, and what it was made of

    def __repr__(self) -> str:
        return f"<ldm model {self.setup.ckpt} ({self.kind}) on {self.setup.device}>"

    def images(
        self,
        subjects: Any = None,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        samples: int = 1,
        seed: int = 42,
        batch_size: int = BATCH,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images, `samples` of each subject.

        Args:
            subjects: what the images show, by the kind of model: prompts; classes (numbers or names); lists of boxes;
                maps of labels; None for a model without conditioning, or one that takes only images.
            image: the image to start from, to inpaint, or to enlarge; a PIL image or a file.
            mask: what to inpaint: white is made anew, black stays to the pixel.
            samples: images of each subject.
            seed: fixes each image's noise, together with what it shows and the number of its sample.
            batch_size: images at a time.
            settings: arguments of the kind's scripts under the same names: plan, steps, sampler, eta, scale, parallel,
                propagate, noise_weight, H, W, tile, strength, prompt_weights, refiner, control, ...

        Returns:
            RGB images: those of the first subject, then those of the second, ...

        Raises:
            TypeError: an argument that this kind of model does not take.
            ValueError: a value that is not accepted.
            FileNotFoundError: a file that is not there.
        """
        return self.run(
            subjects, image=image, mask=mask, samples=samples, seed=seed, batch_size=batch_size, **settings
        ).images()

    def run(
        self,
        subjects: Any = None,
        *,
        image: ImageLike | Sequence[ImageLike] | None = None,
        mask: ImageLike | Sequence[ImageLike] | None = None,
        samples: int = 1,
        seed: int = 42,
        batch_size: int = BATCH,
        **settings: Any,
    ) -> Run:
        """What `images` would make, before it is made; arguments and errors as there."""
        kind = KINDS[self.kind]
        with python_errors():
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                values = {name: with_files(value, folder) for name, value in settings.items()}
                args = parsed(kind, {"n_samples": samples, "seed": seed, "batch_size": batch_size, **values})
                sampling = settings_from(args, SamplingSettings)
                given = Given(subjects, as_files(image, folder), as_files(mask, folder), args.H, args.W)
                more = [settings_from(args, settings) for settings in kind.settings]
                job = kind.make(given, self.setup, sampling, *more, **{name: getattr(args, name) for name in kind.own})
            items = image_items(job.subjects, args.n_samples, args.seed, args.seed_by_position)
            check_amount(len(items), job.size, args.batch_size)
            check_texts(items, job.task)
            batch = min(args.batch_size, len(items))
            engine = self._engine(job, batch, args.tile)
            batch = 1 if engine.plan.measures else batch  # as in the scripts, for the same last digits
            if cut := truncated_prompts(items, job.task, self.network):
                warnings.warn(cut, stacklevel=3)
            return Run(engine, items, batch)

    def _engine(self, job: Job, batch: int, tile: int | None) -> Engine:
        setup = self.setup
        recipe = make_recipe(job.sampling, job.size, setup.config)
        check_guidance(recipe, job.task)
        nodes = count_nodes(recipe, setup, job.task.start.strength)
        facts = recipe.facts(job.task.start.strength)
        facts = run_facts(setup, recipe.solver_name, facts, job.task.network)
        methods = choose_methods(setup, job.sampling, recipe, nodes, facts, False, job.task.network.anew)
        (engine,) = load_engines(setup, methods, job.task, tile, job.refiner, self._load).values()
        check_memory(engine, batch, setup.device)
        return with_batches(engine, job.sampling.parallel, batch, setup.device)

    def _load(self, setup: Setup) -> LatentDiffusion:
        """The network of a setup: the model's own, or a refiner's, which is kept for further calls with its files."""
        if setup is self.setup:
            return self.network
        files = replace(setup, autocast=False)  # whatever it is, the weights are the same
        if self._refiner is None or self._refiner[0] != files:
            self._refiner = None  # gives its memory back before the other is loaded
            self._refiner = files, setup.load()
        return self._refiner[1]


@dataclass(frozen=True)
class Run:
    """Images that are to be made.

    engine: how; its `plain_run` gives the denoiser, the solver and the starting latents of some items.
    items: what, one for each image.
    batch: images at a time.
    """

    engine: Engine
    items: list[Item]
    batch: int

    def images(self) -> list[Image.Image]:
        self.engine.pack()  # again, if images of another size have been made since
        with python_errors():
            return [
                image
                for first in range(0, len(self.items), self.batch)
                for image in self._batch(self.items[first : first + self.batch])
            ]

    def _batch(self, items: Sequence[Item]) -> list[Image.Image]:
        images = self.engine.decode(self.engine.latents(items))
        return to_pil(self.engine.task.start.finish(images, items))


# Which model


def load_by_name(
    name: str | Path | None,
    config: str | Path | None,
    ckpt: str | Path | None,
    device: str | torch.device,
    weights: str,
    precision: str | None,
    lora: FileLike | Sequence[FileLike],
    embedding: FileLike | Sequence[FileLike],
    delta: FileLike | Sequence[FileLike],
) -> Model:
    """See `ldm.load`."""
    files = [Path(path) for path in (config, ckpt) if path is not None]
    if (name is None) == (not files):
        raise ValueError(f"give a model's name, or config and ckpt; got name {name}, config {config}, ckpt {ckpt}")
    for argument, value, accepted in (
        ("weights", weights, ("auto", "ema", "raw")),
        ("precision", precision, (None, "full", "autocast")),
    ):
        if value not in accepted:
            raise ValueError(f"{argument} must be one of {', '.join(map(str, accepted))}; got {value!r}")
    with python_errors():
        for path in files:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file")
        config, ckpt = (config, ckpt) if name is None else named_files(str(name))
        adapters = {"embedding": listed(embedding), "delta": listed(delta)}
        with fault_of("lora", (argparse.ArgumentTypeError,)):
            adapters["lora"] = [weighted_file(file) for file in listed(lora)]
        settings = ModelSettings(config, ckpt, weights, device=str(device), precision=precision, **adapters)
        return Model(make_setup(settings, processes=ALONE))


def listed(files: FileLike | Sequence[FileLike] | None) -> list[str]:
    """One file or several, as a command line has them.

    Raises:
        TypeError: something else.
    """
    several = [files] if isinstance(files, str | Path) else () if files is None else files
    if not isinstance(several, list | tuple) or not all(isinstance(file, str | Path) for file in several):
        raise TypeError(f"lora, embedding and delta must be a file, or a list of files; got {shown(files)}")
    return [str(file) for file in several]


def named_files(name: str) -> Files:
    """Config and weights of a model that is named, or whose folder is.

    Raises:
        ValueError: there is no such model.
        FileNotFoundError: its weights are not here.
    """
    published = load_manifest()
    if name in published:
        entry = published[name]
        try:
            return PROJECT_ROOT / entry.config, find_file(entry.path)
        except FileNotFoundError:
            fetch = "" if PROJECT_ROOT == INSTALLED_FILES else f"get them by scripts/download_models.py {name}, or "
            raise FileNotFoundError(
                f"{name}: its weights are not here, neither from {Path.cwd()} nor from {PROJECT_ROOT}; {fetch}"
                f"put {entry.urls[0]} at {entry.path}"
            ) from None
    models = PROJECT_ROOT / "models"
    places = (models / "ldm" / name, models / name, Path(name))
    folders = [place for place in places if (place / "config.yaml").is_file()]
    if not folders:
        raise ValueError(
            f"there is no model {name!r}; accepted: {EMOJI64[1].parent.name}, rdm/emoji, {', '.join(published)}, a "
            f"folder with config.yaml and weights, or config and ckpt"
        )
    found = [folders[0] / file for file in WEIGHTS if (folders[0] / file).is_file()]
    if not found:
        raise FileNotFoundError(f"{folders[0]} has a config.yaml but no weights; expected {' or '.join(WEIGHTS)}")
    return folders[0] / "config.yaml", found[0]


@contextmanager
def python_errors() -> Iterator[None]:
    """Bad input as a ValueError; also what stands where a file should."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # a device, a folder, a name that no file can have
        raise ValueError(str(error)) from error
    except BadInput as error:
        raise ValueError(str(error)) from error.__cause__
