"""The scripts' tasks: inputs, plain images, and images with plans (figures 15 and 18 to 25 of the paper)."""

from __future__ import annotations

import io
import runpy
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import SubFigure
from torch import Tensor

from evaluation.plots.drawing import CELL, Drawing, image_grid, new_figure, thin_out
from evaluation.plots.experiment import Experiment
from ldm.io.errors import SettingError, fault_of
from ldm.io.files import PROJECT_ROOT
from ldm.io.images import SUFFIXES, from_pil, open_image, psnr
from ldm.sampling.generate import digest, read_manifest

SCRIPTS = PROJECT_ROOT / "scripts"
MOST = 4  # images of a run that are shown
SIDE = 0.6 * CELL


def draw_tasks(experiment: Experiment, *, commands: Sequence[str], plans: Sequence[str], cache: Path) -> Drawing:
    """Draw what each command line of a sampling script makes with each plan; the first is what the others are compared
    with."""
    runs = {command: {plan: images(experiment, command, plan, cache) for plan in plans} for command in commands}
    given = {command: [from_pil(open_image(file)) for file in files_in(command)] for command in commands}
    columns = max(len(given[command]) + len(one) for command, made in runs.items() for one, _ in made.values())
    figure = new_figure(max(3.5, 1.5 + SIDE * columns), 0.4 + (0.4 + SIDE * len(plans)) * len(runs))
    parts = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
    drawn = zip(parts, runs.items(), strict=True)
    values = {command: draw(part, command, given[command], made, columns) for part, (command, made) in drawn}
    return Drawing(
        figure,
        "Left: the images that a command names, if any; then what it makes with each plan. Numbers: mean PSNR to the "
        f"first row, and MACs of the UNet for an image. Seed {experiment.seed}.",
        values,
        sampled=False,
        settings={"seed": experiment.seed, "guidance": experiment.scale},
    )


def draw(
    part: SubFigure,
    command: str,
    given: Sequence[Tensor],
    made: Mapping[str, tuple[Sequence[Tensor], float]],
    columns: int,
) -> dict[str, Any]:
    """Draw the images of a command by plan, and what one costs in MACs, in a grid so wide; returns the numbers."""
    (plain, _), *_ = made.values()
    rows, labels, values = [], [], {}
    for plan, (shown, macs) in made.items():
        values[plan] = {"psnr": psnr(torch.stack(shown), torch.stack(plain)).mean(), "macs": macs}
        distance = "" if shown is plain else f"\n{values[plan]['psnr']:.1f} dB"
        labels.append(f"{plan}{distance}\n{macs / 1e9:.3g} GMAC")
        row = [*(given if shown is plain else [torch.ones_like(image) for image in given]), *shown]
        rows.append(row + [torch.ones_like(row[0])] * (columns - len(row)))
    image_grid(part, rows, [""] * columns, labels)
    part.suptitle(textwrap.fill(command, 20 * columns), fontsize=6.5)
    return values


def images(experiment: Experiment, command: str, plan: str, cache: Path) -> tuple[list[Tensor], float]:
    """What a command makes with a plan, at most `MOST` images (3, H, W), and the MACs of the UNet for one.
    Raises SettingError: `commands`: no such script, or it refuses the command."""
    script, *arguments = words(command)
    setup = experiment.setup
    model = ["--config", str(setup.config_path), "--ckpt", str(setup.ckpt), "--device", str(setup.device)]
    scale = [] if experiment.scale is None else ["--scale", str(experiment.scale)]
    argv = [*model, *scale, "--seed", str(experiment.seed), *arguments, "--plan", plan]
    out, said = cache / digest({"script": script, "arguments": argv}), io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = runpy.run_path(str(SCRIPTS / script))["main"]([*argv, "--outdir", str(out)])
    if code:
        raise SettingError("commands", f"{command} --plan {plan}: {said.getvalue().strip().splitlines()[-1]}")
    made = thin_out(read_manifest(out / "manifest.jsonl"), MOST)
    return [from_pil(open_image(out / entry["file"])) for entry in made], made[0]["unet_macs"]


def words(command: str) -> list[str]:
    """The script's name and its arguments. Raises SettingError: `commands`: there is no such script."""
    with fault_of("commands"):
        script, *arguments = shlex.split(command)
    if not (SCRIPTS / script).is_file():
        raise SettingError("commands", f"{script}: no such file in scripts/; expected one such as txt2img.py")
    return [script, *arguments]


def files_in(command: str) -> list[str]:
    """The images that a command names."""
    return [word for word in words(command) if word.lower().endswith(SUFFIXES) and Path(word).is_file()]
