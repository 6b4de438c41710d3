"""What a run of a short video is given: its frames, how they move, and the file that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.cli.control import controlled_frames
from ldm.cli.pipeline import MethodRun, make_images
from ldm.cli.settings import OutputSettings, SamplingSettings
from ldm.cli.setup import Setup, count_nodes, make_recipe, without_weights
from ldm.cli.tasks import AS_USUAL, PromptSettings, image_items, text_task
from ldm.io.errors import SettingError, fault_of
from ldm.io.video import check_format, save_video
from ldm.sampling.engine import Task, predicts_once
from ldm.sampling.generate import Item, digest
from ldm.sampling.video import Motion, frames_task, whole_videos

Size = tuple[int, int]  # height and width, in pixels
FRAMES = {"zero": 8, "videofusion": 16}  # as published


@dataclass(frozen=True)
class VideoSettings:
    """See `scripts/text2video.py`.

    motion: its strength, see `ldm.sampling.video.Motion`.
    t1, t0: see there; None = 47 and 44 of 50 steps, in proportion.
    chunk: most frames at a time; None = all.
    format: "frames", or of the file that shows them, see `ldm.io.video.FORMATS`.
    model: one of MODELS: a model of images, or one of videos, which the next four are not for.
    control, control_model: an image for each frame, and the control network that reads them; none = no control.
    """

    prompt: str
    model: str = "zero"
    frames: int | None = None
    motion: tuple[float, float] | None = None
    t1: int | None = None
    t0: int | None = None
    chunk: int | None = None
    fps: float = 4.0
    format: str = "gif"
    seed: int = 42
    seed_by_position: bool = False
    prompts: PromptSettings = AS_USUAL
    control: Sequence[str] = ()
    control_model: str | None = None

    @property
    def count(self) -> int:
        """The number of frames."""
        return FRAMES[self.model] if self.frames is None else self.frames


def check_video(settings: VideoSettings, sampling: SamplingSettings) -> None:
    """Raise SettingError for what no video can be made with."""
    if settings.model == "videofusion":
        for name in ("motion", "t1", "t0", "chunk", "control", "control_model"):
            if getattr(settings, name) not in (None, (), []):
                raise SettingError(name, "not with a model of videos, which makes all frames together")
    with fault_of("format"):
        check_format(settings.format)
    if sampling.error_budget is not None:
        raise SettingError("error_budget", "decides for each image; the frames of a video are sampled together")
    if sampling.plan.startswith("online:") and not sampling.plan.startswith("online:time:"):
        raise SettingError("plan", f"{sampling.plan} decides for each image; expected online:time:X or another plan")
    if len(settings.control) not in (0, settings.count):
        raise SettingError(
            "control", f"expected {settings.count} images, one for each frame; got {len(settings.control)}"
        )
    if bool(settings.control) != (settings.control_model is not None):
        raise SettingError("control_model", "goes together with {control}, the images that it reads", "control")


def make_video(
    setup: Setup, settings: VideoSettings, size: Size, sampling: SamplingSettings, output: OutputSettings
) -> Path | None:
    """Make the frames and, if asked for, the file that shows them; returns that file.

    Raises:
        SettingError: a setting can't be used.
    """
    items = frame_items(settings)
    task = video_task(setup, settings, size, sampling, items[0])
    at_once = min(settings.chunk or settings.count, settings.count)
    try:
        runs = make_images(setup, items, task, size, sampling, output, at_once, keep=True)
    except SettingError as error:
        if error.setting != "batch_size":
            raise
        fewer = "frames" if settings.model == "videofusion" else "chunk"
        raise error.moved(fewer) from error
    if settings.format == "frames" or not runs:
        return None
    (run,) = runs
    return save_clip(run, settings, items, Path(output.outdir))


def frame_items(settings: VideoSettings) -> list[Item]:
    """The frames of the video."""
    subjects = [{"prompt": settings.prompt, "frame": k} for k in range(settings.count)]
    return image_items(subjects, 1, settings.seed, settings.seed_by_position)


def video_task(setup: Setup, settings: VideoSettings, size: Size, sampling: SamplingSettings, first: Item) -> Task:
    """Text to the frames of a video."""
    task = text_task(setup, size, settings.prompts)
    if settings.model == "videofusion":
        network = without_weights(setup.config.model.params.unet_config)
        with fault_of("config"):
            return whole_videos(task, network, settings.count)
    if settings.control:
        task = replace(task, network=controlled_frames(setup, settings.control, settings.control_model, size))
    recipe = make_recipe(sampling, size, setup.config)
    if (nodes := count_nodes(recipe, setup)) < 2:
        raise SettingError("steps", f"expected at least 2, of which the first frame makes one alone; got {nodes}")
    if not predicts_once(recipe, setup.config.model.params.get("timesteps", 1000)):
        raise SettingError("sampler", f"{sampling.sampler} predicts more than once a step; expected one such as ddim")
    with fault_of("t1" if settings.t0 is None else "t0"):
        return frames_task(task, recipe, nodes, Motion.of(nodes, settings.motion, settings.t1, settings.t0), first)


def save_clip(run: MethodRun, settings: VideoSettings, items: Sequence[Item], outdir: Path) -> Path:
    """Save the frames as one file, under a name from all that it depends on."""
    facts = {**run.settings, "fps": settings.fps, "items": [item.settings() for item in items]}
    path = outdir / f"video-{settings.seed}-{digest(facts)}.{settings.format}"
    with fault_of("outdir", (OSError,)):
        save_video(path, run.images, settings.fps, facts)
    return path
