"""Images edited by their prompts: the arguments of `scripts/prompt2prompt.py` as items and a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ldm.cli.parser import MOST
from ldm.cli.settings import SamplingSettings
from ldm.cli.setup import Setup, conditioner
from ldm.io.errors import SettingError, fault_of
from ldm.modules.encoders.tokenizer import Words
from ldm.sampling.engine import Task
from ldm.sampling.generate import Item, make_items
from ldm.sampling.prompt_to_prompt import EditSettings, Inverted, PromptToPrompt
from ldm.sampling.task import Start
from ldm.sampling.word_alignment import EVERY_WORD, Bounds, replacement

INVERSION_STEPS = 50  # where the run has no number of its own


@dataclass(frozen=True)
class EditArguments:
    """What is edited and how; see `scripts/prompt2prompt.py`.

    method: replace, refine, or auto = replace where each edit has as many words as the source.
    cross_steps, reweight: pairs of a word and its value; the word EVERY_WORD stands for all others.
    """

    prompt: str
    edit: Sequence[str] | None = None
    method: str = "auto"
    cross_steps: Sequence[tuple[str, Bounds]] | None = None
    self_steps: Bounds = (0.0, 0.4)
    reweight: Sequence[tuple[str, float]] | None = None
    blend: Sequence[str] | None = None
    blend_threshold: float = 0.3
    negative_prompt: str | None = None

    @property
    def prompts(self) -> list[str]:
        """The source's, then those of the edits; with weights alone there is one edit, of the same words.

        Raises:
            SettingError: nothing is to be edited.
        """
        if not self.edit and not self.reweight:
            raise SettingError("edit", "needed: the changed prompt; or {reweight} for the same prompt", "reweight")
        return [self.prompt, *(self.edit or [self.prompt])]


def edit_task(setup: Setup, given: EditArguments, sampling: SamplingSettings, image: Tensor | None) -> Task:
    """The task of a source and its edits.

    Args:
        image: that the source's prompt describes, (3, H, W) in [-1, 1], in the size of the results; None = noise.

    Raises:
        SettingError: a word is in no prompt, or words can't be replaced.
    """
    encoder = conditioner(setup)
    if not hasattr(encoder, "words"):
        raise SettingError(
            "config",
            f"prompts are not edited with the conditioner {type(encoder).__name__}; expected one text encoder, as that "
            f"of Stable Diffusion 1 or 2",
        )
    setup.read_words(encoder)
    with fault_of("config"):
        source, *edits = map(encoder.words, given.prompts)
    how = edit_settings(source, edits, given)
    guided = sampling.scale != 1.0
    negative = given.negative_prompt or ""
    if image is None:
        return Task(PromptToPrompt([source, *edits], how, negative), Start())
    if given.negative_prompt is None and guided:
        negative = given.prompt  # then guidance moves edits away from the source, and leaves the source as it is
    steps = sampling.steps or INVERSION_STEPS
    return Task(PromptToPrompt([source, *edits], how, negative), Inverted(image, given.prompt, steps))


def edit_settings(source: Words, edits: Sequence[Words], given: EditArguments) -> EditSettings:
    """The settings, checked against the words of the prompts."""
    as_many = all(len(edit.words) == len(source.words) for edit in edits)
    refine = given.method == "refine" or (given.method == "auto" and not as_many)
    if not refine:
        with fault_of("edit"):
            for edit in edits:
                replacement(source, edit)
    cross = {EVERY_WORD: (0.0, 0.8)} | dict(given.cross_steps or ())
    weights, blend = dict(given.reweight or ()), tuple(given.blend or ())
    for setting, words in (("cross_steps", cross.keys() - {EVERY_WORD}), ("reweight", weights.keys())):
        check_words(setting, words, edits, "an edited prompt")
    check_words("blend", blend, [source, *edits], "a prompt")
    for prompt in (source, *edits) if blend else ():
        if not any(map(prompt.of, blend)):
            raise SettingError("blend", f"none of its words is in the prompt {' '.join(prompt.words)!r}; expected one")
    return EditSettings(refine, cross, given.self_steps, weights, blend, given.blend_threshold)


def check_words(setting: str, words: Sequence[str], prompts: Sequence[Words], what: str) -> None:
    """Raise SettingError for a word that the text encoder reads in none of the prompts."""
    for word in sorted(words):
        if not any(prompt.of(word) for prompt in prompts):
            known = dict.fromkeys(own for prompt in prompts for own in prompt.words)
            raise SettingError(setting, f"there is no word {word!r} in {what}; its words are {', '.join(known)}")


def edit_items(
    prompts: Sequence[str], samples: int, seed: int, by_position: bool, extra: Mapping[str, Any]
) -> list[Item]:
    """`samples` groups of a source and its edits, which share all their noise: that of the source alone.

    Raises:
        SettingError: more than one run makes.
    """
    if (total := len(prompts) * samples) > MOST:
        raise SettingError("n_samples", f"{len(prompts)} x {samples} images are {total}; one run makes {MOST} at most")
    subjects = [{"prompt": prompt, "source": prompts[0], **extra} for prompt in prompts]
    items = make_items(subjects, samples, seed, by_position=by_position)
    groups = [items[sample::samples] for sample in range(samples)]
    return [replace(item, seed=group[0].seed, start=group[0].seed) for group in groups for item in group]
