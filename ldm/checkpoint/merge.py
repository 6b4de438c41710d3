"""Several deltas of Custom Diffusion merged into one, in closed form.

Source: Kumari et al. (arXiv 2212.04488, section 3.2, "multiple concepts"; composenW in their code).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.conversion import UNET
from ldm.checkpoint.delta import Delta, add_tokens, changes_of, read_deltas
from ldm.checkpoint.file import CheckpointError
from ldm.io.errors import SettingError, shown

OF_TEXT = (".attn2.to_k.weight", ".attn2.to_v.weight")  # the layers that read the text
BATCH = 64  # texts encoded at a time
RIDGE = 1e-9  # of the mean square of a feature: settles what the captions leave open


@dataclass(frozen=True)
class Merged:
    """A delta made of several.

    weights: of the layers that any of them changes, by our names without `model.diffusion_model.`
    tokens: of all of them.
    kept, width: how many tokens of captions hold the model to what it was, and how many numbers each has.
    deviation: how far the layers' outputs for the prompts are from those of each delta alone, of their norm.
    """

    weights: dict[str, Tensor]
    tokens: dict[str, Tensor]
    kept: int
    width: int
    deviation: float


@torch.no_grad()
def merge_deltas(
    model: nn.Module, paths: Sequence[str | Path], prompts: Sequence[str], captions: Sequence[str]
) -> Merged:
    """The delta whose layers make of each prompt's words what its own file's make, and of captions nearly what the
    model's own make.

    The model's text encoder gets the new tokens. Its UNet stays as it is.

    Args:
        paths: files of keys and values of the text, with new tokens; see `read_deltas`.
        prompts: one for each file, with its new tokens.
        captions: texts of what the model is to go on drawing as it does; the published code takes 1,000.

    Raises:
        OSError, CheckpointError: a file can't be read, is for another model, or changes more than keys and values.
        SettingError: `prompts` or `captions` can't be used.
    """
    if len(prompts) != len(paths):
        raise SettingError("prompts", f"expected one for each of the {len(paths)} files; got {len(prompts)}")
    deltas = read_deltas(paths)
    changes = [keys_and_values(model, path, delta) for path, delta in zip(paths, deltas, strict=True)]
    check_words(deltas, paths, prompts, captions)
    for path, delta in zip(paths, deltas, strict=True):
        add_tokens(model.cond_stage_model, path, delta.tokens)
    words = [torch.cat([*features(model, [prompt])]) for prompt in prompts]
    kept = torch.cat([*features(model, captions)])
    share = shares(torch.cat(words), kept)
    found, deviation = {}, 0.0
    for name in sorted({name for one in changes for name in one}):
        own = model.get_parameter(name).detach().double().cpu()
        zero = torch.zeros_like(own)
        change = [of @ one.get(name, zero).double().cpu().T for of, one in zip(words, changes, strict=True)]
        wanted = torch.cat(change)  # (s, m), beyond what the model's own layer makes
        merged = wanted.T @ share
        whole = torch.cat(words) @ own.T + wanted
        deviation = max(deviation, float((torch.cat(words) @ merged.T - wanted).norm() / whole.norm()))
        found[name.removeprefix(UNET)] = (own + merged).float()
    return Merged(found, {name: v for delta in deltas for name, v in delta.tokens.items()}, *kept.shape, deviation)


def shares(words: Tensor, kept: Tensor) -> Tensor:
    """What one unit of change in the output for each word adds to a layer's weight, (s, d).

    A layer's outputs for the words are to change by E (s, m). Then D = E^T @ shares is the change of its weight that
    does it, words @ D^T = E, with the least |kept @ D^T|. It is the paper's closed form, E^T (w C^-1 w^T)^-1 w C^-1
    with C = kept^T kept, computed by the Cholesky factor of C. Words that have the same features and are to change
    differently change by the mean.

    Args:
        words: features (s, d) of the words whose outputs are to change.
        kept: features (n, d) whose outputs are not to change.

    Raises:
        SettingError: `prompts`: there are more words than a layer can tell apart.
    """
    count, width = words.shape
    if count > width:
        raise SettingError("prompts", f"{count} tokens in all, more than the {width} numbers of a feature")
    gram = kept.T @ kept
    gram += RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    factor = torch.linalg.cholesky(gram)
    whitened = torch.linalg.solve_triangular(factor, words.T, upper=False)  # (d, s)
    inverse = torch.linalg.pinv(whitened, rtol=1e-8)  # (s, d)
    return torch.linalg.solve_triangular(factor.T, inverse.T, upper=True).T


def features(model: nn.Module, texts: Sequence[str]) -> Iterator[Tensor]:
    """What the layers see of each text from its first word on, (tokens, d), float64.

    With its end and what fills it up, which are about the whole text: of emoji64's words alone no concept came. Without
    its start, which for CLIP is the same for all texts.
    """
    for first in range(0, len(texts), BATCH):
        batch = [*texts[first : first + BATCH]]
        encoded = model.get_learned_conditioning(batch).double().cpu()
        for text, states in zip(batch, encoded, strict=True):
            places = chain.from_iterable(model.cond_stage_model.words(text).positions)
            yield states[next(places, 0) :]


def keys_and_values(model: nn.Module, path: str | Path, delta: Delta) -> dict[str, Tensor]:
    changes = changes_of(model, path, delta)
    if others := [name for name in changes if not name.endswith(OF_TEXT)]:
        raise CheckpointError(f"{path}: changes {others[0]} too; only keys and values of the text can be merged")
    return changes


def check_words(
    deltas: Sequence[Delta], paths: Sequence[str | Path], prompts: Sequence[str], captions: Sequence[str]
) -> None:
    """Raise SettingError for a prompt without its file's tokens, and captions that are none or have such tokens."""
    for delta, path, prompt in zip(deltas, paths, prompts, strict=True):
        if not any(name.lower() in prompt.lower() for name in delta.tokens):
            raise SettingError(
                "prompts", f"expected one of {path}'s words, {', '.join(delta.tokens)}; got {shown(prompt)}"
            )
    if not captions:
        raise SettingError("captions", "expected at least one; got none")
    for name in (name for delta in deltas for name in delta.tokens):
        if told := [caption for caption in captions if name.lower() in caption.lower()]:
            raise SettingError("captions", f"expected none with the new word {name}; got {shown(told[0])}")
