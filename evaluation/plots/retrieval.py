"""Figures of retrieval-augmented models: what the database, its size and the number of neighbours do to the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from evaluation.metrics import frechet
from evaluation.metrics.extractors import load_extractor
from evaluation.plots.drawing import CELL, COLOURS, MARKERS, Drawing, image_grid, new_figure
from evaluation.plots.experiment import Experiment
from ldm.cli.neighbours import RetrievalSettings
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import atomic_write, json_sha256
from ldm.io.images import from_pil
from ldm.retrieval.database import Database, Neighbour, open_database
from ldm.retrieval.index import spread
from ldm.retrieval.search import nearest_others
from ldm.sampling.engine import Task
from ldm.sampling.generate import make_items
from ldm.sampling.neighbours import Neighbours, context_of

GREY = 0.75  # of a neighbour whose image is not here

# Another database, other images (figures 1 and 5 of arXiv 2204.11824)


def draw_databases(experiment: Experiment, *, steps: int, databases: Sequence[str], knn: int) -> Drawing:
    """Draw images of the prompts alone, and of their neighbours in each database, beside the nearest of these."""
    columns = [("the text\nalone", experiment.images(experiment.engine("ddim", steps)))]
    for name in databases:
        found = experiment.retrieved(RetrievalSettings(True, True, knn, name))
        nearest = [Neighbour(**item.inputs["neighbors"][0]) for item in found.items]
        columns += [
            (f"{Path(name).name}:\nnearest", [image_of(found.database, one, experiment) for one in nearest]),
            (f"made of\n{knn} of it", experiment.images(experiment.engine("ddim", steps, task=found.task))),
        ]
    labels, images = zip(*columns, strict=True)
    figure = new_figure(1.5 + CELL * len(columns), 0.7 + CELL * experiment.count)
    image_grid(figure, [*zip(*images, strict=True)], labels, experiment.labels)
    return Drawing(
        figure,
        f"The same model and noise, {steps} DDIM steps: of the embedding of the text alone, and of the {knn} "
        "embeddings of each database that are nearest to the text, without the text.",
        {"columns": [label.replace("\n", " ") for label in labels]},
    )


def image_of(database: Database, neighbour: Neighbour, experiment: Experiment) -> Tensor:
    """The image of a row, (3, H, W) in [-1, 1]; a grey one if it is not here."""
    side = experiment.setup.sizes.default
    found = database.image(neighbour, side)
    return torch.full((3, side, side), GREY) if found is None else from_pil(found)


# Number of neighbours, and size of the database (figures 3 and 6 there)

USUAL = 4  # neighbours, as the published models were trained with
RESAMPLES = 100  # for intervals


def draw_neighbours(
    experiment: Experiment,
    *,
    steps: int,
    databases: Sequence[str],
    knns: Sequence[int],
    sizes: Sequence[int],
    cache: Path,
) -> Drawing:
    """Draw distances from the images of a database of images made of the neighbours of its rows, an image of each."""
    if len(databases) != 1:
        raise SettingError("databases", f"expected one, whose images are also the reference; got {len(databases)}")
    with fault_of("databases"):
        database = open_database(databases[0])
        if database.card is None:
            raise ValueError(f"{database.folder}: says nothing of its images, which are the reference")
    whole, rows = len(database), spread(len(database), experiment.count)
    asked = [*((k, whole) for k in knns), *((USUAL, min(size, whole)) for size in sizes)]
    conditions = {(k, size): neighbours_of(database, rows, k, size) for k, size in asked}
    network = load_extractor("efficientnet-lite0")
    with fault_of("databases"):
        reference = frechet.load_reference(database.card.folder, network, keep=True, spatial=True)
    found = {}
    for one, condition in conditions.items():
        samples = sampled(experiment, steps, rows, condition, cache)
        how = {"extractor": network, "suite": True, "bootstrap": RESAMPLES}
        found[one] = frechet.compute(samples, reference, **how).values
    figure = new_figure(7, 4.6)
    grid = figure.subplots(2, 2, sharey="row")
    for axes, label, at in (
        (grid[:, 0], f"neighbours of all {whole} images", {k: found[k, whole] for k in knns}),
        (
            grid[:, 1],
            f"images in the database, {USUAL} neighbours",
            {s: v for (k, s), v in found.items() if k == USUAL},
        ),
    ):
        curves(axes, dict(sorted(at.items())), label)
    grid[0][0].set_ylabel("Fréchet distance\n(EfficientNet-lite0)")
    grid[1][0].set_ylabel("share")
    grid[1][0].legend()
    values = {f"{k} neighbours, {size} images": of for (k, size), of in found.items()}
    return Drawing(
        figure,
        f"Images of the neighbours of the rows of {database.folder.name}, a row itself left out, {steps} DDIM steps, "
        "compared with the images of the database. Bars: 95 % intervals over the samples.",
        values,
    )


def curves(axes: Sequence[Axes], at: dict[int, dict], label: str) -> None:
    """Draw the distance above precision and recall, over what is varied."""
    names = ((axes[0], "fid_real"), (axes[1], "precision"), (axes[1], "recall"))
    for (place, name), colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        middle = np.array([of[name] for of in at.values()])
        ends = np.array([of[f"{name}_interval"] for of in at.values()]).T  # (2, n)
        bars = np.abs(ends - middle)
        place.errorbar([*at], middle, bars, color=colour, marker=marker, markersize=4, capsize=2, label=name)
        place.set_xscale("log")
        place.set_xticks([*at], map(str, at))
        place.minorticks_off()
    axes[1].set_xlabel(label)


def sampled(experiment: Experiment, steps: int, rows: Tensor, condition: Neighbours, cache: Path) -> Path:
    """A file of images, one for each row under the condition, (N, H, W, 3) uint8; found or made."""
    asked = [experiment.settings(), experiment.loading, steps, rows.tolist(), condition.facts]
    file = cache / f"{json_sha256(asked)[:16]}.npy"
    if not file.is_file():
        items = make_items([{"row": row} for row in rows.tolist()], 1, experiment.seed, by_position=True)
        images = experiment.images(experiment.engine("ddim", steps, task=Task(condition)), items)
        with atomic_write(file) as part, part.open("wb") as stream:
            np.save(stream, ((images + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy())
    return file


def neighbours_of(database: Database, rows: Tensor, k: int, size: int) -> Neighbours:
    """The condition of the k neighbours of each row among `size` random rows, never the row itself.
    Raises SettingError: `knns`: there are too few."""
    chosen = torch.randperm(len(database), generator=torch.Generator().manual_seed(0))[:size]
    place = torch.full((len(database),), -1)
    place[chosen] = torch.arange(len(chosen))
    embeddings = database.embeddings(chosen)
    with fault_of("knns"):
        near = nearest_others(database.embeddings(rows), embeddings, k, place[rows])
    return Neighbours(context_of(None, embeddings[near]), {"database": database.fingerprint, "knn": k, "size": size})
