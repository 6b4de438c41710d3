"""Which tokens of a prompt stand for which of another one, and when: the tables of prompt-to-prompt.

Source: prompt-to-prompt (arXiv 2208.01626), with the published rounding and order of preference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.modules.encoders.tokenizer import Words

Bounds = tuple[float, float]  # from and to, as shares of the steps
EVERY_WORD = ""  # the key of the bounds of all words that have none of their own


def replacement(source: Words, target: Words) -> Tensor:
    """Which token of the source gives its map to which of the target, (L, L), for words that are exchanged.

    A word whose tokens are as many as those of the word in its place gives them one to one; otherwise each gives an
    equal share to each. After the last exchanged word the table is the identity in positions of the target, whatever
    the source has there, as published.

    Raises:
        ValueError: the prompts have different numbers of words, or an exchanged word is cut off.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"words can be replaced only by equally many: {len(source.words)} in {' '.join(source.words)!r}, "
            f"{len(target.words)} in {' '.join(target.words)!r}; expected as many, or the method refine"
        )
    table, i, j = torch.zeros(source.length, target.length), 0, 0
    for old, new, ours, theirs in zip(source.words, target.words, source.positions, target.positions, strict=True):
        if old == new:
            continue
        if not ours or not theirs:
            raise ValueError(f"{new!r} in the place of {old!r} is past the last token that the text encoder reads")
        between = torch.arange(ours[0] - i)
        table[i + between, j + between] = 1.0
        if len(ours) == len(theirs):
            table[list(ours), list(theirs)] = 1.0
        else:
            table[ours[0] : ours[-1] + 1, theirs[0] : theirs[-1] + 1] = 1 / len(theirs)
        i, j = ours[-1] + 1, theirs[-1] + 1
    rest = j + torch.arange(source.length - max(i, j))
    table[rest, rest] = 1.0
    return table


def refinement(source: Words, target: Words) -> tuple[Tensor, Tensor]:
    """The token of the source that each token of the target stands for, (L,), -1 where it is new; and where not, (L,).

    Past the end of the target each position stands for itself.
    """
    pairs = alignment(source.ids, target.ids)
    mapper = torch.cat([torch.tensor(pairs), torch.arange(len(pairs), target.length)])
    return mapper, (mapper != -1).float()


def alignment(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """For each entry of the target its place in the source in the best global alignment, -1 where it has none.

    Equal entries count 1, exchanged ones -1, left out ones 0 (Needleman and Wunsch). Of equally good ways, an entry
    that is new comes first, then one that is left out.
    """
    score = torch.zeros(len(source) + 1, len(target) + 1, dtype=torch.long).tolist()
    for i, one in enumerate(source, start=1):
        for j, other in enumerate(target, start=1):
            met = score[i - 1][j - 1] + (1 if one == other else -1)
            score[i][j] = max(score[i][j - 1], score[i - 1][j], met)
    places, i, j = [], len(source), len(target)
    while j > 0:
        if i == 0 or score[i][j] == score[i][j - 1]:
            places.append(-1)
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            places.append(i)
    return places[::-1]


def schedule(target: Words, bounds: Mapping[str, Bounds], steps: int) -> Tensor:
    """At which of the steps 0..`steps` the source's maps are taken for each token, 1 or 0, (steps + 1, L).

    Args:
        bounds: of words of the target, and of EVERY_WORD; a bound b is step int(b * (steps + 1)).
    """
    taken = torch.zeros(steps + 1, target.length)
    for word, (low, high) in sorted(bounds.items(), key=lambda one: one[0] != EVERY_WORD):
        places = list(range(target.length) if word == EVERY_WORD else target.of(word))
        within = torch.zeros(steps + 1)
        within[int(low * (steps + 1)) : int(high * (steps + 1))] = 1.0
        taken[:, places] = within[:, None]
    return taken


def marked(target: Words, values: Mapping[str, float], otherwise: float) -> Tensor:
    """The value of each token's word, (L,)."""
    out = torch.full((target.length,), otherwise)
    for word, value in values.items():
        out[list(target.of(word))] = value
    return out
