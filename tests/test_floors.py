"""The architecture's floors: a file imports only from lower floors, and sampling imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
D, M, S = "ldm/models/diffusion", "ldm/modules", "ldm/sampling"
DM = f"{M}/diffusionmodules"
FLOORS = [  # lowest first; a file belongs to the first floor that names it
    ["ldm/files.py", "ldm/kinds.py"],
    [f"{D}/schedule.py"],
    ["ldm/compatibility.py"],
    ["ldm/util.py", "ldm/messages.py", "ldm/cli.py"],
    [
        *("ldm/arguments.py", "ldm/class_names.py", "ldm/processes.py"),
        *(f"{DM}/features.py", f"{DM}/process.py", f"{DM}/util.py", f"{D}/plan.py"),
        *("ldm/noise.py", "ldm/images.py", "ldm/conversion.py", f"{M}/context.py", f"{M}/token_merging.py"),
        *("ldm/weight_file.py", "ldm/arrays.py"),
        *(f"{M}/distributions/*", f"{M}/vectorquantize.py", f"{M}/ema.py", f"{M}/x_transformer.py"),
        *(f"{M}/encoders/tokenizer.py", f"{M}/encoders/clip_tokenizer.py", f"{M}/encoders/clip_image.py"),
        *(f"{M}/encoders/boxes.py", "ldm/lr_scheduler.py", "ldm/data/*", "ldm/parameters.py"),
    ],
    [
        *(f"{M}/attention.py", f"{DM}/model.py", f"{DM}/upscaling.py", f"{M}/losses/*"),
        *(f"{M}/encoders/clip.py", f"{M}/encoders/openclip.py", f"{M}/midas/*"),
        *(f"{D}/denoiser.py", f"{D}/edits.py", f"{D}/levels.py", f"{D}/propagation.py", f"{D}/online.py"),
        *("ldm/checkpoint/*", "ldm/diagnosis.py", "ldm/generate.py", "ldm/cost.py", "ldm/devices.py"),
        *("ldm/download.py", "ldm/published.py"),
    ],
    [
        *(f"{DM}/openaimodel.py", f"{M}/encoders/modules.py", "ldm/models/autoencoder.py"),
        *(f"{D}/loop.py", f"{D}/memory.py", f"{D}/spread.py", "ldm/memory.py"),
        *(f"{D}/compiled.py", f"{D}/warm_up.py"),
        f"{M}/packed.py",
    ],
    [f"{D}/calibration.py"],
    [f"{D}/plans.py"],
    [f"{DM}/*", f"{D}/sampler.py"],
    [f"{D}/deterministic.py", f"{D}/exponential.py"],
    [
        *(f"{D}/ddim.py", f"{D}/plms.py", f"{D}/ancestral.py", f"{D}/heun.py", f"{D}/unipc.py"),
        f"{D}/dpm_solver/*",
    ],
    [f"{D}/solvers.py", f"{D}/ddpm/*"],
    [f"{S}/conditions.py", f"{S}/canvas.py", "ldm/training/*"],
    [f"{S}/engine.py", f"{S}/hybrid.py", "ldm/plan_table.py", "ldm/measure/*"],
    ["ldm/script/*"],
    ["ldm/api.py"],
    [*(f"evaluation/{name}.py" for name in ("errors", "resize", "inception", "yaml_file", "processes"))],
    ["evaluation/protocol.py"],
    ["evaluation/results.py"],
    [*(f"evaluation/{name}.py" for name in ("moments", "pictures", "clip_models", "selection", "table_file"))],
    [
        *(f"evaluation/{name}.py" for name in ("distances", "features", "prompts")),
        *(f"evaluation/{name}.py" for name in ("real_pictures", "run_folder", "table_text")),
    ],
    ["evaluation/measure.py", "evaluation/retrieval.py"],
    [
        *(f"evaluation/plots/{name}.py" for name in ("scene", "drawing", "blocks")),
        *("evaluation/recognition.py", "evaluation/paired.py"),
    ],
    ["evaluation/plots/*", "scripts/*", "main.py"],
    [*(f"evaluation/{name}.py" for name in ("generate", "fid", "adm", "clip_score", "cost"))],
    ["evaluation/table_now.py"],
    ["evaluation/table_cost.py", "evaluation/table_quality.py"],
    ["evaluation/table_job.py"],
    ["evaluation/table_fill.py"],
    ["evaluation/*"],
]
# Whose files may import each other.
ROOMS = (
    *("ldm/checkpoint", "ldm/script", "ldm/training", "ldm/measure", f"{M}/encoders", f"{M}/midas"),
    *(f"{D}/ddpm", f"{D}/dpm_solver", "scripts"),
)
FILES = sorted(
    str(path.relative_to(ROOT))
    for top in ("ldm", "scripts", "evaluation", "main.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
    if path.exists() and (path.name != "__init__.py" or "__all__" in path.read_text(encoding="utf-8"))
)
HEAVY = ("pytorch_lightning", "lightning", "torchvision", "transformers", "open_clip", "tokenizers")


def floor(file: str) -> int:
    for number, patterns in enumerate(FLOORS):
        if any(fnmatch(file, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{file} is on no floor; give it one in FLOORS")


def imported(file: str) -> set[str]:
    """The project's files that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by full name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {name.replace(".", "/") for name in names}
    return {path + end for path in paths for end in (".py", "/__init__.py")} & set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down(file):
    for other in imported(file):
        same_room = any(file.startswith(room) and other.startswith(room) for room in ROOMS)
        assert floor(other) < floor(file) or same_room, f"{file} (floor {floor(file)}) imports {other}"


def test_the_walk_sees_imports():
    assert f"{D}/loop.py" in imported(f"{D}/sampler.py")
    assert f"{DM}/features.py" in imported(f"{D}/denoiser.py")
    assert f"{D}/ddpm/__init__.py" in imported(f"{S}/engine.py")


def test_sampling_imports_nothing_heavy():
    modules = "ldm.models.diffusion.ddim, ldm.models.diffusion.ddpm, ldm.models.diffusion.solvers, ldm.sampling.engine"
    code = f"import sys, {modules}; print(*(set(sys.modules) & set({HEAVY!r})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_there_is_one_denoising_loop():
    """Only the loop steps a rule."""
    stepping = [file for file in FILES if file.startswith(D) and "rule.step(" in (ROOT / file).read_text()]
    assert stepping == [f"{D}/loop.py"]
