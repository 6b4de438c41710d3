"""What captions say: names of emoji as one says them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

SHARED = 4  # a keyword of more concepts than this says too little

MASS = frozenset(
    """
    bacon bread broccoli butter cereal coffee coral corn cutlery denim dna dung eyewear fire fog fondue
    garbage garlic grain ice judo kale karate lettuce lipstick luggage maize meat milk money oatmeal oden
    pasta poop popcorn porridge ramen rice sake salt soap spaghetti sushi tempura tennis thread timber
    trash treasure underwear vhs wheat whisky wood yarn""".split()
)
PLURAL = frozenset("dice children men women people teeth".split())
PREPOSITION = re.compile(r" (?:of|with|without|on|in|from|for|at|over|behind|blowing|holding|rolling|licking|and) ")
COLOURS = frozenset("black blue brown green orange pink purple red white yellow".split())
NO_ARTICLE = re.compile(r"(?:a|an|the|two|three|santa|mount|saturn|planet earth)(?= |$)")


def head_noun(name: str) -> str:
    """The word that decides between singular and plural: 'slice of pizza' -> 'slice'."""
    return PREPOSITION.split(name, maxsplit=1)[0].split()[-1]


def is_plural(noun: str) -> bool:
    return noun in PLURAL or (noun.endswith("s") and not noun.endswith(("ss", "us", "os")))


def phrase(name: str) -> str:
    """A name as one says it: 'Dog Face' -> 'a dog face', 'eyes' -> 'eyes', 'bread' -> 'bread'."""
    name = " ".join(re.sub(r"[“”\"!:,]", " ", name.lower().replace("’", "'").replace("_", " ")).split())
    noun = head_noun(name)
    if NO_ARTICLE.match(name) or noun in MASS or is_plural(noun):
        return name
    an = re.match(r"(?!one\b|one-|uni|eu|us|uf)[aeiou]|x-ray|hour|suv", name)
    return f"{'an' if an else 'a'} {name}"


def full_caption(words: str, style: str) -> str:
    """The words of a caption with the style of the drawing."""
    return f"{words}, {style} style"


def telling(
    keywords: Iterable[str], name: str, accepted: Container[str], shared: Mapping[str, int], named: Container[str]
) -> list[str]:
    """The accepted keywords that point at this concept: of few concepts, and in no other concept's name."""
    own = words_of(name)
    return [
        k
        for k in keywords
        if k in accepted and shared[k] <= SHARED and all(w in own or w not in named for w in words_of(k))
    ]


def words_of(name: str) -> list[str]:
    return re.split(r"[ -]", name.lower())
