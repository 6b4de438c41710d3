"""The concepts that emoji show: which are kept, what captions say of them, and their skin tones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.data.emoji_set.drawings import Entries, concept_id
from ldm.data.emoji_set.phrases import COLOURS, phrase, telling, words_of
from ldm.io.errors import BadInput

KEYWORDS = 5  # most captions of an image besides its name
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
Listed = Mapping[str, Any]  # scripts/emoji_concepts.yaml


@dataclass(frozen=True)
class Concept:
    """What an emoji shows."""

    id: str
    name: str  # CLDR name, as emoji_concepts.yaml lists it
    category: str
    tier: int
    phrases: tuple[str, ...]  # what captions say: the name, then keywords
    base: str  # the concept without skin tone, with which it is held out
    groups: tuple[str, ...]  # what captions say that leave the concept open: 'a heart', 'an animal'
    subgroup: str  # of the category, as in the emoji charts: face-smiling, food-fruit, ...


def concepts_of(listed: Listed, emoji: Entries, openmoji: Entries, lib: dict[str, list[str]]) -> list[Concept]:
    """Every concept that is kept, in the order of the emoji charts.

    Raises:
        BadInput: emoji_concepts.yaml lists a name or a group that no emoji has.
    """
    annotated = {concept_id(entry["hexcode"]): entry for entry in openmoji}
    by_id = {concept_id("-".join(f"{ord(c):X}" for c in char)): words for char, words in lib.items()}
    entries = {
        concept_id(e["unified"]): e
        for e in sorted(emoji, key=lambda e: e["sort_order"])
        if e["category"] not in ("Flags", "Component")
    }
    names = {id: annotated[id]["annotation"] if id in annotated else e["name"].lower() for id, e in entries.items()}
    check_listed(listed, set(names.values()), {e["subcategory"] for e in entries.values()})
    tiers = {id: tier_of(names[id], e["subcategory"], listed) for id, e in entries.items()}
    captioned = [id for id in entries if tiers[id] < 3]
    keywords = {id: agreed_keywords(annotated.get(id), by_id.get(id, ())) for id in captioned}
    shared = Counter(k for found in keywords.values() for k in set(found))
    named = {w for id in captioned for w in words_of(names[id])}

    def phrases(id: str) -> tuple[str, ...]:
        own = listed["names"].get(names[id], [names[id]])
        if tiers[id] == 3:
            return (phrase(own[0]),)
        found = telling(keywords[id], names[id], set(listed["keywords"]), shared, named)
        if entries[id]["subcategory"].startswith("face-") and "face" in own[0]:
            found = [f"{k} face" for k in found]
        return tuple(dict.fromkeys(map(phrase, own + found)))[: 1 + KEYWORDS]

    return [
        Concept(
            id,
            names[id],
            e["category"],
            tiers[id],
            phrases(id),
            id,
            colourless(names[id], tiers[id]) + tuple(listed["groups"].get(e["subcategory"], ())),
            e["subcategory"],
        )
        for id, e in entries.items()
        if e["category"] != "Symbols" or tiers[id] < 3
    ]


def skin_tones(concepts: Iterable[Concept], emoji: Entries) -> list[Concept]:
    """Tier 4: each concept in each skin tone, where the tone is one for the whole image."""
    variants = {concept_id(e["unified"]): e.get("skin_variations", {}) for e in emoji}
    return [
        Concept(
            concept_id(variants[c.id][code]["unified"]),
            f"{c.name}: {tone} skin tone",
            c.category,
            4,
            (f"{c.phrases[0]} with {tone} skin tone",),
            c.id,
            (c.phrases[0], *c.groups),
            c.subgroup,
        )
        for c in concepts
        for code, tone in SKIN_TONES.items()
        if code in variants[c.id]
    ]


def colourless(name: str, tier: int) -> tuple[str, ...]:
    """What to call a concept so that its colour is left open: 'red heart' -> 'a heart'; () if it names none."""
    rest = " ".join(w for w in name.split() if w not in COLOURS)
    return (phrase(rest),) if tier < 3 and rest not in ("", name) else ()


def tier_of(name: str, subcategory: str, listed: Listed) -> int:
    """How common a concept is: 1, 2 or 3."""
    if any(name in names for names in listed["tier1"].values()):
        return 1
    kept = subcategory in listed["subcategories"] and name not in listed["dropped"]
    return 2 if kept or name in listed["extra"] else 3


def check_listed(listed: Listed, known: set[str], subcategories: set[str]) -> None:
    """Raise BadInput if a name or a group is listed that no emoji has."""
    every = [n for names in listed["tier1"].values() for n in names]
    every += [*listed["iconic"], *listed["extra"], *listed["dropped"], *listed["names"]]
    for what, unknown in (("names", set(every) - known), ("groups", set(listed["groups"]) - subcategories)):
        if unknown:
            raise BadInput(f"emoji_concepts.yaml lists {what} that no emoji has: {', '.join(sorted(unknown))}")


def agreed_keywords(annotated: Mapping[str, str] | None, lib: Iterable[str]) -> list[str]:
    """Keywords on which both sources agree, in emojilib's order (most telling first)."""
    if annotated is None:
        return []
    tags = {t.strip().lower() for t in f"{annotated['tags']},{annotated['openmoji_tags']}".split(",")}
    return [k for k in (w.replace("_", " ").lower() for w in lib) if k in tags]
